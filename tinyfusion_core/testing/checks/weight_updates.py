"""Checks of a weight update: what it yields is what is trained, and the network is restored bit for bit."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...errors import UserError
from ...pruning.weight_update import WeightUpdate
from ..assertions import expect, expect_close, expect_same
from ..small_network import changes, modes_of, small_task, values_of
from ..subject import made


@dataclass(frozen=True)
class UpdateSubject:
    """A weight update to check: an instance."""

    update: WeightUpdate

    @classmethod
    def of(cls, thing: Any) -> UpdateSubject:
        """Return the subject; of a class, `tiny()`, or an instance without options."""
        return cls(made(thing)[0])

    @property
    def name(self) -> str:
        """Name of its class, for messages."""
        return type(self.update).__name__


class _Stop(Exception):
    """Raised to leave a context by an exception."""


def check_undone(subject: UpdateSubject) -> None:
    """The network is restored after training or an exception: values, types, gradients, flags, hooks."""
    task = small_task()
    values, modes = values_of(task.teacher), modes_of(task.teacher)
    for after, error in (("training", None), ("an exception", _Stop)):
        with suppress(_Stop), subject.update.applied(task.teacher, task.blocks) as weights:
            with torch.no_grad():
                for p in weights:
                    p.add_(1.0)
            loss = _loss(task.teacher)
            if loss.requires_grad:
                loss.backward()  # type: ignore[no-untyped-call]
            if error is not None:
                raise error
        message = f"{subject.name} changes the network, after {after}"
        expect_same(values, values_of(task.teacher), message)
        changed = changes(modes, modes_of(task.teacher))
        expect(not changed, f"{message}: {', '.join(changed[:3])}")


def check_updated_weights(subject: UpdateSubject) -> None:
    """It yields exactly the parameters of the network that require a gradient; the loss has a gradient to each."""
    task = small_task()
    before = _loss(task.teacher).detach()
    with subject.update.applied(task.teacher, task.blocks) as weights:
        same = torch.equal(_loss(task.teacher).detach(), before)
        expect(same, f"{subject.name} changes what the network gives before it has learned anything")
        yielded = {id(p) for p in weights}
        differ = [n for n, p in task.teacher.named_parameters() if (id(p) in yielded) != p.requires_grad]
        expect(not differ, f"{subject.name} yields other weights than those that require a gradient: {differ[:3]}")
        loss = _loss(task.teacher)
        if weights:
            loss.backward()  # type: ignore[no-untyped-call]
        expect(all(p.grad is not None for p in weights), f"{subject.name} yields weights without a gradient")


def check_stays(subject: UpdateSubject) -> None:
    """What is trained in `merged` stays: the network gives what it gave, and has its own modules; or it refuses."""
    task = small_task()
    modes = modes_of(task.teacher)
    try:
        with subject.update.merged(task.teacher, task.blocks) as weights:
            with torch.no_grad():
                for p in weights:
                    p.add_(0.25)
            trained = _loss(task.teacher).detach()
    except UserError:
        return
    found = _loss(task.teacher).detach()
    expect_close(found, trained, 1e-5, f"{subject.name} does not keep what it has learned", float(trained))
    changed = changes(modes, modes_of(task.teacher))
    expect(not changed, f"{subject.name} leaves the network changed, after merging: {', '.join(changed[:3])}")


UPDATE_CHECKS = (check_undone, check_updated_weights, check_stays)


def _loss(model: nn.Module) -> torch.Tensor:
    task = small_task()
    return task.loss.losses(model, task.train.__getitems__([0, 1, 2, 3])).mean()
