"""Prune your own network without writing a plugin."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from ..errors import UserError
from .backbone import Backbone, Batch
from .data import Samples, Tensors
from .loss import LossAdapter, Prediction
from .task import Task


def wrap(
    model: nn.Module,
    *,
    blocks: str | Sequence[str],
    loss_fn: Callable[[nn.Module, Batch], Tensor],
    data: Samples | Mapping[str, Tensor],
    held_out: Samples | Mapping[str, Tensor] | None = None,
    after_prune: Callable[[nn.Module, Mapping[str, Sequence[int]]], object] = lambda model, kept: None,
) -> Task:
    """Make a task from a network, for `Search`, every criterion, `prune` and `Recover`.

    A student is a plain module: keep it as such. Saving with a config, distillation and recipes need a backbone and a
    loss of your own: docs/writing-a-plugin.md.

    Args:
        model: the network. It is not changed.
        blocks: paths of its blocks; `"layers.*"` stands for all children of `layers`.
        loss_fn: (model, batch) -> losses, (batch,). Anything it draws at random must come with the batch.
        data: training data: tensors by name, each (samples, ...), or a data set read by lists of indices.
        held_out: data for criteria and measurements; by default `data`.
        after_prune: repairs in the student what its module lists cannot express, see `Backbone.after_prune`.

    Raises:
        UserError: a path leads nowhere.
    """
    train = data if not isinstance(data, Mapping) else Tensors(dict(data))
    other = train if held_out is None else held_out if not isinstance(held_out, Mapping) else Tensors(dict(held_out))
    paths = (blocks,) if isinstance(blocks, str) else tuple(blocks)
    task = Task(
        backbone=_Wrapped(model, paths, train, after_prune),
        loss=_Function(loss_fn),
        train=train,
        held_out=other,
        model=model,
        origin={"licence": "unknown"},
    )
    _ = task.blocks  # a wrong path shows here
    return task


@dataclass(frozen=True, eq=False)
class _Wrapped(Backbone):
    model: nn.Module
    given: Sequence[str]
    data: Samples
    repair: Callable[[nn.Module, Mapping[str, Sequence[int]]], object]

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
        return self.given

    @override
    def after_prune(self, model: nn.Module, kept: Mapping[str, Sequence[int]]) -> None:
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
    function: Callable[[nn.Module, Batch], Tensor]

    @override
    def predict(self, model: nn.Module, inputs: Batch) -> Tensor:
        return self.function(model, inputs)

    @override
    def loss(self, prediction: Prediction, inputs: Batch) -> Tensor:
        losses: Tensor = prediction
        return losses

    @override
    def trivial(self, prediction: Prediction, inputs: Batch) -> None:
        """Losses alone do not say what nothing would be."""
