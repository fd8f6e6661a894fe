"""A start in closed form: the layer before a gap is refitted, so that it does what has gone too."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from typing_extensions import override

from ...dataloading.order import order_of
from ...errors import UserError, require
from ...protocols.blocks.outputs import captured
from ...protocols.blocks.streams import Stream
from ...protocols.task import Task
from ...protocols.undisturbed import evaluating
from ...pruning.decision import Decision
from ...pruning.removal import in_blocks
from ...runtime.distributed import batches
from ...runtime.run_folder import RunFolder
from ...runtime.seeding import Rng
from ..distillation import derive_taps
from ..trainer import Trainer
from .base import Start
from .least_squares import TOGETHER, LeastSquares
from .output_layer import BlockCall, output_layers
from .reaching import call_of, device_of, when_called


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
        example = {name: t.to(device_of(model)) for name, t in backbone.example(2).items()}
        inputs = task.loss.prepare(example, Rng(0, "refit"))
        with torch.random.fork_rng(), torch.no_grad(), evaluating(model), ExitStack() as hooks:
            for path in backbone.block_paths(model):

                def look(call: BlockCall, path: str = path) -> None:
                    _layers_of(call.exact(), path)

                hooks.callback(when_called(backbone, model, path, look).remove)
            task.loss.predict(model, inputs)

    @override
    def planned(self, task: Task, decision: Decision) -> tuple[str, int]:
        paths = task.backbone.block_paths(task.teacher)
        inputs = task.loss.prepare(task.backbone.example(1), Rng(0, "plan"))
        on_meta = {name: t.to("meta") for name, t in inputs.items()}
        unknown = suppress(NotImplementedError)  # an operation without a meta kernel
        with torch.no_grad(), captured(task.teacher, paths, task.backbone.streams) as outputs, unknown:
            task.loss.predict(task.teacher, on_meta)
        held = [0]
        for widths in ([t.shape[-1] + 1 for t in streams] for streams in outputs if streams):
            # As under gates: a matrix for each sample, twice when they are solved, and those that are solved together.
            solved = max(min(w**3, max(TOGETHER, w**2)) for w in widths)
            held.append(sum(2 * self.samples * w**2 for w in widths) + 3 * solved)
        return f"Refit to {self.samples:,} samples", 8 * max(held)  # in double precision

    @override
    def __call__(
        self,
        task: Task,
        student: nn.Module,
        decision: Decision,
        trainer: Trainer,
        stage: str,
        run: RunFolder | None = None,
    ) -> None:
        backbone, teacher, before = task.backbone, task.teacher, device_of(task.teacher)
        whole, _ = in_blocks(backbone, teacher, decision)
        taps = derive_taps(whole if backbone.units else replace(whole, choices=()))  # one at the end of every gap
        ours, theirs = backbone.block_paths(student), backbone.block_paths(teacher)
        num = min(self.samples, len(task.train))
        order, parts = order_of(task.train, trainer.seed, f"{stage} refit", num), batches(num, self.batch_size)
        teacher.to(device_of(student))
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
                    on_device = {name: t.to(device_of(student)) for name, t in batch.items()}
                    rng = Rng(trainer.seed, f"{stage} refit", first=rows.start, strata=num)
                    inputs = task.loss.prepare(on_device, rng)
                    predict = partial(task.loss.predict, inputs=inputs)
                    wanted = call_of(backbone, teacher, theirs[end], partial(predict, teacher))
                    call = call_of(backbone, student, ours[own], partial(predict, student))
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
