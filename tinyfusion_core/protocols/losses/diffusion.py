"""What objectives of diffusion and flows share: the part of a process that they train, and how they weigh it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from ...errors import require
from ...runtime.files import NEUTRAL
from ..loss import LossAdapter


@dataclass(frozen=True, kw_only=True)
class DiffusionLoss(LossAdapter):
    """An objective that takes samples at random times of a process, which it counts from 0 to 1.

    Args:
        time: distribution of times: "uniform", or "logit_normal", the sigmoid of a normal number (arXiv:2403.03206).
        mean: mean of the normal number.
        std: standard deviation of the normal number.
        times: the part of the process that is trained and judged, for networks that are experts of one.
        min_snr: weigh an error as that of the clean sample, times the signal-to-noise ratio, of which this is the most
            (arXiv:2303.09556 takes 5); null leaves errors as they are.
    """

    time: Literal["uniform", "logit_normal"] = field(default="uniform", metadata={NEUTRAL: "uniform"})
    mean: float = field(default=0.0, metadata={NEUTRAL: 0.0})
    std: float = field(default=1.0, metadata={NEUTRAL: 1.0})
    times: Sequence[float] = field(default=(0.0, 1.0), metadata={NEUTRAL: [0.0, 1.0]})
    min_snr: float | None = field(default=None, metadata={NEUTRAL: None})

    def __post_init__(self) -> None:
        require(self.std > 0, "loss.std", self.std, "a deviation above 0")
        fit = len(self.times) == 2 and 0 <= self.times[0] < self.times[1] <= 1
        require(fit, "loss.times", list(self.times), "[from, to] between 0 and 1")
        require(self.min_snr is None or self.min_snr > 0, "loss.min_snr", self.min_snr, "a ratio above 0, or null")

    @property
    @override
    def generates(self) -> bool:
        return super().generates and self.whole

    @property
    @override
    def makes_data(self) -> bool:
        return super().makes_data and self.whole

    @property
    def whole(self) -> bool:
        """Whether all of the process is trained: an expert of a part generates nothing alone."""
        return tuple(self.times) == (0.0, 1.0)

    def drawn(self, u: Tensor) -> Tensor:
        """Return times for uniform numbers of [0, 1), of any shape, which may be stratified."""
        low, high = map(self._share, self.times)
        u = low + (high - low) * u
        normal = math.sqrt(2) * torch.erfinv(2 * u - 1)
        return u if self.time == "uniform" else torch.sigmoid(self.mean + self.std * normal)

    def _share(self, t: float) -> float:
        """How probable an earlier time is in the whole process."""
        if self.time == "uniform" or t in (0, 1):
            return t
        return (1 + math.erf((math.log(t / (1 - t)) - self.mean) / self.std / math.sqrt(2))) / 2

    def weigh(self, errors: Tensor, signal: Tensor, noise: Tensor, clean: Tensor) -> Tensor:
        """Weigh squared errors by `min_snr`, if it is set.

        Args:
            errors: (batch,) mean squared errors of what the network predicts.
            signal: (batch,) how much of the clean sample is in the noisy one.
            noise: (batch,) how much of the noise.
            clean: (batch,) what an error of the prediction is multiplied by to be one of the clean sample.
        """
        ratio = (signal / noise.clamp(min=1e-12)).square().clamp(max=self.min_snr or math.inf)
        return errors if self.min_snr is None else errors * (ratio * clean.square()).to(errors)
