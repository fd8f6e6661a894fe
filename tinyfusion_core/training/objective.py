"""What a stage minimises, and how its parameters move."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from typing_extensions import override

from ..protocols.backbone import Batch
from ..runtime.seeding import Rng


class Objective(nn.Module, ABC):
    """What a stage minimises. Everything differentiable happens in `forward`, inside what DDP or FSDP wraps.

    Attributes:
        blocks: the blocks of the network in it, each of which is sharded as one.
        gates: parameters that every process keeps whole and that decide: they must be the same everywhere.
        learning: whether the gates move in this step; else the optimizer does not hear of them.
        terms: (B,) parts of the losses of the last forward pass, of which the means are recorded.
    """

    blocks: Sequence[nn.Module] = ()
    gates: Sequence[nn.Parameter] = ()
    learning: bool = True
    terms: Mapping[str, Tensor] = {}

    @abstractmethod
    @override
    def forward(self, inputs: Batch, rng: Rng) -> tuple[Tensor, Tensor]:
        """The scalar to minimise, and the (B,) losses it came from, detached."""

    def before_step(self, progress: float) -> None:
        """Move schedules to a point of the stage, 0 at the first step and 1 at the last."""

    def finished(self) -> bool:
        """Whether to stop before the last step; asked after every one, the same answer on every process."""
        return False

    def metrics(self) -> dict[str, Any]:
        """What to record at a logged step, besides the loss and its terms."""
        return {}

    def frozen_modules(self) -> list[tuple[nn.Module, Sequence[nn.Module]]]:
        """Networks that it runs and does not train, by the module whose call runs them, with their blocks."""
        return []


@dataclass(frozen=True)
class Ema:
    """An exponential moving average of a module that is being trained.

    Args:
        source: the module.
        decay: weight of the past at each step.
    """

    source: nn.Module
    decay: float

    @cached_property
    def average(self) -> AveragedModel:
        """Holds the averaged copy in `.module`. Made when first needed, which must be outside of gating."""
        return AveragedModel(self.source, multi_avg_fn=get_ema_multi_avg_fn(self.decay))  # type: ignore[no-untyped-call]


@dataclass(frozen=True, kw_only=True)
class Optimization:
    """How a stage's parameters move.

    Args:
        groups: AdamW parameter groups; each has its own `lr` and may have its own `weight_decay`.
        steps: optimizer updates.
        schedule: factor on every learning rate at a progress from 0 to 1.
        clip: largest norm of the gradient of all groups together.
        ema: average to keep.
    """

    groups: Sequence[Mapping[str, Any]]
    steps: int
    schedule: Callable[[float], float] = lambda progress: 1.0
    clip: float = 1.0
    ema: Ema | None = None

    def progress(self, step: int) -> float:
        """Where a step is in the stage: 0 at the first one, 1 at the last."""
        return step / max(1, self.steps - 1)


def cosine(final: float) -> Callable[[float], float]:
    """A schedule that falls from 1 to `final` along half a cosine."""
    return lambda progress: final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


def ema_decay(steps: int) -> float:
    """The decay of an average that looks back over a tenth of the steps: 0.999 for 10,000, 0.9999 for 100,000."""
    return max(0.0, 1 - 10 / steps)
