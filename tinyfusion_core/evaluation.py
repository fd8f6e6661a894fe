"""Measure what came out, teacher and students side by side."""

from __future__ import annotations

import math
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .backbone import Backbone
from .data import DataSource
from .errors import UserError, require
from .losses import LossAdapter
from .progress import track
from .randomness import Rng
from .task import Task
from .trainer import Trainer

Models = Mapping[str, nn.Module]
"""The networks to compare by name; the first is the reference (the teacher)."""


@dataclass(frozen=True)
class Measurement:
    """One row of the final table.

    Attributes:
        name: what was measured.
        values: the figure of each model; None where it cannot be had.
        unit: of the figures.
        better: `lower` or `higher`, empty where neither is.
        note: how it was measured, or why it cannot be had.
    """

    name: str
    values: dict[str, float | None] = field(default_factory=dict)
    unit: str = ""
    better: str = ""
    note: str = ""


class Metric(ABC):
    """A measurement of several networks. Implementations are frozen dataclasses: fields are the recipe's options."""

    @abstractmethod
    def __call__(self, task: Task, models: Models, trainer: Trainer) -> list[Measurement]:
        """Measure; the networks are in eval mode on the trainer's device."""

    def check(self, data: DataSource) -> None:
        """Raises UserError when the data lack what this needs."""


@dataclass(frozen=True)
class Size(Metric):
    """Blocks, parameters, and floating-point operations of one forward pass for one sample."""

    def __call__(self, task: Task, models: Models, trainer: Trainer) -> list[Measurement]:
        blocks: dict[str, float | None] = {}
        parameters: dict[str, float | None] = {}
        flops: dict[str, float | None] = {}
        note = "one forward pass, one sample; counted by torch on the meta device"
        for name, model in models.items():
            blocks[name] = len(task.backbone.block_paths(model))
            parameters[name] = sum(p.numel() for p in model.parameters())
            count = count_flops(task.backbone, task.loss, task.backbone.config(model))
            flops[name] = count if isinstance(count, int) else None
            note = note if isinstance(count, int) else count
        return [
            Measurement("blocks", blocks),
            Measurement("parameters", parameters, better="lower"),
            Measurement("FLOPs", flops, unit="FLOP", better="lower", note=note),
        ]


def count_flops(backbone: Backbone, loss: LossAdapter, config: Mapping[str, Any]) -> int | str:
    """Operations of one prediction for one sample, two for a multiply-add.

    Counted on the meta device, where no fused CPU kernel hides the cost of attention.

    Returns:
        The count, or the reason why it cannot be had.
    """
    inputs = loss.prepare(backbone.example(1), Rng(0, "flops"))
    try:
        with torch.device("meta"):
            model = backbone.construct(config).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            loss.predict(model, {name: t.to("meta") for name, t in inputs.items()})
    except (NotImplementedError, RuntimeError) as e:
        return f"cannot be counted on the meta device: {str(e).splitlines()[0]}"
    return int(counter.get_total_flops())


@dataclass(frozen=True)
class HeldOutLoss(Metric):
    """The training loss on held-out data, with draws that are the same for every model and every run.

    Args:
        draws: passes over the held-out data, each with its own time steps and noise.
        batch_size: samples at once.
    """

    draws: int = 4
    batch_size: int = 256

    def __post_init__(self) -> None:
        require(self.draws >= 1, "evaluate: HeldOutLoss.draws", self.draws, "at least 1")
        require(self.batch_size >= 1, "evaluate: HeldOutLoss.batch_size", self.batch_size, "at least 1")

    def __call__(self, task: Task, models: Models, trainer: Trainer) -> list[Measurement]:
        total = len(models) * self.draws * len(task.held_out)
        with track("held-out loss", total, show=trainer.accelerator.is_main_process) as progress:
            values: dict[str, float | None] = {}
            for name, model in models.items():
                losses = []
                for draw in range(self.draws):
                    for inputs in _held_out(task, trainer, len(task.held_out), self.batch_size, draw):
                        with torch.no_grad(), trainer.accelerator.autocast():
                            loss = task.loss.losses(model, inputs)
                        losses.append(loss.float().cpu())
                        progress.advance(len(loss))
                values[name] = float(torch.cat(losses).double().mean())
        note = f"{self.draws} fixed draws for each of {len(task.held_out)} held-out samples"
        if any(name.endswith("pruned") for name in models):
            note += "; right after pruning it is the calibration loss"
        return [Measurement("held-out loss", values, better="lower", note=note)]


def _held_out(task: Task, trainer: Trainer, num: int, batch_size: int, draw: int = 0) -> Iterator[dict[str, Tensor]]:
    """The first held-out samples, prepared on the trainer's device: the same for every model and every run."""
    device = trainer.accelerator.device
    for first in range(0, num, batch_size):
        batch = task.held_out.__getitems__(list(range(first, min(first + batch_size, num))))
        # Time steps spread evenly over the samples: a far smaller variance for the same mean.
        rng = Rng(0, "held out", draw, first, strata=num)
        yield task.loss.prepare({name: t.to(device) for name, t in batch.items()}, rng)


@dataclass(frozen=True)
class Frechet(Metric):
    """Fréchet distance between generated and real examples, and how often generated ones show their label.

    The features are those of the data set's own feature space, so the distance is not comparable with FID.

    Args:
        num_samples: examples to generate with each model, from the same noise and labels.
        batch_size: examples at once.
    """

    num_samples: int = 1000
    batch_size: int = 250

    def __post_init__(self) -> None:
        require(self.num_samples >= 2, "evaluate: Frechet.num_samples", self.num_samples, "at least 2")
        require(self.batch_size >= 1, "evaluate: Frechet.batch_size", self.batch_size, "at least 1")

    def check(self, data: DataSource) -> None:
        if data.feature_space() is None:
            raise UserError(
                f"evaluate: Frechet needs a feature space, and {type(data).__name__} has none; leave it out"
            )

    def __call__(self, task: Task, models: Models, trainer: Trainer) -> list[Measurement]:
        from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

        space = task.feature_space
        if space is None:
            raise UserError("Frechet: the task has no feature_space")
        real = task.train.__getitems__(list(range(len(task.train))))
        reference = fid_features_to_statistics(space(real["x"])[0].cpu())
        distances: dict[str, float | None] = {}
        accuracies: dict[str, float | None] = {}
        for name, model in models.items():
            x, labels = generate(task, model, trainer, self.num_samples, self.batch_size, name=f"samples of {name}")
            features, logits = space(x)
            distances[name] = accuracies[name] = None
            if torch.isfinite(features).all():  # a network that has diverged has neither
                generated = fid_features_to_statistics(features.cpu())
                distance = fid_statistics_to_metric(generated, reference, verbose=False)
                distances[name] = float(distance["frechet_inception_distance"])
                accuracies[name] = float((logits.argmax(1).cpu() == labels.cpu()).float().mean())
        note = f"{self.num_samples} samples; features: {space.name}"
        return [
            Measurement("Fréchet distance", distances, better="lower", note=note),
            Measurement("conditional accuracy", accuracies, better="higher", note=note),
        ]


def check_teacher(task: Task, trainer: Trainer) -> None:
    """Make sure that the teacher knows its objective, on up to 256 held-out samples.

    Raises:
        UserError: its loss is not below 0.9 of that of a network that has learned nothing; see `LossAdapter.trivial`.
    """
    num = min(256, len(task.held_out))
    model, learned, trivial = task.teacher.to(trainer.accelerator.device), 0.0, 0.0
    for inputs in _held_out(task, trainer, num, batch_size=32):
        with torch.no_grad(), trainer.accelerator.autocast():
            prediction = task.loss.predict(model, inputs)
            nothing = task.loss.trivial(prediction, inputs)
            if nothing is None:
                return
            learned += float(task.loss.loss(prediction, inputs).sum()) / num
            trivial += float(task.loss.loss(nothing, inputs).sum()) / num
    if not learned < 0.9 * trivial:
        raise UserError(
            f"the teacher's held-out loss is {learned:.4g}, that of a network that has learned nothing {trivial:.4g}: "
            "is it the right checkpoint for this backbone, this loss (noise or velocity, its time steps) and this "
            "data (scale of the latents, order of the labels)?"
        )


def generate(
    task: Task, model: nn.Module, trainer: Trainer, num_samples: int, batch_size: int, name: str = "samples"
) -> tuple[Tensor, Tensor]:
    """Generate examples for the labels of the first training samples; the same noise for every model.

    Returns:
        (n, ...) examples and (n,) labels on the trainer's device.
    """
    device = trainer.accelerator.device
    like = task.backbone.example(1)["x"].to(device)
    indices = [i % len(task.train) for i in range(num_samples)]
    labels = task.train.__getitems__(indices)["y"].to(device)
    parts = []
    with track(name, num_samples, show=trainer.accelerator.is_main_process) as progress, torch.no_grad():
        for first in range(0, num_samples, batch_size):
            some = labels[first : first + batch_size]
            rng = Rng(trainer.seed, "generate", first=first)
            with trainer.accelerator.autocast():
                parts.append(task.loss.sample(model, like.expand(len(some), *like.shape[1:]), some, rng))
            progress.advance(len(some))
    return torch.cat(parts), labels


@dataclass(frozen=True)
class Latency(Metric):
    """Time of one forward pass, all models taking turns.

    Args:
        batch_size: samples of a pass.
        rounds: turns of each model; the median counts.
        warmup: turns before the clock runs.
    """

    batch_size: int = 64
    rounds: int = 20
    warmup: int = 3

    def __post_init__(self) -> None:
        for name in ("batch_size", "rounds"):
            require(getattr(self, name) >= 1, f"evaluate: Latency.{name}", getattr(self, name), "at least 1")
        require(self.warmup >= 0, "evaluate: Latency.warmup", self.warmup, "0 or more")

    def __call__(self, task: Task, models: Models, trainer: Trainer) -> list[Measurement]:
        device = trainer.accelerator.device
        batch = {name: t.to(device) for name, t in task.backbone.example(self.batch_size).items()}
        inputs = task.loss.prepare(batch, Rng(0, "latency"))
        seconds: dict[str, list[float]] = {name: [] for name in models}
        turns = self.warmup + self.rounds
        with track("latency", turns, show=trainer.accelerator.is_main_process) as progress:
            for turn in range(turns):
                for name, model in models.items():
                    elapsed = self._time(task, model, inputs, trainer)
                    if turn >= self.warmup:
                        seconds[name].append(elapsed)
                progress.advance()
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
        note = f"median of {self.rounds} forward passes in turn, batch {self.batch_size}, {device.type}{threads}"
        return [
            Measurement("latency", {n: 1e3 * s for n, s in medians.items()}, unit="ms", better="lower", note=note),
            Measurement(
                "throughput",
                {n: self.batch_size / s for n, s in medians.items()},
                unit="samples/s",
                better="higher",
                note=note,
            ),
        ]

    def _time(self, task: Task, model: nn.Module, inputs: Mapping[str, Tensor], trainer: Trainer) -> float:
        _synchronize(trainer.accelerator.device)
        start = time.perf_counter()
        with torch.no_grad(), trainer.accelerator.autocast():
            task.loss.predict(model, inputs)
        _synchronize(trainer.accelerator.device)
        return time.perf_counter() - start


def evaluate(task: Task, models: Models, metrics: list[Metric], trainer: Trainer) -> list[Measurement]:
    """Sizes first, then every metric in turn."""
    device = trainer.accelerator.device
    ready = {name: model.to(device).eval() for name, model in models.items()}
    return [_finite(m) for metric in [Size(), *metrics] for m in metric(task, ready, trainer)]


def _finite(measurement: Measurement) -> Measurement:
    """A figure that is no number is a finding too: none, and a note that says so."""
    bad = [name for name, v in measurement.values.items() if v is not None and not math.isfinite(v)]
    if not bad:
        return measurement
    values = {name: None if name in bad else v for name, v in measurement.values.items()}
    return replace(measurement, values=values, note=f"{measurement.note}; not finite: {', '.join(bad)}".lstrip("; "))


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
