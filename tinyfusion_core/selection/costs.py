"""Costs of every block: parameters, operations, time; as whole numbers for the budget of a search."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..protocols.task import Task
from ..runtime.progress import track
from ..runtime.seeding import Rng
from ..training.trainer import Trainer

RESOLUTION = 100
"""Cost of the most expensive block, as a whole number."""


def block_costs(task: Task, trainer: Trainer, batch_size: int = 64, rounds: int = 20) -> dict[str, list[float]]:
    """Return parameters, FLOPs for one sample, and milliseconds for a batch, of every block.

    Blocks with the same parameters and FLOPs get the same time: the median of theirs, because their differences are
    noise that would rule out masks.

    Args:
        task: the network and its objective.
        trainer: device and precision.
        batch_size: samples per timed pass.
        rounds: timed passes, of which the median is taken.
    """
    model = task.teacher.to(trainer.accelerator.device)
    blocks = {path: model.get_submodule(path) for path in task.blocks}
    parameters = [float(sum(p.numel() for p in block.parameters())) for block in blocks.values()]
    flops = _flops(task, model)
    latency = _latency(task, trainer, model, batch_size, rounds)
    kinds = list(zip(parameters, flops, strict=True))
    alike: dict[tuple[float, float], list[float]] = {}
    for kind, milliseconds in zip(kinds, latency, strict=True):
        alike.setdefault(kind, []).append(milliseconds)
    return {"parameters": parameters, "FLOPs": flops, "latency": [median(alike[kind]) for kind in kinds]}


def whole(costs: Sequence[float]) -> list[int]:
    """Scale costs to whole numbers, with the most expensive block at `RESOLUTION`."""
    unit = max(costs) / RESOLUTION or 1.0  # all may be free of what is counted
    return [max(1, round(cost / unit)) for cost in costs]


def _flops(task: Task, model: nn.Module) -> list[float]:
    inputs = _inputs(task, model, 1)
    # As many operations on fused kernels, which the counter does not know on a CPU.
    with torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        counter = FlopCounterMode(display=False, depth=99)
        with counter:
            task.loss.predict(model, inputs)
    found = counter.get_flop_counts()
    return [float(sum(found.get(f"{type(model).__name__}.{path}", {}).values())) for path in task.blocks]


def _latency(task: Task, trainer: Trainer, model: nn.Module, batch_size: int, rounds: int) -> list[float]:
    inputs, device = _inputs(task, model, batch_size), trainer.accelerator.device
    times: dict[str, list[float]] = {path: [] for path in task.blocks}
    started: dict[str, float] = {}

    def now() -> float:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter()

    handles = []
    for path in task.blocks:
        block = model.get_submodule(path)
        handles.append(block.register_forward_pre_hook(lambda *_, path=path: started.update({path: now()})))
        handles.append(block.register_forward_hook(lambda *_, path=path: times[path].append(now() - started[path])))
    try:
        with torch.no_grad(), track("latency", rounds, show=trainer.accelerator.is_main_process) as progress:
            for _ in range(rounds):
                with trainer.accelerator.autocast():
                    task.loss.predict(model, inputs)
                progress.advance()
    finally:
        for handle in handles:
            handle.remove()
    return [1e3 * median(times[path][len(times[path]) // 5 :]) for path in task.blocks]


def _inputs(task: Task, model: nn.Module, num_rows: int) -> dict[str, torch.Tensor]:
    device = next(model.parameters()).device
    batch = {name: t.to(device) for name, t in task.backbone.example(num_rows).items()}
    return task.loss.prepare(batch, Rng(0, "costs"))
