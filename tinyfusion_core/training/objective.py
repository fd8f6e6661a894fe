"""What a stage minimises, and how its parameters are optimized."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel
from typing_extensions import override

from ..errors import UserError, worded
from ..protocols.backbone import Batch
from ..protocols.loss import Prediction, check_per_sample
from ..protocols.task import Task
from ..runtime.seeding import Rng


class Objective(nn.Module, ABC):
    """What a stage minimises. Everything differentiable happens in `forward`, inside what DDP or FSDP wraps.

    Attributes:
        blocks: the blocks of its network, each of which is sharded as one unit.
        gates: gate logits, replicated on every process; they must be the same everywhere.
        learning: whether the gates are updated in this step; if not, the optimizer skips them.
        terms: parts of the losses of the last forward pass, each (batch,); their means are logged.
        prediction: what its network predicted in the last forward pass, for objectives that go on from it.
    """

    blocks: Sequence[nn.Module] = ()
    gates: Sequence[nn.Parameter] = ()
    learning: bool = True
    terms: Mapping[str, Tensor] = {}
    prediction: Prediction = None

    @abstractmethod
    @override
    def forward(self, inputs: Batch, rng: Rng) -> tuple[Tensor, Tensor]:
        """Compute the loss.

        Args:
            inputs: prepared tensors by name, each (batch, ...).
            rng: random streams of this batch.

        Returns:
            The scalar to minimise, and the losses it came from, (batch,), detached.
        """

    def before_step(self, progress: float) -> None:
        """Set schedules to a point of the stage: 0 at the first step, 1 at the last."""

    def after_step(self, finite: bool) -> None:
        """Learn from a step besides its gradient; not from one whose loss or gradient was not finite."""

    def finished(self) -> bool:
        """Return whether to stop early; asked after every step, with the same answer on every process."""
        return False

    def metrics(self) -> dict[str, Any]:
        """Return what to log besides the loss and its terms."""
        return {}

    def frozen_modules(self) -> list[tuple[nn.Module, Sequence[nn.Module]]]:
        """Return the networks that it runs without training them, each as (module whose call runs it, its blocks)."""
        return []


class PlainLoss(Objective):
    """The mean training loss.

    Args:
        model: the network to train.
        task: the objective, and where the network's blocks are.
    """

    def __init__(self, model: nn.Module, task: Task) -> None:
        super().__init__()
        self.model, self.loss = model, task.loss
        self.blocks = [model.get_submodule(path) for path in task.backbone.block_paths(model)]

    @override
    def forward(self, inputs: Batch, rng: Rng) -> tuple[Tensor, Tensor]:
        self.prediction = self.loss.predict(self.model, inputs)
        losses = self.loss.per_sample(self.loss.loss(self.prediction, inputs), inputs)
        return losses.mean(), losses.detach()


LossFunction = Callable[[nn.Module, nn.Module, Batch], Tensor]
"""(student, teacher, inputs) -> losses, (batch,)."""


class FunctionLoss(PlainLoss):
    """The mean of what a function returns for student and teacher.

    Args:
        model: the student.
        task: has the teacher.
        function: the function.
    """

    def __init__(self, model: nn.Module, task: Task, function: LossFunction) -> None:
        super().__init__(model, task)
        blocks = [task.teacher.get_submodule(path) for path in task.backbone.block_paths(task.teacher)]
        self.unregistered = [(task.teacher, blocks)], function  # in a tuple nobody averages or saves the teacher

    @override
    def frozen_modules(self) -> list[tuple[nn.Module, Sequence[nn.Module]]]:
        return list(self.unregistered[0])

    @override
    def forward(self, inputs: Batch, rng: Rng) -> tuple[Tensor, Tensor]:
        ((teacher, _),), function = self.unregistered
        losses = check_per_sample(function(self.model, teacher, inputs), inputs, "loss_fn (of Recover)")
        return losses.mean(), losses.detach()


@dataclass(frozen=True)
class Ema:
    """An exponential moving average of a module in training.

    Args:
        source: the module.
        decay: weight of the past at each step.
    """

    source: nn.Module
    decay: float

    @cached_property
    def average(self) -> AveragedModel:
        """The averaged copy, in `.module`, and the count. Made on first use, which must be outside gating."""
        return AveragedModel(self.source)

    @torch.no_grad()
    def update(self) -> None:
        """Take the source's values into the average, which begins with those of the first call.

        As `AveragedModel` does it, whose count would be read from the device twice: here it stays in main memory.
        """
        copy, count = self.average.module, self.average.n_averaged
        averaged: list[Tensor] = [*copy.parameters()]
        values: list[Tensor] = [*self.source.parameters()]
        if count:
            torch._foreach_lerp_(averaged, values, 1 - self.decay)
        else:
            torch._foreach_copy_(averaged, values)
        for of_copy, of_source in zip(copy.buffers(), self.source.buffers(), strict=True):
            of_copy.copy_(of_source)
        count += 1


MakeOptimizer = Callable[[list[dict[str, Any]]], Optimizer]
"""Makes the optimizer of parameter groups, each with `params`, `lr` and `weight_decay`."""
MakeScheduler = Callable[[Optimizer, int], LRScheduler]
"""Makes what sets the learning rates, of the optimizer and the number of steps."""


def _adamw(groups: list[dict[str, Any]]) -> Optimizer:
    return AdamW(groups, weight_decay=0.0)


@dataclass(frozen=True, kw_only=True)
class Optimization:
    """How the parameters of a stage are optimized.

    Args:
        groups: parameter groups; each has its own `lr` and may have its own `weight_decay`.
        steps: optimizer updates.
        horizon: updates that schedules are laid out over, beyond which they stay as they end; None: all.
        schedule: factor on every learning rate, as a function of the progress from 0 to 1.
        optimizer: makes the optimizer of the groups.
        scheduler: makes what sets the learning rates in place of `schedule`, of the optimizer and the horizon.
        clip: largest norm of the gradient over all groups.
        ema: average to keep.
    """

    groups: Sequence[Mapping[str, Any]]
    steps: int
    horizon: int | None = None
    schedule: Callable[[float], float] = lambda progress: 1.0
    optimizer: MakeOptimizer = _adamw
    scheduler: MakeScheduler | None = None
    clip: float = 1.0
    ema: Ema | None = None

    def make(self, groups: list[dict[str, Any]]) -> tuple[Optimizer, LRScheduler | None]:
        """Return the optimizer of parameter groups, and its scheduler, if it has one.

        Each group of the optimizer gets a `base_lr`, the rate that `schedule` is a factor on.

        Raises:
            UserError: a factory has returned something else.
        """
        made = self.optimizer(groups)
        _check_made("optimizer", made, isinstance(made, Optimizer), "a torch.optim.Optimizer")
        for group in made.param_groups:
            group["base_lr"] = group["lr"]
        if self.scheduler is None:
            return made, None
        scheduler = self.scheduler(made, self.horizon or self.steps)
        fits = isinstance(scheduler, LRScheduler) and not isinstance(scheduler, ReduceLROnPlateau)
        _check_made("scheduler", scheduler, fits, "an LRScheduler of torch that goes by the step alone")
        return made, scheduler

    def progress(self, step: int) -> float:
        """Return the progress of a step: 0 for the first, 1 for the last of the horizon and all after it."""
        return min(1.0, step / max(1, (self.horizon or self.steps) - 1))


def _check_made(factory: str, made: object, fits: bool, expected: str) -> None:
    if not fits:
        raise UserError(f"{factory} returned a {type(made).__name__}; expected {expected}")


def parameter_groups(
    weights: Sequence[nn.Parameter], near: Sequence[nn.Module], lr: float, near_lr: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Return weights as groups of one learning rate.

    Args:
        weights: the weights, of any shape.
        near: modules whose weights have another rate.
        lr: learning rate.
        near_lr: factor on the rate of those.
        weight_decay: that of all.
    """
    apart = {id(p) for module in near for p in module.parameters()} if near_lr != 1 else set()
    parts = (lr, [p for p in weights if id(p) not in apart]), (lr * near_lr, [p for p in weights if id(p) in apart])
    return [{"params": part, "lr": rate, "weight_decay": weight_decay} for rate, part in parts if part]


def cosine(final: float) -> Callable[[float], float]:
    """Return a schedule that falls from 1 to `final` along half a cosine."""
    return lambda progress: final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


def warmed(schedule: Callable[[float], float], steps: int, warmup: float) -> Callable[[float], float]:
    """Return a schedule that rises linearly for a fraction of the steps and then runs through another one.

    Args:
        schedule: what follows; a function of the progress from 0 to 1.
        steps: updates of the stage.
        warmup: the fraction.
    """
    num = round(warmup * steps)

    def factor(progress: float) -> float:
        step = round(progress * (steps - 1))
        return (step + 1) / (num + 1) if step < num else schedule((step - num) / max(1, steps - 1 - num))

    return factor if num else schedule


def ema_decay(stage: str, steps: int, given: float | None = None, horizon: int | None = None) -> float:
    """Return the decay of a stage's average: by default over about a tenth of its steps, 0.999 for 10,000.

    Args:
        stage: name of the stage, for a warning if the average reaches further back than the stage is long.
        steps: optimizer updates of the stage.
        given: the decay in its settings.
        horizon: the steps that the default is of; None: all.
    """
    decay = max(0.0, 1 - 10 / (horizon or steps)) if given is None else given
    if (reach := 1 / (1 - decay)) > steps:
        warnings.warn(
            worded(
                f"{stage}.ema: {decay:.9g} averages over the last {reach:,.0f} steps, and there are {steps:,}: the "
                f"result lags behind; {'leave it out' if horizon is None else 'give a smaller one'}"
            ),
            stacklevel=2,
        )
    return decay
