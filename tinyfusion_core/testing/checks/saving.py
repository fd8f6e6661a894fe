"""Checks of a pruned network: it can be saved and loaded, and compared with its teacher."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from ...protocols.blocks.outputs import captured
from ...protocols.task import Task
from ...pruning.decision import Decision
from ...pruning.prune import load_pretrained, save_network
from ...pruning.removal import in_blocks
from ...training.distillation import derive_taps
from ..assertions import expect, tensors_of
from ..subject import Subject


def check_save_and_load(subject: Subject) -> None:
    """A pruned network that is saved and loaded predicts the same, bit for bit."""
    student, inputs = subject.pruned(subject.every_other()), subject.inputs()
    with tempfile.TemporaryDirectory() as folder:
        save_network(student, Task.without_data(subject.backbone, subject.loss, student), Path(folder))
        again = load_pretrained(folder, type(subject.backbone))
    with torch.no_grad():
        pairs = zip(*(tensors_of(subject.loss.predict(m, inputs)) for m in (student, again)), strict=True)
    expect(
        all(torch.equal(a, b) for a, b in pairs),
        f"what is loaded predicts otherwise than what was saved; see {type(subject.backbone).__name__}.config and "
        "construct, and buffers that the state dict leaves out",
    )


def check_taps(subject: Subject) -> None:
    """The outputs of matched blocks of teacher and student can be captured, and have the same shapes."""
    teacher, removed = subject.backbone.build(), subject.every_other()
    units, student, inputs = subject.backbone.unit_paths(teacher), subject.pruned(removed), subject.inputs()
    kept = tuple(i for i in range(len(units)) if i not in removed)
    decision = Decision(blocks=tuple(units), kept=kept, method="Keep")
    taps = derive_taps(in_blocks(subject.backbone, teacher, decision)[0])
    blocks = subject.backbone.block_paths(teacher)
    ours = subject.backbone.block_paths(student)
    with torch.no_grad(), captured(student, [ours[s] for s, _ in taps], subject.backbone.streams) as found:
        subject.loss.predict(student, inputs)
    with torch.no_grad(), captured(teacher, [blocks[t] for _, t in taps], subject.backbone.streams) as expected:
        subject.loss.predict(teacher, inputs)
    for (ours_at, theirs_at), a, b in zip(taps, found, expected, strict=True):
        shapes = [[tuple(x.shape) for x in tensors] for tensors in (a, b)]
        expect(
            shapes[0] == shapes[1] and bool(shapes[0]),
            f"block {ours_at} of the student gives {shapes[0]}, block {theirs_at} of the teacher {shapes[1]}",
        )
