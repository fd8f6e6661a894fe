"""Gaussian diffusion: training loss, distillation distance and samplers.

Formulas: DDPM (arXiv 2006.11239), improved DDPM (2102.09672: learned-range variance, hybrid loss, respacing),
DDIM (2010.02502), classifier-free guidance (2207.12598), distillation of the variance (TinyFusion, 2412.01199).

Notation: A is the cumulative product of 1 - beta, c1 and c2 weigh x_0 and x_t in the posterior mean,
e is the predicted noise and v the raw variance output. Shapes: B batch, C channels, K kept steps.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tinyfusion_core.backbone import Batch
from tinyfusion_core.errors import UserError
from tinyfusion_core.losses import LossAdapter
from tinyfusion_core.randomness import Rng

Table = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class GaussianDiffusion(LossAdapter):
    """Noise prediction on a linear schedule, as DiT (arXiv 2212.09748) trains and samples.

    Args:
        learn_sigma: whether the network predicts the variance too, trained by the variational bound.
            Without it the loss is the noise error alone, and samples use the posterior's variance.
        num_timesteps: length of the process.
        label_drop: probability of replacing a label by the null class while training.
        sampler: "ddpm" (ancestral) or "ddim" (deterministic).
        sampling_steps: network calls per sample (doubled batches with guidance).
        spacing: which steps are kept: "even" from the first to the last one, "stride" at multiples of an integer.
        clip_denoised: clip the predicted x_0 to [-1, 1] while sampling; for data in that range.
        cfg_scale: classifier-free guidance scale; 1 is no guidance.
        guided_channels: number of channels that are guided; null for all. The published samples guide 3 of 4.
    """

    learn_sigma: bool = True
    num_timesteps: int = 1000
    label_drop: float = 0.1
    sampler: Literal["ddpm", "ddim"] = "ddpm"
    sampling_steps: int = 250
    spacing: Literal["even", "stride"] = "even"
    clip_denoised: bool = False
    cfg_scale: float = 1.0
    guided_channels: int | None = 3

    def __post_init__(self) -> None:
        if self.num_timesteps < 21:
            raise UserError(f"loss.num_timesteps is {self.num_timesteps}; the linear schedule needs at least 21")
        if not 2 <= self.sampling_steps <= self.num_timesteps:
            raise UserError(f"loss.sampling_steps is {self.sampling_steps}; expected 2 to {self.num_timesteps}")
        if not 0 <= self.label_drop <= 1:
            raise UserError(f"loss.label_drop is {self.label_drop}; expected a probability")

    def prepare(self, batch: Batch, rng: Rng) -> dict[str, Tensor]:
        """Noise the latents.

        Args:
            batch: `x` (B, C, H, W) clean, `y` (B,) labels, optionally `x_std` like `x`: then `x` is the mean of a
                latent that is drawn here.
            rng: streams "latent", "time", "noise" and "label_drop".

        Returns:
            `x_start`, `noise`, `x_t` like `x`; `t`, `y`, `drop` (whether to drop the label) of shape (B,).
        """
        x_start, num_rows = batch["x"], len(batch["x"])
        if "x_std" in batch:
            x_start = x_start + batch["x_std"] * rng.normal("latent", x_start)
        t = rng.integers("time", self.num_timesteps, num_rows).to(x_start.device)
        drop = (rng.uniform("label_drop", num_rows) < self.label_drop).to(x_start.device)
        noise = rng.normal("noise", x_start)
        x_t = self._process.diffuse(x_start, t, noise)
        return {"x_start": x_start, "noise": noise, "x_t": x_t, "t": t, "y": batch["y"], "drop": drop}

    def predict(self, model: nn.Module, inputs: Batch) -> Tensor:
        """`model(x_t, t, y)`, y being `model.null_class` where dropped -> (B, C or 2C, H, W)."""
        y = inputs["y"]
        if self.label_drop:
            y = y.masked_fill(inputs["drop"], model.null_class)  # type: ignore[arg-type]
        out: Tensor = model(inputs["x_t"], inputs["t"], y)
        return out

    def loss(self, prediction: Tensor, inputs: Batch) -> Tensor:
        """Mean squared noise error, plus the variational bound in bits per dimension, which trains only v."""
        e, v = self._split(prediction, inputs["x_t"])
        mse = _mean((inputs["noise"] - e).square())
        if v is None:
            return mse
        x_start, x_t, t = inputs["x_start"], inputs["x_t"], inputs["t"]
        return mse + self._bound(e, v, inputs, self._process.posterior(x_start, x_t, t))

    def distance(self, student: Tensor, teacher: Tensor, inputs: Batch) -> Tensor:
        """Mean squared difference of the noises, plus KL(teacher || student) of the reverse step in bits per dimension.

        As in TinyFusion, the KL trains only the student's v, and where t = 0 the student's likelihood stands in for it.
        """
        (e, v), (e_teacher, v_teacher) = (self._split(p, inputs["x_t"]) for p in (student, teacher))
        mse = _mean((e - e_teacher).square())
        if v is None:
            return mse
        target = self._process.reverse(e_teacher, v_teacher, inputs["x_t"], inputs["t"])
        return mse + self._bound(e, v, inputs, target[:2])

    def sample(self, model: nn.Module, like: Tensor, labels: Tensor, rng: Rng) -> Tensor:
        """(B, C, H, W) samples. Row i depends on its own streams alone: "x_T" and "sampling noise <step>"."""
        null = torch.full_like(labels, model.null_class) if self.cfg_scale != 1 else None  # type: ignore[arg-type]

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            if null is None:
                return model(x, t, labels)  # type: ignore[no-any-return]
            doubled = torch.cat([x, x]), torch.cat([t, t]), torch.cat([labels, null])
            guided = x.shape[1] if self.guided_channels is None else self.guided_channels
            return model.forward_with_cfg(*doubled, self.cfg_scale, guided)[: len(x)]  # type: ignore[operator, no-any-return]

        states = self.trajectory(denoise, rng.normal("x_T", like), lambda i: rng.normal(f"sampling noise {i}", like))
        with torch.no_grad():
            return deque(states, maxlen=1).pop()

    def trajectory(
        self, denoise: Callable[[Tensor, Tensor], Tensor], x: Tensor, noise: Callable[[int], Tensor]
    ) -> Iterator[Tensor]:
        """The states of the sampler, first to last.

        Written out here because the schedulers of diffusers draw their noise for whole batches (a sample would
        depend on its neighbours) and keep float32 tables; the tests check that they give the same numbers.

        Args:
            denoise: x (B, C, H, W), original time steps t (B,) -> network output.
            x: (B, C, H, W) the noise to start from.
            noise: index of the sampling step, counted from the first -> noise like `x`. DDIM draws none.
        """
        process = _process(self.num_timesteps, self.sampling_steps, self.spacing)
        for i, step in enumerate(range(self.sampling_steps - 1, -1, -1)):
            k = torch.full((len(x),), step, device=x.device)
            e, v = self._split(denoise(x, torch.full_like(k, int(process.steps[step]))), x)
            mean, log_variance, x_start = process.reverse(e, v, x, k, self.clip_denoised)
            if self.sampler == "ddim":
                x = process.ddim(x_start, x, k)
            else:
                x = mean + (0.5 * log_variance).exp() * noise(i) if step else mean
            yield x

    @property
    def _process(self) -> Process:
        return _process(self.num_timesteps, self.num_timesteps, "even")

    def _split(self, output: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Network output -> predicted noise, raw variance; in the precision of x."""
        channels = x.shape[1]
        if self.learn_sigma and output.shape[1] != 2 * channels:
            raise UserError(
                f"loss.learn_sigma is true, but the network has {output.shape[1]} output channels for {channels} "
                f"input channels (expected {2 * channels}); set loss.learn_sigma to what the network was built with"
            )
        output = output.to(x.dtype)
        return output[:, :channels], output[:, channels:] if self.learn_sigma else None

    def _bound(self, e: Tensor, v: Tensor, inputs: Batch, target: tuple[Tensor, Tensor]) -> Tensor:
        """(B,) KL(target || reverse step), where t = 0 the likelihood of x_0; bits per dimension. Trains only v."""
        mean, log_variance, _ = self._process.reverse(e.detach(), v, inputs["x_t"], inputs["t"])
        kl = _mean(normal_kl(*target, mean, log_variance))
        nll = -_mean(discretized_log_likelihood(inputs["x_start"], mean, 0.5 * log_variance))
        return torch.where(inputs["t"] == 0, nll, kl) / math.log(2)


@dataclass(frozen=True)
class Process:
    """A diffusion process of K steps, kept from a longer one.

    Args:
        steps: (K,) int64, the original indices, which the network is fed.
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
        """The process that has the same marginals at `steps` (sorted) as the one of `betas`."""
        kept = np.asarray(steps)
        a: Table = np.cumprod(1 - betas)[kept]
        betas = 1 - a / np.append(1.0, a[:-1])
        a = np.cumprod(1 - betas, dtype=np.float64)
        return cls(kept, betas, a, np.append(1.0, a[:-1]))

    @property
    def c1(self) -> Table:
        return self.betas * np.sqrt(self.a_prev) / (1 - self.a)

    @property
    def c2(self) -> Table:
        return (1 - self.a_prev) * np.sqrt(1 - self.betas) / (1 - self.a)

    @property
    def log_variance(self) -> Table:
        """Of the posterior. It is -inf at the first step; the second one's stands in."""
        variance = self.betas[1:] * (1 - self.a_prev[1:]) / (1 - self.a[1:])
        out: Table = np.log(np.append(variance[0], variance))
        return out

    def diffuse(self, x_start: Tensor, k: Tensor, noise: Tensor) -> Tensor:
        """x_t for the steps k (B,)."""
        return at(np.sqrt(self.a), k, x_start) * x_start + at(np.sqrt(1 - self.a), k, x_start) * noise

    def posterior(self, x_start: Tensor, x_t: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (B, C, H, W) and log-variance (B, 1, 1, 1) of q(x_{k-1} | x_k, x_0)."""
        return at(self.c1, k, x_t) * x_start + at(self.c2, k, x_t) * x_t, at(self.log_variance, k, x_t)

    def reverse(
        self, e: Tensor, v: Tensor | None, x_t: Tensor, k: Tensor, clip: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and log-variance of p(x_{k-1} | x_k), and the x_0 that e implies. No v: the posterior's variance."""
        x_start = at(np.sqrt(1 / self.a), k, x_t) * x_t - at(np.sqrt(1 / self.a - 1), k, x_t) * e
        if clip:
            x_start = x_start.clamp(-1, 1)
        mean, log_variance = self.posterior(x_start, x_t, k)
        if v is not None:
            share = (v + 1) / 2  # not clamped: v may leave [-1, 1]
            log_variance = share * at(np.log(self.betas), k, x_t) + (1 - share) * log_variance
        return mean, log_variance, x_start

    def ddim(self, x_start: Tensor, x_t: Tensor, k: Tensor) -> Tensor:
        """x_{k-1} without new noise, towards x_start."""
        e = (at(np.sqrt(1 / self.a), k, x_t) * x_t - x_start) / at(np.sqrt(1 / self.a - 1), k, x_t)
        a_prev = at(self.a_prev, k, x_t)
        return a_prev.sqrt() * x_start + (1 - a_prev).sqrt() * e


def linear_betas(num_timesteps: int) -> Table:
    """Variances from 1e-4 to 0.02 for 1000 steps, as much noise in all for any other number."""
    return np.linspace(0.1 / num_timesteps, 20 / num_timesteps, num_timesteps)


def even_steps(num_timesteps: int, *counts: int) -> list[int]:
    """Cut the steps into equal parts and keep counts[i] of the i-th, evenly and with both of its ends.

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
    """The multiples of the smallest integer of which there are exactly `count`.

    Raises:
        UserError: there is no such integer.
    """
    for stride in range(1, num_timesteps + 1):
        if len(steps := range(0, num_timesteps, stride)) == count:
            return list(steps)
    raise UserError(f"no integer stride keeps exactly {count} of {num_timesteps} time steps; set loss.spacing to even")


@cache
def _process(num_timesteps: int, count: int, spacing: str) -> Process:
    split = even_steps if spacing == "even" else strided_steps
    return Process.respaced(linear_betas(num_timesteps), split(num_timesteps, count))


def at(table: Table, k: Tensor, like: Tensor) -> Tensor:
    """(B, 1, ..., 1) entries of a table, with the rank and dtype of `like`. They are rounded to float32 on the way."""
    entries = torch.as_tensor(table, dtype=torch.float32, device=k.device)[k]
    return entries.to(like.dtype).view(-1, *[1] * (like.ndim - 1))


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """Elementwise KL(N1 || N2) of normal distributions, in nats."""
    distance = (mean1 - mean2).square() * (-log_variance2).exp()
    return 0.5 * (log_variance2 - log_variance1 - 1 + (log_variance1 - log_variance2).exp() + distance)


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Elementwise log-probability (nats) of the bin around x, of width 2 / 255, under a normal distribution.

    The outermost bins, from |x| = 0.999, reach to infinity. Probabilities are at least 1e-12.
    """
    centred, inverse_scale = x - mean, (-log_scale).exp()
    upper = approximate_cdf(inverse_scale * (centred + 1 / 255))
    lower = approximate_cdf(inverse_scale * (centred - 1 / 255))
    probability = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return probability.clamp(min=1e-12).log()


def approximate_cdf(z: Tensor) -> Tensor:
    """The tanh approximation of the standard normal distribution function."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def _mean(x: Tensor) -> Tensor:
    return x.flatten(1).mean(1)
