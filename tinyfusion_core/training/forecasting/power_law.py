"""What a network lacks falls as a power of the steps it is trained: a line through what was measured, in logarithms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class PowerLaw(NamedTuple):
    """Power laws of the same steps, one a row: `exp(middle) * (steps / exp(middle_steps)) ** exponent`.

    Attributes:
        middle_steps: mean logarithm of the steps that were measured.
        middle: (rows,) mean logarithm of what was lacking there.
        exponent: (rows,) none above 0: what does not fall stays.
    """

    middle_steps: float
    middle: Tensor
    exponent: Tensor

    @classmethod
    def through(cls, steps: Sequence[float], lacking: Tensor) -> PowerLaw:
        """Fit by least squares, in logarithms.

        Args:
            steps: (lengths,) steps, above 0.
            lacking: (rows, lengths) what was lacking after them; as good as nothing where it is not above 0.
        """
        x = torch.tensor(steps, dtype=torch.float64).log()
        y = lacking.clamp(min=1e-12).log()
        spread = (x - x.mean()).square().sum().clamp(min=1e-12)
        slope = (((x - x.mean()) * (y - y.mean(1, keepdim=True))).sum(1) / spread).clamp(max=0)
        return cls(float(x.mean()), y.mean(1), slope)

    def after(self, steps: float) -> Tensor:
        """Return what is lacking after so many steps, (rows,)."""
        return (self.middle + self.exponent * (math.log(steps) - self.middle_steps)).exp()
