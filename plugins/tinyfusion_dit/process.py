"""A Gaussian diffusion process: its tables, its posterior, its reverse steps.

Formulas: DDPM (arXiv:2006.11239), improved DDPM (arXiv:2102.09672: learned-range variance, respacing), DDIM
(arXiv:2010.02502).

Notation: A is the cumulative product of 1 - beta, c1 and c2 weight x_0 and x_t in the posterior mean,
e is the predicted noise and v the raw variance output. K is the number of kept steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tinyfusion_core.errors import UserError
from tinyfusion_core.runtime.seeding import to_device

Table = NDArray[np.float64]


@dataclass(frozen=True)
class Process:
    """A diffusion process of K steps, a subset of a longer one.

    Args:
        steps: (K,) int64, the original indices, which the network is given.
        betas: (K,) noise variances.
        a: (K,) A.
        a_prev: (K,) A one step earlier, 1 before the first.
    """

    steps: NDArray[np.int64]
    betas: Table
    a: Table
    a_prev: Table

    @classmethod
    def respaced(cls, betas: Table, steps: Sequence[int]) -> Process:
        """Return the process with the marginals of `betas` at the sorted `steps` (improved DDPM, section 4)."""
        kept = np.asarray(steps)
        a: Table = np.cumprod(1 - betas)[kept]
        betas = 1 - a / np.append(1.0, a[:-1])
        a = np.cumprod(1 - betas, dtype=np.float64)
        return cls(kept, betas, a, np.append(1.0, a[:-1]))

    @property
    def c1(self) -> Table:
        """Weight of x_0 in the posterior mean, (K,) (DDPM, equation 7)."""
        return self.betas * np.sqrt(self.a_prev) / (1 - self.a)

    @property
    def c2(self) -> Table:
        """Weight of x_t in the posterior mean, (K,) (DDPM, equation 7)."""
        return (1 - self.a_prev) * np.sqrt(1 - self.betas) / (1 - self.a)

    @property
    def log_variance(self) -> Table:
        """Log-variance of the posterior, (K,); -inf at the first step, so that of the second is used there."""
        variance = self.betas[1:] * (1 - self.a_prev[1:]) / (1 - self.a[1:])
        out: Table = np.log(np.append(variance[0], variance))
        return out

    def diffuse(self, x_start: Tensor, k: Tensor, noise: Tensor) -> Tensor:
        """Noise clean samples to step k (DDPM, equation 4).

        Args:
            x_start: (batch, ...) clean samples.
            k: (batch,) steps.
            noise: standard normal noise of the same shape as `x_start`.

        Returns:
            (batch, ...) x_k.
        """
        return at(np.sqrt(self.a), k, x_start) * x_start + at(np.sqrt(1 - self.a), k, x_start) * noise

    def posterior(self, x_start: Tensor, x_t: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance of q(x_{k-1} | x_k, x_0) (DDPM, equation 7).

        Args:
            x_start: (batch, channels, height, width) x_0.
            x_t: x_k, of the same shape.
            k: (batch,) steps.

        Returns:
            Mean (batch, channels, height, width) and log-variance (batch, 1, 1, 1).
        """
        return at(self.c1, k, x_t) * x_start + at(self.c2, k, x_t) * x_t, at(self.log_variance, k, x_t)

    def reverse(
        self, e: Tensor, v: Tensor | None, x_t: Tensor, k: Tensor, clip: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean and log-variance of p(x_{k-1} | x_k), and the x_0 that e implies.

        Args:
            e: (batch, ...) predicted noise.
            v: raw variance output of the same shape (improved DDPM, equation 15); None uses the posterior's variance.
            x_t: x_k, of the same shape.
            k: (batch,) steps.
            clip: clip x_0 to [-1, 1].

        Returns:
            Three tensors of the same shape as `x_t`, or that broadcast to it.
        """
        x_start = at(np.sqrt(1 / self.a), k, x_t) * x_t - at(np.sqrt(1 / self.a - 1), k, x_t) * e
        if clip:
            x_start = x_start.clamp(-1, 1)
        mean, log_variance = self.posterior(x_start, x_t, k)
        if v is not None:
            share = (v + 1) / 2  # not clamped: v may leave [-1, 1]
            log_variance = share * at(np.log(self.betas), k, x_t) + (1 - share) * log_variance
        return mean, log_variance, x_start

    def ddim(self, x_start: Tensor, x_t: Tensor, k: Tensor) -> Tensor:
        """Return x_{k-1}, (batch, ...), without new noise (DDIM, equation 12 with sigma = 0).

        Args:
            x_start: (batch, ...) predicted x_0.
            x_t: x_k, of the same shape.
            k: (batch,) steps.
        """
        e = (at(np.sqrt(1 / self.a), k, x_t) * x_t - x_start) / at(np.sqrt(1 / self.a - 1), k, x_t)
        a_prev = at(self.a_prev, k, x_t)
        return a_prev.sqrt() * x_start + (1 - a_prev).sqrt() * e


def linear_betas(num_timesteps: int) -> Table:
    """Return variances from 1e-4 to 0.02 for 1000 steps, scaled for other numbers of steps."""
    return np.linspace(0.1 / num_timesteps, 20 / num_timesteps, num_timesteps)


def cosine_betas(num_timesteps: int) -> Table:
    """Return variances for which A falls like a squared cosine (improved DDPM, equation 17), at most 0.999."""
    u = np.arange(num_timesteps + 1) / num_timesteps
    a = np.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    out: Table = np.minimum(1 - a[1:] / a[:-1], 0.999)
    return out


def even_steps(num_timesteps: int, *counts: int) -> list[int]:
    """Cut the steps into equal parts and keep counts[i] of the i-th, evenly spaced, with both of its ends.

    Raises:
        UserError: a part is shorter than its count.
    """
    steps: list[int] = []
    start = 0
    for i, count in enumerate(counts):
        size = num_timesteps // len(counts) + (i < num_timesteps % len(counts))
        if count > size:
            raise UserError(f"cannot keep {count} of {size} time steps")
        position, stride = 0.0, (size - 1) / max(count - 1, 1)
        for _ in range(count):
            steps.append(start + round(position))
            position += stride  # added up, not multiplied: rounding at the halves depends on it
        start += size
    return steps


def strided_steps(num_timesteps: int, count: int) -> list[int]:
    """Return the multiples of the smallest integer that has exactly `count` multiples below `num_timesteps`.

    Raises:
        UserError: there is no such integer.
    """
    for stride in range(1, num_timesteps + 1):
        if len(steps := range(0, num_timesteps, stride)) == count:
            return list(steps)
    raise UserError(f"no integer stride keeps exactly {count} of {num_timesteps} time steps; set loss.spacing to even")


def at(table: Table, k: Tensor, like: Tensor) -> Tensor:
    """Look up entries of a table; they are rounded to float32 on the way.

    Args:
        table: (K,) values.
        k: (batch,) indices.
        like: (batch, ...) gives rank and dtype.

    Returns:
        (batch, 1, ..., 1)
    """
    entries = to_device(torch.as_tensor(table), k.device, torch.float32)[k]
    return entries.to(like.dtype).view(-1, *[1] * (like.ndim - 1))


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """Compute elementwise KL(N1 || N2) of normal distributions in nats; all tensors broadcast to the same shape."""
    distance = (mean1 - mean2).square() * (-log_variance2).exp()
    return 0.5 * (log_variance2 - log_variance1 - 1 + (log_variance1 - log_variance2).exp() + distance)


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Compute the elementwise log-probability, in nats, of the bin around x under a normal distribution.

    Bins have width 2 / 255; the outermost ones, from |x| = 0.999, extend to infinity (DDPM, equation 13).
    Probabilities are at least 1e-12. All tensors broadcast to the same shape.
    """
    centred, inverse_scale = x - mean, (-log_scale).exp()
    upper = approximate_cdf(inverse_scale * (centred + 1 / 255))
    lower = approximate_cdf(inverse_scale * (centred - 1 / 255))
    probability = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return probability.clamp(min=1e-12).log()


def approximate_cdf(z: Tensor) -> Tensor:
    """Return the tanh approximation of the standard normal distribution function of numbers of any shape."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
