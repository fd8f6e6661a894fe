"""Flow matching on interpolant paths: training loss, distillation distance, ODE and SDE samplers.

Formulas: SiT (arXiv:2401.08740), classifier-free guidance (arXiv:2207.12598). Notation: see path.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from tinyfusion_core.errors import require
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
from tinyfusion_sit.path import Coefficients, PathName, Prediction, coefficients, interval


@dataclass(frozen=True, kw_only=True)
class FlowMatching(DiffusionLoss):
    """Regression of the velocity, the noise or the score along a path from noise to data, as SiT trains and samples.

    Args:
        path: "linear", "gvp" (cosine) or "vp" (variance-preserving diffusion).
        prediction: what the network predicts: "velocity" (the published models), "noise" or "score".
        weighting: weight of the noise or score error over time: "none" (1), "velocity" (the error of the velocity
            that follows from it) or "likelihood". A velocity is not weighted.
        label_drop: probability of replacing a label by the null class in training.
        sampler: "euler" and "heun" solve the probability-flow ODE with equal steps, "sde" (Euler-Maruyama, diffusion
            coefficient sigma) is the published one.
        sampling_steps: steps of the sampler; one network call each, two with "heun" (doubled batches with
            guidance). The reference code counts the ends of the ODE's steps, one more.
        last_step: length of the last, noiseless step of "sde".
        cfg_scale: classifier-free guidance scale; 1 is no guidance.
        guided_channels: number of channels that are guided; null for all. The published samples guide 3 of 4.
        times: the part that is trained and judged; 0 is noise here, and 1 the data.
    """

    path: PathName = "linear"
    prediction: Prediction = "velocity"
    weighting: Literal["none", "velocity", "likelihood"] = "none"
    label_drop: float = 0.1
    sampler: Literal["euler", "heun", "sde"] = "sde"
    sampling_steps: int = 250
    last_step: float = 0.04
    cfg_scale: float = 1.0
    guided_channels: int | None = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(self.label_drop, self.guided_channels)
        least = 2 if self.sampler == "sde" else 1
        require(self.sampling_steps >= least, "loss.sampling_steps", self.sampling_steps, f"at least {least}")
        require(0 < self.last_step < 1, "loss.last_step", self.last_step, "a time between 0 and 1")
        require(
            self.weighting == "none" or (self.prediction != "velocity" and self.min_snr is None),
            "loss.weighting",
            self.weighting,
            "none with prediction: velocity, or with min_snr",
        )

    @override
    def sampling_options(self) -> frozenset[str]:
        return frozenset({"sampler", "sampling_steps", "last_step", "cfg_scale", "guided_channels"})

    @override
    def prepare(self, batch: Batch, rng: Rng) -> dict[str, Tensor]:
        """Interpolate between noise and latents at random times.

        Args:
            batch: `x` (batch, channels, height, width) clean, `y` (batch,) labels, optionally `x_std` of the same shape
                as `x`: then `x` is the mean of a latent that is drawn here.
            rng: streams "latent", "time", "noise" and "label_drop".

        Returns:
            `x_t` and `target` (what the network should predict) of the same shape as `x`; `t`, `weight`, `y`, `drop`,
            (batch,).
        """
        data = draw_latents(batch, rng)
        start, end = interval(self.path, self.prediction, sampling=False)
        t = to_device(start + (end - start) * self.drawn(rng.uniform("time", len(data))), data.device, data.dtype)
        drop = draw_label_drop(batch, rng, self.label_drop)
        return {**self.place(data, rng.normal("noise", data), t), "t": t, "y": batch["y"], "drop": drop}

    def place(self, data: Tensor, noise: Tensor, t: Tensor) -> dict[str, Tensor]:
        """Interpolate at given times.

        Args:
            data: (batch, channels, height, width) clean latents.
            noise: standard normal noise of the same shape.
            t: (batch,) times.

        Returns:
            `x_t`, `target` and `weight` as in `prepare`.
        """
        along = _at(self.path, t, data)
        sigma = along.sigma
        if self.prediction == "velocity":
            target, weight = along.d_alpha * data + along.d_sigma * noise, torch.ones_like(sigma)
            clean = sigma / (along.d_alpha * sigma - along.alpha * along.d_sigma)
        else:
            ratio = along.diffusion / sigma
            weight = {"none": torch.ones_like(sigma), "velocity": ratio.square(), "likelihood": ratio / sigma}[
                self.weighting
            ]
            target, clean = noise, sigma / along.alpha
            if self.prediction == "score":  # as noise, in units of sigma
                target, weight = -noise / sigma, weight * sigma.square()
        weight = self.weigh(weight.flatten(), along.alpha.flatten(), sigma.flatten(), clean.flatten())
        return {"x_t": along.alpha * data + sigma * noise, "target": target, "weight": weight}

    @override
    def predict(self, model: nn.Module, inputs: Batch) -> Tensor:
        """Run `model(x_t, t, y)`, with `model.null_class` where dropped -> (batch, channels, height, width)."""
        return run_network(model, inputs, self.label_drop)

    @override
    def loss(self, prediction: Tensor, inputs: Batch) -> Tensor:
        """Compute the weighted mean squared error, (batch,)."""
        return self.distance(prediction, inputs["target"], inputs)

    @override
    def distance(self, student: Tensor, teacher: Tensor, inputs: Batch) -> Tensor:
        """Compute the mean squared difference, weighted as the loss, (batch,)."""
        dtype = inputs["x_t"].dtype
        return inputs["weight"] * sample_mean((student.to(dtype) - teacher.to(dtype)).square())

    @override
    def sample(self, model: nn.Module, like: Tensor, conditions: Tensor, rng: Rng) -> Tensor:
        """Sample (batch, channels, height, width). Row i uses only its streams "x_0" and "sampling noise <step>"."""
        network = guided_network(model, conditions, self.cfg_scale, self.guided_channels)
        states = self.trajectory(network, rng.normal("x_0", like), lambda i: rng.normal(f"sampling noise {i}", like))
        return last(states)

    def trajectory(
        self, network: Callable[[Tensor, Tensor], Tensor], x: Tensor, noise: Callable[[int], Tensor]
    ) -> Iterator[Tensor]:
        """Yield the states of the sampler after every step, first to last, each (batch, channels, height, width).

        The flow-matching schedulers of diffusers support only the linear path and velocities, and their Heun ends with
        an Euler step; where they give the same numbers (Euler), the tests compare.

        Args:
            network: x (batch, channels, height, width), times t (batch,) -> network output.
            x: (batch, channels, height, width) the noise to start from.
            noise: index of the step, counted from the first -> noise of the same shape as `x`. An ODE draws none.
        """
        return self._sde(network, x, noise) if self.sampler == "sde" else self._ode(network, x)

    def _ode(self, network: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> Iterator[Tensor]:
        start, end = interval(self.path, self.prediction, sampling=True)
        step = (end - start) / self.sampling_steps

        def velocity(x: Tensor, time: float) -> Tensor:
            along, output = self._look(network, x, time)
            return along.velocity(self.prediction, output, x)

        for i in range(self.sampling_steps):
            time = start + i * step
            v = velocity(x, time)
            if self.sampler == "heun":
                v = (v + velocity(x + step * v, time + step)) / 2
            x = x + step * v
            yield x

    def _sde(
        self, network: Callable[[Tensor, Tensor], Tensor], x: Tensor, noise: Callable[[int], Tensor]
    ) -> Iterator[Tensor]:
        start, _ = interval(self.path, self.prediction, sampling=True)
        end = 1 - self.last_step
        step = (end - start) / (self.sampling_steps - 1)
        for i in range(self.sampling_steps):
            along, output = self._look(network, x, start + i * step)
            v, score = (read(self.prediction, output, x) for read in (along.velocity, along.score))
            drift = v + along.sigma * score
            if i < self.sampling_steps - 1:
                x = x + step * drift + (2 * along.sigma * step).sqrt() * noise(i)
            else:
                x = x + self.last_step * drift
            yield x

    def _look(self, network: Callable[[Tensor, Tensor], Tensor], x: Tensor, time: float) -> tuple[Coefficients, Tensor]:
        """The path's coefficients at a time, and the network's output for x there."""
        t = torch.full((len(x),), time, dtype=x.dtype, device=x.device)
        return _at(self.path, t, x), network(x, t).to(x.dtype)


def _at(path: PathName, t: Tensor, like: Tensor) -> Coefficients:
    """Coefficients of shape (batch, 1, ..., 1), with the rank and dtype of `like`."""
    return coefficients(path, t.to(like.dtype).view(-1, *[1] * (like.ndim - 1)))
