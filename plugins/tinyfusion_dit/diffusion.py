"""Gaussian diffusion: training loss, distillation distance and samplers.

Formulas: DDPM (arXiv 2006.11239), improved DDPM (2102.09672: learned-range variance, hybrid loss, respacing),
DDIM (2010.02502), classifier-free guidance (2207.12598), distillation of the variance (TinyFusion, 2412.01199).

Notation: A is the cumulative product of 1 - beta, c1 and c2 weigh x_0 and x_t in the posterior mean,
e is the predicted noise and v the raw variance output. Shapes: B batch, C channels, K kept steps.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor, nn

from tinyfusion_core.backbone import Batch
from tinyfusion_core.errors import UserError, require
from tinyfusion_core.losses import LossAdapter
from tinyfusion_core.randomness import Rng
from tinyfusion_dit.process import (
    Process,
    discretized_log_likelihood,
    even_steps,
    linear_betas,
    normal_kl,
    strided_steps,
)


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
        require(
            self.guided_channels is None or self.guided_channels >= 0,
            "loss.guided_channels",
            self.guided_channels,
            "a number of channels",
        )
        _process(self.num_timesteps, self.sampling_steps, self.spacing)  # raises when there is no such spacing

    def sampling_options(self) -> frozenset[str]:
        return frozenset({"sampler", "sampling_steps", "spacing", "clip_denoised", "cfg_scale", "guided_channels"})

    def prepare(self, batch: Batch, rng: Rng) -> dict[str, Tensor]:
        """Noise the latents.

        Args:
            batch: `x` (B, C, H, W) clean, `y` (B,) labels, optionally `x_std` like `x`: then `x` is the mean of a
                latent that is drawn here.
            rng: streams "latent", "time", "noise" and "label_drop".

        Returns:
            `x_start`, `noise`, `x_t` like `x`; `t`, `y`, `drop` (whether to drop the label) of shape (B,).
        """
        x_start, num_rows = _latents(batch, rng), len(batch["x"])
        t = rng.integers("time", self.num_timesteps, num_rows).to(x_start.device)
        drop = (rng.uniform("label_drop", num_rows) < self.label_drop).to(x_start.device)
        noise = rng.normal("noise", x_start)
        x_t = self._process.diffuse(x_start, t, noise)
        return {"x_start": x_start, "noise": noise, "x_t": x_t, "t": t, "y": batch["y"], "drop": drop}

    def prepare_clean(self, batch: Batch, rng: Rng) -> dict[str, Tensor]:
        """Latents without noise or dropped labels, at time steps from the first 250.

        The script counts the 250 steps of a respaced process and feeds the counts to the network as they are.
        """
        x, num_rows = _latents(batch, rng), len(batch["x"])
        t = rng.integers("time", min(250, self.num_timesteps), num_rows).to(x.device)
        return {"x_t": x, "t": t, "y": batch["y"], "drop": torch.zeros_like(t, dtype=torch.bool)}

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

        Written out here, because the schedulers of diffusers give the published numbers in one case of four: their
        DDIM steps back by a constant stride, wrong for evenly spaced steps, and their learned-range DDPM takes
        the variances of the unspaced process. They also draw noise for whole batches, so that a sample would
        depend on its neighbours. Where they can, the tests check that they agree.

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


@cache
def _process(num_timesteps: int, count: int, spacing: str) -> Process:
    split = even_steps if spacing == "even" else strided_steps
    return Process.respaced(linear_betas(num_timesteps), split(num_timesteps, count))


def _latents(batch: Batch, rng: Rng) -> Tensor:
    """The clean latents; drawn where the data give their means and deviations."""
    if "x_std" not in batch:
        return batch["x"]
    return batch["x"] + batch["x_std"] * rng.normal("latent", batch["x"])


def _mean(x: Tensor) -> Tensor:
    return x.flatten(1).mean(1)
