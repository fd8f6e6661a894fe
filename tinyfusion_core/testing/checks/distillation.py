"""Checks of a distillation loss: it matches blocks that exist, and teaches the student alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...pruning.decision import Decision
from ...pruning.prune import prune
from ...training.distillation import Distilled, OutputKD
from ..assertions import expect, expect_same
from ..small_network import changes, modes_of, small_task, values_of
from ..subject import fixed_rng, made


@dataclass(frozen=True)
class DistillationSubject:
    """What the checks of a distillation loss look at: an instance."""

    kd: OutputKD

    @classmethod
    def of(cls, thing: Any) -> DistillationSubject:
        """Of a class, `tiny()` is checked, or what it is without options."""
        return cls(made(thing)[0])

    @property
    def name(self) -> str:
        return type(self.kd).__name__


DECISIONS = ((0, 2, 4, 6), (1, 3, 5, 7), (0, 1, 4, 5), (2, 7))
"""Blocks that stay, of eight in two lists."""


def check_matched_blocks(subject: DistillationSubject) -> None:
    """The taps are pairs of a block that the student has and one that the teacher has."""
    blocks = tuple(small_task().blocks)
    for kept in DECISIONS:
        for ours, theirs in subject.kd.taps_for(Decision(blocks=blocks, kept=kept, method="Keep")):
            right = 0 <= ours < len(kept) and 0 <= theirs < len(blocks)
            expect(
                right, f"{subject.name}.taps_for matches {ours} of {len(kept)} blocks with {theirs} of {len(blocks)}"
            )


def check_student_learns(subject: DistillationSubject) -> None:
    """The objective is one finite number for each sample; the student gets a gradient, the teacher stays as it was."""
    task = small_task()
    values, modes = values_of(task.teacher), modes_of(task.teacher)
    decision = Decision(blocks=tuple(task.blocks), kept=DECISIONS[0], method="Keep")
    student = prune(task, decision)
    objective = Distilled(student, task, decision, subject.kd)
    objective.before_step(0.0)
    total, losses = objective(task.train.__getitems__([0, 1, 2]), fixed_rng())
    expect(losses.shape == (3,), f"{subject.name}: the objective has the shape {list(losses.shape)} for 3 samples")
    expect(bool(losses.isfinite().all()), f"{subject.name}: the objective is not finite: {losses.tolist()}")
    expect(total.requires_grad, f"{subject.name} gives the student no gradient")
    total.backward()
    gradients = [p.grad for p in student.parameters() if p.grad is not None]
    expect(any(bool(g.any()) for g in gradients), f"{subject.name} gives the student no gradient")
    expect_same(values, values_of(task.teacher), f"{subject.name} changes the teacher")
    changed = changes(modes, modes_of(task.teacher))
    expect(not changed, f"{subject.name} changes the teacher: {', '.join(changed[:3])}")


DISTILLATION_CHECKS = (check_matched_blocks, check_student_learns)
