"""Latency and throughput of networks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import nn
from typing_extensions import override

from ..errors import require
from ..protocols.task import Task
from ..runtime.seeding import Rng
from ..training.trainer import Trainer
from .metrics import Measurement, Metric, Models

Key = TypeVar("Key")


@dataclass(frozen=True)
class Latency(Metric):
    """Median time of one forward pass; the models take turns.

    Args:
        batch_size: samples per pass.
        rounds: timed passes of each model.
        warmup: passes before timing starts.
    """

    batch_size: int = 64
    rounds: int = 20
    warmup: int = 3
    column = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "rounds"):
            require(getattr(self, name) >= 1, f"evaluate: Latency.{name}", getattr(self, name), "at least 1")
        require(self.warmup >= 0, "evaluate: Latency.warmup", self.warmup, "0 or more")

    @override
    def __call__(self, task: Task, models: Models, trainer: Trainer) -> list[Measurement]:
        device = trainer.accelerator.device
        batch = {name: t.to(device) for name, t in task.backbone.example(self.batch_size).items()}
        inputs = task.loss.prepare(batch, Rng(0, "latency"))

        def forward(model: nn.Module) -> None:
            with torch.no_grad(), trainer.accelerator.autocast():
                task.loss.predict(model, inputs)

        work = {name: partial(forward, model) for name, model in models.items()}
        medians = medians_in_turn(work, self.warmup, self.rounds, trainer, "latency")
        note = f"median of {self.rounds} forward passes in turn, batch {self.batch_size}, {where_timed(trainer)}"
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


def medians_in_turn(
    work: Mapping[Key, Callable[[], object]], warmup: int, rounds: int, trainer: Trainer, name: str
) -> dict[Key, float]:
    """Return the median seconds of things to do that take turns, by their names.

    Args:
        work: what to do, by names of any kind.
        warmup: turns before timing starts.
        rounds: timed turns.
        trainer: device and progress.
        name: label of the progress bar.
    """
    seconds: dict[Key, list[float]] = {key: [] for key in work}
    with trainer.track(name, warmup + rounds) as progress:
        for turn in range(warmup + rounds):
            for key, do in work.items():
                _synchronize(trainer.accelerator.device)
                start = time.perf_counter()
                do()
                _synchronize(trainer.accelerator.device)
                if turn >= warmup:
                    seconds[key].append(time.perf_counter() - start)
            progress.advance()
    return {key: statistics.median(times) for key, times in seconds.items()}


def where_timed(trainer: Trainer) -> str:
    """Return on what the main process measures times, for notes."""
    device = trainer.accelerator.device
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    others = ", the other processes waiting" if trainer.accelerator.num_processes > 1 else ""
    return f"{device.type}{threads}{others}"


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
