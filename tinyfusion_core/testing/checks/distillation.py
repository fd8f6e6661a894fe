"""Checks of a distillation loss: it matches existing blocks, and trains only the student."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...pruning.decision import Decision
from ...pruning.prune import prune
from ...training.distillation import OutputKD
from ...training.distilling.distilled import Distilled
from ..assertions import expect, expect_same
from ..small_network import changes, modes_of, small_task, values_of
from ..subject import fixed_rng, made


@dataclass(frozen=True)
class DistillationSubject:
    """A distillation loss to check: an instance."""

    kd: OutputKD

    @classmethod
    def of(cls, thing: Any) -> DistillationSubject:
        """Return the subject; of a class, `tiny()`, or an instance without options."""
        return cls(made(thing)[0])

    @property
    def name(self) -> str:
        """Name of its class, for messages."""
        return type(self.kd).__name__


DECISIONS = ((0, 2, 4, 6), (1, 3, 5, 7), (0, 1, 4, 5), (2, 7))
"""Kept blocks, of eight in two lists."""


def check_matched_blocks(subject: DistillationSubject) -> None:
    """Every tap is a pair of an existing student block and an existing teacher block."""
    blocks = tuple(small_task().blocks)
    for kept in DECISIONS:
        for ours, theirs in subject.kd.taps_for(Decision(blocks=blocks, kept=kept, method="Keep")):
            right = 0 <= ours < len(kept) and 0 <= theirs < len(blocks)
            expect(
                right, f"{subject.name}.taps_for matches {ours} of {len(kept)} blocks with {theirs} of {len(blocks)}"
            )


def check_student_learns(subject: DistillationSubject) -> None:
    """The objective is one finite number per sample; the student gets a gradient, the teacher does not change."""
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
