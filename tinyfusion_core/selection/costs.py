"""Costs of a network: of each block and of everything outside the blocks, in parameters, operations and time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median
from typing import Literal

import torch
from torch import Tensor, nn

from ..protocols.backbone import config_of, constructed
from ..protocols.task import Task
from ..protocols.undisturbed import evaluating
from ..runtime.seeding import Rng
from ..training.trainer import Trainer

BATCH_SIZE, ROUNDS = 1, 20
"""Samples per timed pass, and number of passes, of which the median is taken."""

CostKind = Literal["parameters", "flops", "latency_ns"]


@dataclass(frozen=True)
class NetworkCosts:
    """Parameters, FLOPs for one sample, or nanoseconds of a forward pass.

    Attributes:
        blocks: cost of every block.
        outside: cost of everything outside the blocks.
    """

    blocks: tuple[int, ...]
    outside: int

    @property
    def total(self) -> int:
        """Cost of the whole network."""
        return sum(self.blocks) + self.outside


def network_costs(kind: CostKind, task: Task, trainer: Trainer, batch_size: int = BATCH_SIZE) -> NetworkCosts:
    """Measure a task's network. It may be on the meta device: what must run is then built with random weights.

    Blocks with the same parameters and FLOPs get the same time: the median of theirs, because their differences are
    noise that would rule out masks.

    Args:
        kind: what to measure.
        task: the network and its objective.
        trainer: device and precision of timed passes.
        batch_size: samples per timed pass.
    """
    if kind == "parameters":
        return _parameters(task)
    if kind == "flops":
        return _flops(task)
    alike = list(zip(_parameters(task).blocks, _flops(task).blocks, strict=True))
    return _latency(task, trainer, alike, batch_size)


def _parameters(task: Task) -> NetworkCosts:
    model = task.teacher
    blocks = tuple(sum(p.numel() for p in model.get_submodule(path).parameters()) for path in task.blocks)
    return NetworkCosts(blocks, sum(p.numel() for p in model.parameters()) - sum(blocks))


def _flops(task: Task) -> NetworkCosts:
    try:
        return _counted(task, task.teacher)
    except (NotImplementedError, RuntimeError):
        if not _is_meta(task.teacher):
            raise
        return _counted(task, _built(task))  # an operation without a meta kernel


def _counted(task: Task, model: nn.Module) -> NetworkCosts:
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton

    inputs = _inputs(task, model, 1)
    # As many operations on fused kernels, which the counter does not know on a CPU.
    with evaluating(model), torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        counter = FlopCounterMode(display=False, depth=99)
        with counter:
            task.loss.predict(model, inputs)
    found = counter.get_flop_counts()
    blocks = tuple(int(sum(found.get(f"{type(model).__name__}.{path}", {}).values())) for path in task.blocks)
    return NetworkCosts(blocks, int(counter.get_total_flops()) - sum(blocks))


def _latency(task: Task, trainer: Trainer, kinds: Sequence[tuple[int, int]], batch_size: int) -> NetworkCosts:
    """The time of a whole pass, divided by the shares of the blocks in passes that time each block."""
    device = trainer.accelerator.device
    model = (_built(task) if _is_meta(task.teacher) else task.teacher).to(device)
    inputs = _inputs(task, model, batch_size)
    alone: list[float] = []
    stopped: list[float] = []
    by_kind: dict[tuple[int, int], list[float]] = {}

    def now() -> float:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter()

    def timed(times: list[float]) -> None:
        start = now()
        with torch.no_grad(), trainer.accelerator.autocast():
            task.loss.predict(model, inputs)
        times.append(now() - start)

    with evaluating(model), trainer.track("latency", 2 * ROUNDS) as progress:
        for _ in range(ROUNDS):
            timed(alone)
            progress.advance()
        with ExitStack() as hooks:
            for path, kind in zip(task.blocks, kinds, strict=True):
                _stop_clock(model.get_submodule(path), now, by_kind.setdefault(kind, []), hooks)
            for _ in range(ROUNDS):
                timed(stopped)
                progress.advance()
    scale = 1e9 * _settled(alone) / _settled(stopped)
    blocks = tuple(round(scale * _settled(by_kind[kind])) for kind in kinds)
    return NetworkCosts(blocks, max(0, round(1e9 * _settled(alone)) - sum(blocks)))


def _stop_clock(block: nn.Module, now: Callable[[], float], times: list[float], hooks: ExitStack) -> None:
    """Append the time of every call of a block, in seconds, until the hooks close."""
    started: list[float] = []
    hooks.callback(block.register_forward_pre_hook(lambda *_: started.append(now())).remove)
    hooks.callback(block.register_forward_hook(lambda *_: times.append(now() - started.pop())).remove)


def _settled(times: Sequence[float]) -> float:
    """The median without the first fifth, in which caches fill up."""
    return median(times[len(times) // 5 :])


def _is_meta(model: nn.Module) -> bool:
    return next(model.parameters()).is_meta


def _built(task: Task) -> nn.Module:
    """A network with the config of the task's, with random weights."""
    return constructed(task.backbone, config_of(task.backbone, task.teacher))


def _inputs(task: Task, model: nn.Module, num_rows: int) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    inputs = task.loss.prepare(task.backbone.example(num_rows), Rng(0, "costs"))
    return {name: t.to(device) for name, t in inputs.items()}
