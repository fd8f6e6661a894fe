"""A start in closed form: the layer before a gap is refitted, so that it does what has gone too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from ...dataloading.order import order_of
from ...errors import UserError, require
from ...protocols.backbone import Batch
from ...protocols.blocks.streams import Stream, streams_of
from ...protocols.task import Task
from ...protocols.undisturbed import evaluating
from ...pruning.decision import Decision
from ...pruning.removal import in_blocks
from ...runtime.distributed import batches
from ...runtime.seeding import Rng
from ..distillation import derive_taps
from ..trainer import Trainer
from .base import Start
from .least_squares import LeastSquares
from .output_layer import BlockCall, output_layers


@dataclass(frozen=True, kw_only=True)
class Refit(Start):
    """Refit a layer of the block before each gap, so that behind it the stream is what the teacher's is behind the gap.

    That layer is the block's last linear one whose output is added to the stream, times a gate or not. It is followed
    by a linear map and a shift, which become part of its weight and bias, so that the network keeps its layers. Both
    are found by ridge regression of what the student's stream lacks, one after another in the order of execution;
    nothing is trained. The last block of each list is refitted too: it makes up for what was left, and for a gap at the
    beginning. It is the least squares of ReplaceMe (arXiv:2505.02819), on the student's activations and under gates.

    Args:
        samples: how many training samples to fit to; all if there are fewer.
        batch_size: samples per pass; affects only speed and memory.
        ridge: weight of the map's squares, as a fraction of the mean square of what it maps. With more of it the
            network stays nearer to what pruning left.
    """

    samples: int = 128
    batch_size: int = 16
    ridge: float = 1e-2

    def __post_init__(self) -> None:
        for name in ("samples", "batch_size"):
            require(getattr(self, name) >= 1, f"recover.start.{name}", getattr(self, name), "at least 1")
        require(self.ridge > 0, "recover.start.ridge", self.ridge, "above 0")

    @override
    def check(self, task: Task) -> None:
        model, backbone = task.teacher, task.backbone
        example = {name: t.to(_device(model)) for name, t in backbone.example(2).items()}
        inputs = task.loss.prepare(example, Rng(0, "refit"))
        with torch.random.fork_rng(), torch.no_grad(), evaluating(model), ExitStack() as hooks:
            for path in backbone.block_paths(model):

                def look(call: BlockCall, path: str = path) -> None:
                    _layers_of(call.exact(), path)

                hooks.callback(_when_called(task, model, path, look).remove)
            task.loss.predict(model, inputs)

    @override
    def __call__(self, task: Task, student: nn.Module, decision: Decision, trainer: Trainer, stage: str) -> None:
        backbone, teacher, before = task.backbone, task.teacher, _device(task.teacher)
        whole, _ = in_blocks(backbone, teacher, decision)
        taps = derive_taps(whole if backbone.units else replace(whole, choices=()))  # one at the end of every gap
        ours, theirs = backbone.block_paths(student), backbone.block_paths(teacher)
        num = min(self.samples, len(task.train))
        order, parts = order_of(task.train, trainer.seed, f"{stage} refit", num), batches(num, self.batch_size)
        teacher.to(_device(student))
        with (
            torch.random.fork_rng(),
            torch.no_grad(),
            evaluating(student, teacher),
            trainer.track("refit", len(taps) * num) as progress,
        ):
            for own, end in sorted(taps):
                layers: dict[str, Sequence[Stream]] = {}
                fits: dict[str, LeastSquares] = {}
                for rows in parts:
                    batch = task.train.__getitems__([order[i] for i in rows])
                    on_device = {name: t.to(_device(student)) for name, t in batch.items()}
                    rng = Rng(trainer.seed, f"{stage} refit", first=rows.start, strata=num)
                    inputs = task.loss.prepare(on_device, rng)
                    wanted, call = _call(task, teacher, theirs[end], inputs), _call(task, student, ours[own], inputs)
                    exact = call.exact()
                    layers = layers or _layers_of(exact, ours[own])
                    for layer, streams in layers.items():
                        fit = fits.setdefault(layer, LeastSquares())
                        lacking = replace(wanted, streams=streams).behind - replace(call, streams=streams).behind
                        _add(fit, replace(exact, streams=streams), layer, lacking)
                    progress.advance(len(rows))
                for layer, fit in fits.items():
                    _follow(_linear(student, f"{ours[own]}.{layer}"), fit.solve(self.ridge))
        teacher.to(before)


class _Reached(Exception):
    """Ends a forward pass at the block that was asked for."""


def _call(task: Task, model: nn.Module, path: str, inputs: Batch) -> BlockCall:
    """The call of a block on these inputs; what comes behind it is not run."""
    found: list[BlockCall] = []

    def keep(call: BlockCall) -> None:
        found.append(call)
        raise _Reached

    hook = _when_called(task, model, path, keep)
    try:
        with suppress(_Reached):
            task.loss.predict(model, inputs)
    finally:
        hook.remove()
    return found[0]


def _when_called(task: Task, model: nn.Module, path: str, do: Callable[[BlockCall], None]) -> RemovableHandle:
    """Do something with a block's call when it has been called."""
    streams = streams_of(task.backbone.streams, path)

    def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        do(BlockCall(block, args, kwargs, output, streams))

    return model.get_submodule(path).register_forward_hook(hook, with_kwargs=True)


def _layers_of(call: BlockCall, path: str) -> dict[str, Sequence[Stream]]:
    """The layers of a block that are refitted, and their streams."""
    layers = output_layers(call)
    if layers is None:
        raise UserError(
            f"recover.start: Refit needs a linear layer whose output is added to the stream, and '{path}' has none: "
            "what comes behind it changes it, or it is another layer; leave start out"
        )
    return layers


def _add(fit: LeastSquares, call: BlockCall, layer: str, lacking: Tensor) -> None:
    """Add the samples of a batch: what the layer gives, and what the streams behind it lack."""
    given, gate = call.of_layer(layer), call.gate(layer, call.without(layer))
    assert gate is not None  # else it would not have been found
    if _linear(call.block, layer).bias is not None:
        given = torch.cat([given, torch.ones_like(given[..., :1])], dim=-1)
    for features, target, own in zip(given, lacking, gate, strict=True):
        fit.add(features, target, own)


def _follow(layer: nn.Linear, found: Tensor) -> None:
    """Let a layer be followed by a map, and a shift if it has a bias: y becomes y + D [y, 1]."""
    width = layer.out_features
    weight = layer.weight.double()
    layer.weight.copy_(weight + found[:, :width] @ weight)
    if layer.bias is not None:
        bias = layer.bias.double()
        layer.bias.copy_(bias + found[:, :width] @ bias + found[:, width])


def _linear(block: nn.Module, path: str) -> nn.Linear:
    layer = block.get_submodule(path)
    assert isinstance(layer, nn.Linear)
    return layer


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
