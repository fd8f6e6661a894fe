"""A loss, an optimizer and a scheduler of one's own in a recovery."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer, RMSprop
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, SequentialLR, StepLR

import tinyfusion_core as tiny
from interrupted import RECOVER, TRAINER, assert_equal, lines, task
from listening import Seen, told
from marks import slow_but
from toys import Match, Planted, StopAt

MOMENTUM = partial(SGD, momentum=0.9)
KEPT = (0, 2, 5, 6, 7)


def recovered(
    run: tiny.RunFolder | None = None,
    trainer: tiny.Trainer = TRAINER,
    recover: tiny.Recover = RECOVER,
    loss: tiny.LossAdapter | None = None,
    **own: Any,
) -> dict[str, Tensor]:
    made = task(loss)
    decision = tiny.Keep(blocks=KEPT)(made, trainer)
    return recover(made, tiny.prune(made, decision), decision, trainer, run, **own).state_dict()


def cycle(optimizer: Optimizer, steps: int) -> LRScheduler:
    return OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)


def halves(optimizer: Optimizer, steps: int) -> LRScheduler:
    return SequentialLR(optimizer, [StepLR(optimizer, 2), StepLR(optimizer, 5, gamma=0.5)], milestones=[steps // 2])


def by_hand(steps: int, scheduled: bool) -> dict[str, Tensor]:
    """What SGD with momentum gives, without average and clipping, written out."""
    made, trainer, seen = task(), TRAINER, list[dict[str, Tensor]]()

    def watched(student: nn.Module, teacher: nn.Module, inputs: tiny.Batch) -> Tensor:
        seen.append({name: t.clone() for name, t in inputs.items()})
        return made.loss.losses(student, inputs)

    how = tiny.Recover(steps=steps, lr=1e-2, ema=0.0)
    recovered(recover=how, loss_fn=watched)  # the batches, in order
    student = tiny.prune(made, tiny.Keep(blocks=KEPT)(made, trainer))
    optimizer = SGD(student.parameters(), lr=1e-2, momentum=0.9)
    schedule = StepLR(optimizer, 2, gamma=0.5) if scheduled else None
    for inputs in seen:
        made.loss.losses(student, inputs).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.step()
    return student.state_dict()


@pytest.mark.numerics
@pytest.mark.parametrize("scheduled", [False, True])
def test_it_trains_as_the_optimizer_and_the_scheduler_say(scheduled: bool) -> None:
    how = tiny.Recover(steps=6, lr=1e-2, schedule="constant", ema=0.0, clip=1e9)
    own: dict[str, Any] = {"scheduler": lambda optimizer, steps: StepLR(optimizer, 2, gamma=0.5)} if scheduled else {}
    found, expected = recovered(recover=how, optimizer=MOMENTUM, **own), by_hand(6, scheduled)
    before = task().teacher.state_dict()["blocks.7.linear.weight"]
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-5, atol=1e-7), name
    assert not torch.allclose(found["blocks.4.linear.weight"], before, atol=1e-4)


@pytest.mark.parametrize("scheduler", slow_but([None, cycle, halves], cycle))
@pytest.mark.parametrize("optimizer", [MOMENTUM, partial(RMSprop, momentum=0.5)])
def test_it_goes_on_bit_for_bit(
    tmp_path: Path, optimizer: Callable[..., Optimizer], scheduler: Callable[..., LRScheduler] | None
) -> None:
    own = {"optimizer": optimizer, "scheduler": scheduler}
    whole = recovered(first := tiny.RunFolder(tmp_path / "whole"), **own)
    run = tiny.RunFolder(tmp_path / "stopped")
    with pytest.raises(tiny.Interrupted, match="stopped at step 12"):
        recovered(run, loss=StopAt(), **own)
    assert_equal(recovered(run, **own), whole)
    assert lines(run) == lines(first)


def test_learning_rates_are_the_schedulers() -> None:
    seen = Seen()
    recovered(trainer=replace(told(seen), log_every=1), scheduler=cycle)
    rates = [values["lr"][0] for values in seen.logged]
    assert max(rates) == pytest.approx(0.1, rel=0.05)
    assert rates.index(max(rates)) == 5  # three tenths of the way
    assert rates[0] == pytest.approx(0.1 / 25)


def test_a_factory_may_make_groups_of_its_own() -> None:
    def slow(groups: list[dict[str, Any]]) -> Optimizer:
        return SGD([p for group in groups for p in group["params"]], lr=0.0)

    before = task().teacher.state_dict()
    for name, value in recovered(optimizer=slow).items():
        old = name.split(".")[1]
        assert torch.equal(value, before[name.replace(f".{old}.", f".{KEPT[int(old)]}.", 1)])


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    run = tiny.RunFolder(tmp_path / "run")
    recovered(run, optimizer=MOMENTUM, scheduler=cycle)
    with pytest.raises(
        tiny.UserError, match=r"^recover: the checkpoint was made with SGD and OneCycleLR, and now it is AdamW; give"
    ):
        recovered(run)


def test_what_is_no_optimizer_is_refused() -> None:
    with pytest.raises(tiny.UserError, match=r"^optimizer is '1e-3'; expected a function"):
        recovered(optimizer="1e-3")
    with pytest.raises(tiny.UserError, match=r"^optimizer returned a list; expected a torch\.optim\.Optimizer"):
        recovered(optimizer=list)
    with pytest.raises(tiny.UserError, match=r"^scheduler returned a ReduceLROnPlateau; expected .* by the step alone"):
        recovered(scheduler=lambda optimizer, steps: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer))


def test_a_loss_of_ones_own_sees_student_and_teacher() -> None:
    seen: list[tuple[int, int, bool, bool]] = []

    def features(student: nn.Module, teacher: nn.Module, inputs: tiny.Batch) -> Tensor:
        target = teacher(inputs["x"])
        seen.append((len(student.blocks), len(teacher.blocks), teacher.training, target.requires_grad))
        return (student(inputs["x"]) - target).square().mean(1)

    made = task()
    made.teacher.train()
    decision = tiny.Keep(blocks=KEPT)(made, TRAINER)
    student = RECOVER(made, tiny.prune(made, decision), decision, TRAINER, loss_fn=features)
    assert set(seen) == {(5, 8, False, False)}
    assert made.teacher.training
    assert all(p.requires_grad and p.grad is None for p in made.teacher.parameters())
    # The target of the task is the teacher's output, so its own loss does the same.
    for name, value in recovered().items():
        assert torch.allclose(student.state_dict()[name], value, atol=1e-5), name


def test_a_loss_of_ones_own_is_checked() -> None:
    def scalar(student: nn.Module, teacher: nn.Module, inputs: tiny.Batch) -> Tensor:
        return student(inputs["x"]).mean()

    with pytest.raises(tiny.UserError, match=r"^loss_fn \(of Recover\): returns the shape \[\] for 16 samples; return"):
        recovered(loss_fn=scalar)
    kd = replace(RECOVER, kd=tiny.OutputKD())
    with pytest.raises(tiny.UserError, match=r"^loss_fn stands in the place of kd, .*; leave one of them out"):
        recovered(recover=kd, loss_fn=scalar)
    fresh = tiny.Task(backbone=Planted(), loss=Match(), train=task().train, held_out=task().train)
    with pytest.raises(tiny.UserError, match=r"^loss_fn compares a student with its teacher; give the decision"):
        RECOVER(fresh, Planted().build(), None, TRAINER, loss_fn=scalar)
