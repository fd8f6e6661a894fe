"""Prune your own network without writing a plugin."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from ..errors import UserError
from .backbone import Backbone, Batch
from .blocks.branches import Branch
from .blocks.streams import FIRST, Streams, Unneeded
from .data import Samples, as_samples
from .loss import LossAdapter, Prediction
from .task import Task


def wrap(
    model: nn.Module,
    *,
    blocks: str | Sequence[str],
    loss_fn: Callable[[nn.Module, Batch], Tensor],
    data: Samples | Mapping[str, Tensor],
    held_out: Samples | Mapping[str, Tensor] | None = None,
    streams: Streams = FIRST,
    unneeded: Unneeded = (),
    batched: Mapping[str, int] | None = None,
    branches: Mapping[str, Branch] = MappingProxyType({}),
    after_prune: Callable[[nn.Module, Mapping[str, Sequence[int]]], object] = lambda model, kept: None,
) -> Task:
    """Make a task from a network, for `Search`, every criterion, `prune` and `Recover`.

    A student is a plain module: keep it as such. Saving with a config, distillation and recipes need a backbone and a
    loss of your own: docs/writing-a-plugin.md.

    Args:
        model: the network. It is not changed.
        blocks: paths of its blocks; `"layers.*"` stands for all children of `layers`.
        loss_fn: (model, batch) -> losses, (batch,). Anything it draws at random must come with the batch.
        data: training data: tensors or numpy arrays by name, each (samples, ...); a data set or loader of torch, whose
            items are mappings, or tuples that become columns "0", "1", ...; or samples read by lists of indices.
        held_out: data for criteria and measurements; by default `data`.
        streams: what a skipped block hands on; by default its first argument, as its first output.
        unneeded: outputs of a block that are no stream: nobody needs them, or the next block, see `Backbone.unneeded`.
        batched: arguments of blocks that carry the batch, see `Backbone.batched`; by default found by trial.
        branches: residual branches inside of a block, by name and in execution order, that go each by itself; by
            default whole blocks go.
        after_prune: repairs in the student what its module lists cannot express, see `Backbone.after_prune`.

    Raises:
        UserError: a path leads nowhere, or the data cannot be read.
    """
    train = as_samples(data, "data")
    paths = (blocks,) if isinstance(blocks, str) else tuple(blocks)
    task = Task(
        backbone=_Wrapped(
            model=model,
            given=paths,
            data=train,
            repair=after_prune,
            streams=streams,
            unneeded=unneeded,
            batched=batched,
            inside=branches,
            units=tuple(branches),
        ),
        loss=_Function(loss_fn),
        train=train,
        held_out=train if held_out is None else as_samples(held_out, "held_out"),
        model=model,
        origin={"licence": "unknown"},
    )
    _ = task.backbone.example(1)  # a wrong sample shows here, and a wrong path below
    for path in task.blocks:
        if isinstance(model.get_submodule(path), nn.ModuleList | nn.ModuleDict):
            raise UserError(
                f"wrap: blocks: '{path}' is a list of modules, which nobody calls; did you mean '{path}.*'?"
            )
    if len(task.blocks) < 2:
        raise UserError(f"wrap: blocks: '{task.blocks[0]}' is one block; of 2 or more some can go")
    return task


_REMAINING = "_remaining_blocks"
"""Attribute of a student: the paths of its blocks, where they were named one by one."""


@dataclass(frozen=True, eq=False, kw_only=True)
class _Wrapped(Backbone):
    called = "wrap"
    model: nn.Module
    given: Sequence[str]
    data: Samples
    repair: Callable[[nn.Module, Mapping[str, Sequence[int]]], object]
    streams: Streams = FIRST  # type: ignore[misc]  # of this network, not of a family
    unneeded: Unneeded = ()  # type: ignore[misc]
    batched: Mapping[str, int] | None = None  # type: ignore[misc]
    inside: Mapping[str, Branch]

    @override
    def build(self) -> nn.Module:
        return self.model

    @override
    def config(self, model: nn.Module | None = None) -> dict[str, Any]:
        raise UserError(
            "wrap: no config is known of this network. Keep the student's state dict, or write a backbone: "
            "docs/writing-a-plugin.md"
        )

    @classmethod
    @override
    def construct(cls, config: Mapping[str, Any]) -> nn.Module:
        raise UserError("wrap: a wrapped network is not built from a config")

    @override
    def blocks(self, model: nn.Module) -> Sequence[str]:
        remaining: Sequence[str] = getattr(model, _REMAINING, self.given)
        return remaining

    @override
    def branches(self, model: nn.Module) -> Mapping[str, Branch]:
        return self.inside

    @override
    def after_prune(self, model: nn.Module, kept: Mapping[str, Sequence[int]]) -> None:
        before = self.blocks(model)
        if not any(".*" in path for path in before):  # lists count anew from 0
            places = {f"{path}.{old}": f"{path}.{new}" for path, k in kept.items() for new, old in enumerate(k)}
            object.__setattr__(model, _REMAINING, tuple(places[path] for path in before if path in places))
        self.repair(model, kept)

    @override
    def example(self, num_rows: int) -> dict[str, Tensor]:
        return self.data.__getitems__([i % len(self.data) for i in range(num_rows)])

    @classmethod
    @override
    def tiny(cls) -> Backbone:
        raise UserError("wrap: a wrapped network has no tiny one")


@dataclass(frozen=True, eq=False)
class _Function(LossAdapter):
    called = "wrap: loss_fn"
    function: Callable[[nn.Module, Batch], Tensor]

    @override
    def predict(self, model: nn.Module, inputs: Batch) -> Tensor:
        return self.function(model, inputs)

    @override
    def loss(self, prediction: Prediction, inputs: Batch) -> Tensor:
        losses: Tensor = prediction
        return losses

    @override
    def distance(self, student: Prediction, teacher: Prediction, inputs: Batch) -> Tensor:
        raise UserError(
            "wrap: loss_fn returns losses, and distillation compares predictions. Leave kd out, or write a loss: "
            "docs/writing-a-plugin.md"
        )

    @override
    def trivial(self, prediction: Prediction, inputs: Batch) -> None:
        """Losses alone do not say what nothing would be."""
