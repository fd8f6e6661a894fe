"""Training objectives of the published pipelines: noise or v on a scheduler's process, and rectified flow."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from tinyfusion_core.errors import UserError, nearest, require
from tinyfusion_core.protocols.backbone import Backbone, Batch
from tinyfusion_core.protocols.losses.diffusion import DiffusionLoss
from tinyfusion_core.runtime.files import NEUTRAL
from tinyfusion_core.runtime.seeding import Rng, to_device
from tinyfusion_diffusers import calling
from tinyfusion_diffusers.calls.compared import COMPARED
from tinyfusion_diffusers.calls.flows import flow_of
from tinyfusion_diffusers.library import diffusers
from tinyfusion_diffusers.pipelines.published import PublishedPipeline
from tinyfusion_diffusers.structure import class_of, settings


@dataclass(frozen=True, kw_only=True)
class _Denoising(DiffusionLoss):
    """Regression of a target for noised latents.

    Args:
        label_drop: probability of replacing a class label by the null class. Prompts are embedded beforehand: to drop
            them too, put the embedding of the empty prompt in some of the rows.
        guidance: the scale that a guidance-distilled network is given; null for networks that take none.
        sampling_steps: network calls for a sample that `tinyfusion generate-data` makes.
        pipeline: makes pictures of the networks, for the report, `tinyfusion sample` and metrics; null makes none.
    """

    label_drop: float = 0.0
    guidance: float | None = None
    sampling_steps: int = field(default=50, metadata={NEUTRAL: 50})
    pipeline: PublishedPipeline | None = field(default=None, metadata={NEUTRAL: None})

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.label_drop <= 1, "loss.label_drop", self.label_drop, "a probability")
        require(self.guidance is None or self.guidance >= 0, "loss.guidance", self.guidance, "a scale, or null")
        require(self.sampling_steps >= 1, "loss.sampling_steps", self.sampling_steps, "at least 1")

    @override
    def sampling_options(self) -> frozenset[str]:
        return frozenset({"sampling_steps", "pipeline"})

    @override
    def check_sampling(self, backbone: Backbone) -> None:
        if self.pipeline is not None:
            self.pipeline.check(backbone)

    @override
    def remark(self, model: nn.Module) -> str:
        """Return that a network's class is none of those whose pipelines were compared; empty if it is."""
        if (name := class_of(model).__name__) in COMPARED:
            return ""
        return (
            f"no test compares what it feeds {name} with a pipeline of diffusers. Compare a few samples of the teacher "
            "(tinyfusion generate-data) with those of its pipeline before much is spent"
        )

    @abstractmethod
    def _denoised(self, x: Tensor, run: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Samples from noise, (batch, ...).

        Args:
            x: (batch, ...) noise.
            run: noisy samples, and their times (batch,) as `prepare` gives them -> the prediction, in the shape of `x`.
        """

    @override
    def generated(self, model: nn.Module, batch: Batch, conditions: str, rng: Rng) -> dict[str, Tensor]:
        """Return latents that a network makes for the conditions of a batch, without guidance between two of them.

        Args:
            model: the network, in eval mode.
            batch: `x` (batch, ...), of which only the shape counts, and the conditions, as in `prepare`.
            conditions: not looked at: all of them are given.
            rng: stream "noise".

        Returns:
            The conditions and `x`, all of the same shape as in the batch.
        """
        told = {name: value for name, value in batch.items() if name not in ("x", "x_std")}

        def run(x: Tensor, t: Tensor) -> Tensor:
            found: Tensor = self.predict(model, {**told, "x_t": x, "t": t})
            return found[:, : x.shape[1]].to(x)

        return {**told, "x": self._denoised(rng.normal("noise", batch["x"]), run)}

    @abstractmethod
    def _place(self, x: Tensor, noise: Tensor, rng: Rng) -> dict[str, Tensor]:
        """Draw a time for each sample: `t` (batch,), `x_t` and `target` of the same shape as `x`."""

    @override
    def prepare(self, batch: Batch, rng: Rng) -> dict[str, Tensor]:
        """Noise the latents.

        Args:
            batch: `x` (batch, ...) clean, the conditions (`y`, `text`, `mask`, `pooled`, `condition`, `image`), which
                are not noised; optionally `x_std` like `x`: then `x` is the mean of a latent that is drawn here.
            rng: streams "latent", "time", "noise" and "label_drop".

        Returns:
            `x_t` and `target` of the same shape as `x`; `t` and `drop` (whether to drop the label), (batch,); the
            conditions.
        """
        told = {name: value for name, value in batch.items() if name not in ("x", "x_std")}
        x = batch["x"]
        if "x_std" in batch:
            x = x + batch["x_std"] * rng.normal("latent", x)
        if "y" in told:
            told["drop"] = to_device(rng.uniform("label_drop", len(x)) < self.label_drop, x.device)
        return {**self._place(x, rng.normal("noise", x), rng), **told}

    @override
    def loss(self, prediction: Tensor, inputs: Batch) -> Tensor:
        """Compute the mean squared error over the target's channels, (batch,); a predicted variance is not trained."""
        return self._error(prediction[:, : inputs["target"].shape[1]], inputs["target"], inputs["t"])

    @override
    def distance(self, student: Tensor, teacher: Tensor, inputs: Batch) -> Tensor:
        """Compute the mean squared difference over all channels, (batch,); a learned variance is matched too."""
        return self._error(student, teacher, inputs["t"])

    def _error(self, a: Tensor, b: Tensor, t: Tensor) -> Tensor:
        errors = (a.float() - b.float()).square().flatten(1).mean(1)
        return errors if self.min_snr is None else self.weigh(errors, *self._levels(t))

    @abstractmethod
    def _levels(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(batch,) signal, noise and factor to an error of the clean sample, see `weigh`, at times as in `prepare`."""

    def _run(self, model: nn.Module, x: Tensor, timestep: Tensor, inputs: Batch) -> Tensor:
        null = settings(model).get("num_embeds_ada_norm")  # labels that the network does not take are not looked at
        if "drop" in inputs and null is not None:
            inputs = {**inputs, "y": inputs["y"].masked_fill(inputs["drop"], null)}
        return calling.run(model, x, timestep, inputs, self.guidance)


@dataclass(frozen=True, kw_only=True)
class ScheduledDiffusion(_Denoising):
    """Noise or v-prediction on the process of a diffusers scheduler: DiT, PixArt, CogVideoX.

    The data do not train a variance that the network predicts beside the noise: distil such networks, which
    compares the variance too.

    Args:
        scheduler: a class of diffusers with `alphas_cumprod`: DDPMScheduler, CogVideoXDDIMScheduler and so on.
        settings: its options, as in the pipeline's scheduler_config.json.
        prediction: what the network predicts; default the scheduler's `prediction_type`.
    """

    scheduler: str = "DDPMScheduler"
    settings: dict[str, Any] = field(default_factory=dict)
    prediction: Literal["epsilon", "v_prediction"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self._process  # raises when there is no such scheduler

    @cached_property
    def _process(self) -> tuple[Tensor, str]:
        """(T,) A, the cumulative product of 1 - beta, and what is predicted."""
        made = self._scheduler
        kind = self.prediction or made.config.get("prediction_type", "epsilon")
        require(kind in ("epsilon", "v_prediction"), "loss.prediction", kind, "epsilon or v_prediction")
        return made.alphas_cumprod.double(), kind

    @cached_property
    def _scheduler(self) -> Any:
        library = diffusers()
        cls = getattr(library, self.scheduler, None)
        if cls is None or not self.scheduler.endswith("Scheduler"):
            known = [name for name in dir(library) if name.endswith("Scheduler")]
            raise UserError(
                f"loss.scheduler: diffusers {library.__version__} has no '{self.scheduler}'"
                f"{nearest(self.scheduler, known)}"
            )
        try:
            made = cls(**self.settings)
        except (TypeError, ValueError, NotImplementedError) as e:
            raise UserError(f"loss.settings: {self.scheduler} refuses them: {e}") from None
        if not isinstance(getattr(made, "alphas_cumprod", None), Tensor):
            raise UserError(f"loss.scheduler: {self.scheduler} has no alphas_cumprod; for a flow use RectifiedFlow")
        return made

    @override
    def _place(self, x: Tensor, noise: Tensor, rng: Rng) -> dict[str, Tensor]:
        table, kind = self._process
        t = (self.drawn(rng.uniform("time", len(x))) * len(table)).long().clamp(max=len(table) - 1)
        signal, rest = (_beside(v[t].sqrt(), x) for v in (table, 1 - table))
        target = noise if kind == "epsilon" else signal * noise - rest * x
        return {"x_t": signal * x + rest * noise, "target": target, "t": to_device(t, x.device)}

    @override
    def _levels(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        table, kind = self._process
        a = to_device(table, t.device)[t]
        signal, noise = a.sqrt(), (1 - a).sqrt()
        return signal, noise, noise / signal.clamp(min=1e-12) if kind == "epsilon" else noise

    @override
    def predict(self, model: nn.Module, inputs: Batch) -> Tensor:
        return self._run(model, inputs["x_t"], inputs["t"], inputs)

    @override
    def _denoised(self, x: Tensor, run: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        made, kind = self._scheduler, self._process[1]
        # Others draw noise for whole batches, so that a sample would depend on its neighbours.
        cls = type(made) if "DDIM" in self.scheduler else diffusers().DDIMScheduler
        scheduler = cls.from_config(made.config, prediction_type=kind)
        scheduler.set_timesteps(self.sampling_steps)
        for t in scheduler.timesteps:
            x = scheduler.step(run(x, t.to(x.device).expand(len(x))), t, x, return_dict=False)[0]
        return x


@dataclass(frozen=True, kw_only=True)
class RectifiedFlow(_Denoising):
    """The velocity on straight lines from data to noise: SD3, Flux, AuraFlow, Sana, Wan, Qwen-Image, LTX, Lumina 2.

    x_t = (1 - t) x + t noise, and the target is noise - x (arXiv:2209.03003, arXiv:2403.03206).

    Args:
        time: distribution of times, before they are shifted, see `DiffusionLoss`; SD 3's is "logit_normal".
        mean: mean of the normal number.
        std: standard deviation of the normal number.
        shift: moves times towards noise, t -> shift t / (1 + (shift - 1) t), as the pipeline's scheduler does.
        scale: what the network is given at pure noise; known by default for the families named above.
    """

    time: Literal["uniform", "logit_normal"] = "logit_normal"
    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0
    scale: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.shift > 0, "loss.shift", self.shift, "a factor above 0")
        require(self.scale is None or self.scale > 0, "loss.scale", self.scale, "a time above 0, or null")

    @override
    def _place(self, x: Tensor, noise: Tensor, rng: Rng) -> dict[str, Tensor]:
        t = _shifted(self.drawn(rng.uniform("time", len(x))), self.shift)
        along = _beside(t, x)
        return {"x_t": (1 - along) * x + along * noise, "target": noise - x, "t": to_device(t, x.device, x.dtype)}

    @override
    def _share(self, t: float) -> float:
        return super()._share(t if t in (0, 1) else t / (self.shift - (self.shift - 1) * t))

    @override
    def _levels(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return 1 - t, t, t

    @override
    def predict(self, model: nn.Module, inputs: Batch) -> Tensor:
        flow = flow_of(model, self.scale)
        t = _shifted(inputs["t"], 1 / self.shift) if flow.before_shift else inputs["t"]
        # Sana's pipeline multiplies the time by what its config says.
        most = flow.most * settings(model).get("timestep_scale", 1.0)
        velocity = self._run(model, inputs["x_t"], (1 - t if flow.reverse else t) * most, inputs)
        return -velocity if flow.negative else velocity

    @override
    def _denoised(self, x: Tensor, run: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        times = _shifted(torch.linspace(1, 0, self.sampling_steps + 1, dtype=torch.float64), self.shift).tolist()
        for now, later in pairwise(times):
            x = x + (later - now) * run(x, x.new_full((len(x),), now))
        return x


def _shifted(t: Tensor, by: float) -> Tensor:
    """Times moved towards noise, (batch,); by 1 / `by` it is undone."""
    return by * t / (1 + (by - 1) * t)


def _beside(values: Tensor, x: Tensor) -> Tensor:
    """(batch,) values of main memory as (batch, 1, ..., 1), with the dtype and device of `x`."""
    return to_device(values, x.device, x.dtype).view(-1, *[1] * (x.ndim - 1))
