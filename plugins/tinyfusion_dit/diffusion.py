"""Gaussian diffusion: training loss, distillation distance and samplers.

Formulas: DDPM (arXiv:2006.11239), improved DDPM (arXiv:2102.09672: learned-range variance, hybrid loss, respacing),
DDIM (arXiv:2010.02502), classifier-free guidance (arXiv:2207.12598), distillation of the variance (TinyFusion,
arXiv:2412.01199).

Notation: A is the cumulative product of 1 - beta, c1 and c2 weight x_0 and x_t in the posterior mean, e is the
predicted noise and v the raw variance output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from tinyfusion_core.errors import UserError
from tinyfusion_core.protocols.backbone import Batch
from tinyfusion_core.protocols.losses.diffusion import DiffusionLoss
from tinyfusion_core.runtime.seeding import Rng, to_device
from tinyfusion_dit.conditional import (
    check_options,
    draw_label_drop,
    draw_latents,
    guided_network,
    last,
    run_network,
    sample_mean,
)
from tinyfusion_dit.process import (
    Process,
    cosine_betas,
    discretized_log_likelihood,
    even_steps,
    linear_betas,
    normal_kl,
    strided_steps,
)


@dataclass(frozen=True, kw_only=True)
class GaussianDiffusion(DiffusionLoss):
    """Noise prediction, as DiT (arXiv:2212.09748) trains and samples.

    Args:
        learn_sigma: whether the network also predicts the variance, trained by the variational bound.
            Without it the loss is the noise error alone, and samples use the posterior's variance.
        num_timesteps: length of the process.
        schedule: noise schedule: "linear" variances, as in DiT, or "cosine" (arXiv:2102.09672).
        label_drop: probability of replacing a label by the null class in training.
        sampler: "ddpm" (ancestral) or "ddim" (deterministic).
        sampling_steps: network calls per sample (doubled batches with guidance).
        spacing: which steps are kept: "even" from the first to the last one, "stride" at multiples of an integer.
        clip_denoised: clip the predicted x_0 to [-1, 1] while sampling; for data in that range.
        cfg_scale: classifier-free guidance scale; 1 is no guidance.
        guided_channels: number of channels that are guided; null for all. The published samples guide 3 of 4.
        time: distribution of times, of which 1 is pure noise; see `DiffusionLoss`, also for the options below.
    """

    learn_sigma: bool = True
    num_timesteps: int = 1000
    schedule: Literal["linear", "cosine"] = "linear"
    label_drop: float = 0.1
    sampler: Literal["ddpm", "ddim"] = "ddpm"
    sampling_steps: int = 250
    spacing: Literal["even", "stride"] = "even"
    clip_denoised: bool = False
    cfg_scale: float = 1.0
    guided_channels: int | None = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_timesteps < 21 and self.schedule == "linear":
            raise UserError(f"loss.num_timesteps is {self.num_timesteps}; the linear schedule needs at least 21")
        if not 2 <= self.sampling_steps <= self.num_timesteps:
            raise UserError(f"loss.sampling_steps is {self.sampling_steps}; expected 2 to {self.num_timesteps}")
        check_options(self.label_drop, self.guided_channels)
        _ = self._sampling_process  # raises when there is no such spacing

    @override
    def sampling_options(self) -> frozenset[str]:
        return frozenset({"sampler", "sampling_steps", "spacing", "clip_denoised", "cfg_scale", "guided_channels"})

    @override
    def prepare(self, batch: Batch, rng: Rng) -> dict[str, Tensor]:
        """Noise the latents.

        Args:
            batch: `x` (batch, channels, height, width) clean, `y` (batch,) labels, optionally `x_std` of the same shape
                as `x`: then `x` is the mean of a latent that is drawn here.
            rng: streams "latent", "time", "noise" and "label_drop".

        Returns:
            `x_start`, `noise`, `x_t` of the same shape as `x`; `t`, `y`, `drop` (whether to drop the label), (batch,).
        """
        x_start = draw_latents(batch, rng)
        t = to_device(self.steps(rng.uniform("time", len(x_start))), x_start.device)
        drop = draw_label_drop(batch, rng, self.label_drop)
        return {**self.place(x_start, rng.normal("noise", x_start), t), "y": batch["y"], "drop": drop}

    def steps(self, u: Tensor) -> Tensor:
        """Return time steps, int64, for uniform numbers of [0, 1), of any shape."""
        return (self.drawn(u) * self.num_timesteps).long().clamp(max=self.num_timesteps - 1)

    def place(self, x_start: Tensor, noise: Tensor, t: Tensor) -> dict[str, Tensor]:
        """Noise clean latents to given time steps.

        Args:
            x_start: (batch, channels, height, width) clean latents.
            noise: standard normal noise of the same shape.
            t: (batch,) time steps.

        Returns:
            What `loss` and `distance` need: `x_start`, `noise`, `x_t`, `t`.
        """
        return {"x_start": x_start, "noise": noise, "x_t": self._process.diffuse(x_start, t, noise), "t": t}

    @override
    def prepare_clean(self, batch: Batch, rng: Rng) -> dict[str, Tensor]:
        """Return latents without noise or dropped labels, at time steps from the first 250.

        The reference script counts the 250 steps of a respaced process and feeds the counts to the network unchanged.

        Args:
            batch: as in `prepare`.
            rng: streams "latent" and "time".

        Returns:
            `x_t` (batch, channels, height, width); `t`, `y`, `drop`, (batch,).
        """
        x = draw_latents(batch, rng)
        t = to_device(rng.integers("time", min(250, self.num_timesteps), len(x)), x.device)
        return {"x_t": x, "t": t, "y": batch["y"], "drop": torch.zeros_like(t, dtype=torch.bool)}

    @override
    def predict(self, model: nn.Module, inputs: Batch) -> Tensor:
        """Run `model(x_t, t, y)`, with `model.null_class` where dropped -> (batch, C or 2C, height, width)."""
        return run_network(model, inputs, self.label_drop)

    @override
    def loss(self, prediction: Tensor, inputs: Batch) -> Tensor:
        """Compute the mean squared noise error, plus the variational bound in bits per dimension, (batch,).

        The bound trains only v (improved DDPM, L_hybrid).
        """
        e, v = self._split(prediction, inputs["x_t"])
        mse = self._weighed(sample_mean((inputs["noise"] - e).square()), inputs["t"])
        if v is None:
            return mse
        x_start, x_t, t = inputs["x_start"], inputs["x_t"], inputs["t"]
        return mse + self._bound(e, v, inputs, self._process.posterior(x_start, x_t, t))

    @override
    def distance(self, student: Tensor, teacher: Tensor, inputs: Batch) -> Tensor:
        """Compute the mean squared noise difference, plus KL(teacher || student) of the reverse step, (batch,).

        The KL is in bits per dimension. As in TinyFusion, it trains only the student's v, and at t = 0 the student's
        likelihood replaces it.
        """
        (e, v), (e_teacher, v_teacher) = (self._split(p, inputs["x_t"]) for p in (student, teacher))
        mse = self._weighed(sample_mean((e - e_teacher).square()), inputs["t"])
        if v is None:
            return mse
        target = self._process.reverse(e_teacher, v_teacher, inputs["x_t"], inputs["t"])
        return mse + self._bound(e, v, inputs, target[:2])

    @override
    def sample(self, model: nn.Module, like: Tensor, conditions: Tensor, rng: Rng) -> Tensor:
        """Sample (batch, channels, height, width). Row i uses only its streams "x_T" and "sampling noise <step>"."""
        denoise = guided_network(model, conditions, self.cfg_scale, self.guided_channels)
        states = self.trajectory(denoise, rng.normal("x_T", like), lambda i: rng.normal(f"sampling noise {i}", like))
        return last(states)

    def trajectory(
        self, denoise: Callable[[Tensor, Tensor], Tensor], x: Tensor, noise: Callable[[int], Tensor]
    ) -> Iterator[Tensor]:
        """Yield the states of the sampler, first to last, each (batch, channels, height, width).

        It is implemented here because the schedulers of diffusers reproduce the published numbers in one case of four:
        their DDIM steps back by a constant stride, which is wrong for evenly spaced steps, and their learned-range DDPM
        uses the variances of the unspaced process. They also draw noise for whole batches, so that a sample would
        depend on its neighbours. Where they are correct, the tests check that both agree.

        Args:
            denoise: x (batch, channels, height, width), original time steps t (batch,) -> network output.
            x: (batch, channels, height, width) the noise to start from.
            noise: index of the sampling step, counted from the first -> noise of the same shape as `x`. DDIM draws
                none.
        """
        process = self._sampling_process
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
        return _process(self.schedule, self.num_timesteps, self.num_timesteps, "even")

    @property
    def _sampling_process(self) -> Process:
        return _process(self.schedule, self.num_timesteps, self.sampling_steps, self.spacing)

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

    def _weighed(self, errors: Tensor, t: Tensor) -> Tensor:
        """(batch,) errors of the noise at time steps."""
        if self.min_snr is None:
            return errors
        a = to_device(torch.from_numpy(self._process.a), t.device)[t]
        signal, noise = a.sqrt(), (1 - a).sqrt()
        return self.weigh(errors, signal, noise, noise / signal)

    def _bound(self, e: Tensor, v: Tensor, inputs: Batch, target: tuple[Tensor, Tensor]) -> Tensor:
        """(batch,) KL(target || reverse step), at t = 0 the likelihood of x_0; bits per dimension. Trains only v."""
        mean, log_variance, _ = self._process.reverse(e.detach(), v, inputs["x_t"], inputs["t"])
        kl = sample_mean(normal_kl(*target, mean, log_variance))
        nll = -sample_mean(discretized_log_likelihood(inputs["x_start"], mean, 0.5 * log_variance))
        return torch.where(inputs["t"] == 0, nll, kl) / math.log(2)


@cache
def _process(schedule: str, num_timesteps: int, count: int, spacing: str) -> Process:
    betas = linear_betas if schedule == "linear" else cosine_betas
    split = even_steps if spacing == "even" else strided_steps
    return Process.respaced(betas(num_timesteps), split(num_timesteps, count))
