"""Checks of a start: it changes the values of the student's weights, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...pruning.decision import Decision
from ...pruning.prune import prune
from ...training.starts.base import Start
from ..assertions import expect, expect_same, global_states, seed_everything
from ..small_network import changes, modes_of, small_task, small_trainer, values_of
from ..subject import made


@dataclass(frozen=True)
class StartSubject:
    """A start to check: an instance."""

    start: Start

    @classmethod
    def of(cls, thing: Any) -> StartSubject:
        """Return the subject; of a class, `tiny()`, or an instance without options."""
        return cls(made(thing)[0])

    @property
    def name(self) -> str:
        """Name of its class, for messages."""
        return type(self.start).__name__


def check_values_alone(subject: StartSubject) -> None:
    """Of the student only values of weights change: names, types, flags and hooks stay, and so does the teacher."""
    task = small_task()
    subject.start.check(task)
    teacher, modes = values_of(task.teacher), modes_of(task.teacher)
    decision = Decision(blocks=tuple(task.blocks), kept=(0, 2, 4, 6), method="Keep")
    student = prune(task, decision)
    before, own = values_of(student), modes_of(student)
    subject.start(task, student, decision, small_trainer(), "recover", None)
    changed = changes(own, modes_of(student))
    expect(not changed, f"{subject.name} changes more of the student than values: {', '.join(changed[:3])}")
    after = values_of(student)
    shapes = {name: (t.shape, t.dtype) for name, t in before.items()}
    same = shapes == {name: (t.shape, t.dtype) for name, t in after.items()}
    expect(same, f"{subject.name} changes names, shapes or dtypes of the student's weights")
    expect(all(bool(t.isfinite().all()) for t in after.values()), f"{subject.name} gives weights that are not finite")
    expect_same(teacher, values_of(task.teacher), f"{subject.name} changes the teacher")
    changed = changes(modes, modes_of(task.teacher))
    expect(not changed, f"{subject.name} changes the teacher: {', '.join(changed[:3])}")


def check_start_repeats(subject: StartSubject) -> None:
    """Called again it gives the same weights, whatever the global generators hold, and leaves these as they were."""
    found: list[dict[str, Tensor]] = []
    for seed in (0, 1):
        task = small_task()
        decision = Decision(blocks=tuple(task.blocks), kept=(1, 3, 4, 7), method="Keep")
        student = prune(task, decision)
        seed_everything(seed)
        states = global_states()
        subject.start(task, student, decision, small_trainer(), "recover", None)
        expect(states == global_states(), f"{subject.name} draws from the global generators")
        found.append(values_of(student))
    expect_same(found[0], found[1], f"{subject.name} gives other weights when it is called again")


START_CHECKS = (check_values_alone, check_start_repeats)
