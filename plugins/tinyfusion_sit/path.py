"""Paths from noise to data, and what a network on them can predict: velocity, noise or score.

Formulas: SiT (arXiv:2401.08740, sections 2 and 3, appendix), stochastic interpolants (arXiv:2303.08797).

Notation: x_0 is noise (t = 0) and x_1 data (t = 1); x_t = alpha x_1 + sigma x_0, with alpha, sigma and their
time derivatives functions of t. The velocity of the probability flow is v; the score is that of the density of x_t.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

PathName = Literal["linear", "gvp", "vp"]
Prediction = Literal["velocity", "noise", "score"]


@dataclass(frozen=True)
class Coefficients:
    """The coefficients alpha, sigma and their time derivatives, each of the shape of t."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor

    @property
    def growth(self) -> Tensor:
        """The ratio alpha' / alpha, of the same shape as t: the drift of the flow is growth x + diffusion score."""
        return self.d_alpha / self.alpha

    @property
    def diffusion(self) -> Tensor:
        """The coefficient alpha' sigma^2 / alpha - sigma sigma', of the same shape as t."""
        return self.growth * self.sigma.square() - self.sigma * self.d_sigma

    def velocity(self, prediction: Prediction, output: Tensor, x: Tensor) -> Tensor:
        """Convert a network's output to the velocity at x.

        Args:
            prediction: what the output is.
            output: (batch, ...) of the network.
            x: (batch, ...) the point.

        Returns:
            (batch, ...)
        """
        if prediction == "velocity":
            return output
        return self.growth * x + self.diffusion * self.score(prediction, output, x)

    def score(self, prediction: Prediction, output: Tensor, x: Tensor) -> Tensor:
        """Convert a network's output to the score at x.

        Args:
            prediction: what the output is.
            output: (batch, ...) of the network.
            x: (batch, ...) the point.

        Returns:
            (batch, ...)
        """
        if prediction == "score":
            return output
        if prediction == "noise":
            return -output / self.sigma
        ratio = self.alpha / self.d_alpha
        return (ratio * output - x) / (self.sigma.square() - ratio * self.d_sigma * self.sigma)


def coefficients(path: PathName, t: Tensor) -> Coefficients:
    """Return the coefficients of a path at times t of any shape, in their dtype."""
    return _PATHS[path](t)


def interval(path: PathName, prediction: Prediction, sampling: bool) -> tuple[float, float]:
    """Return the range of times; where a formula divides by zero at an end, a little is cut off, as published."""
    if path == "vp":
        return 0.0, 1 - (1e-3 if sampling else 1e-5)
    return (0.0, 1.0) if prediction == "velocity" else (1e-3, 1 - 1e-3)


def _linear(t: Tensor) -> Coefficients:
    return Coefficients(t, 1 - t, torch.ones_like(t), -torch.ones_like(t))


def _gvp(t: Tensor) -> Coefficients:
    angle = t * math.pi / 2
    return Coefficients(angle.sin(), angle.cos(), angle.cos() * math.pi / 2, -angle.sin() * math.pi / 2)


def _vp(t: Tensor) -> Coefficients:
    """The variance-preserving diffusion with rates from 0.1 (at the data) to 20."""
    low, high = 0.1, 20.0
    log_alpha = -0.25 * (1 - t).square() * (high - low) - 0.5 * (1 - t) * low
    d_log_alpha = 0.5 * (1 - t) * (high - low) + 0.5 * low
    sigma = (-torch.expm1(2 * log_alpha)).sqrt()
    return Coefficients(
        log_alpha.exp(), sigma, log_alpha.exp() * d_log_alpha, -(2 * log_alpha).exp() * d_log_alpha / sigma
    )


_PATHS: dict[str, Callable[[Tensor], Coefficients]] = {"linear": _linear, "gvp": _gvp, "vp": _vp}
