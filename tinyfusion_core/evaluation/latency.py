"""Latency and throughput of networks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from typing_extensions import override

from ..errors import require
from ..protocols.task import Task
from ..runtime.seeding import Rng
from ..training.trainer import Trainer
from .metrics import Measurement, Metric, Models


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
        seconds: dict[str, list[float]] = {name: [] for name in models}
        turns = self.warmup + self.rounds
        with trainer.track("latency", turns) as progress:
            for turn in range(turns):
                for name, model in models.items():
                    elapsed = self._time(task, model, inputs, trainer)
                    if turn >= self.warmup:
                        seconds[name].append(elapsed)
                progress.advance()
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
        others = ", the other processes waiting" if trainer.accelerator.num_processes > 1 else ""
        note = (
            f"median of {self.rounds} forward passes in turn, batch {self.batch_size}, {device.type}{threads}{others}"
        )
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


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
