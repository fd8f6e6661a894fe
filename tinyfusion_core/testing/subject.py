"""The objects that checks of a backbone and a loss use, and how an instance is made from a class."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..protocols.backbone import Backbone
from ..protocols.data import Tensors
from ..protocols.loss import LossAdapter
from ..protocols.task import Task
from ..pruning.gating import Gates
from ..pruning.removal import remove_blocks
from ..runtime.seeding import Rng, generator

T = TypeVar("T")
Pair = tuple[type[Backbone] | Backbone, type[LossAdapter] | LossAdapter]
"""A backbone and a loss that fit each other. Of a class, its `tiny()` instance is checked."""

NUM_ROWS = 5
"""Batch size of the checks."""


@dataclass(frozen=True)
class Subject:
    """A backbone and a loss to check.

    Args:
        backbone: an instance whose network runs in milliseconds.
        loss: an instance that fits it.
        wide: whether networks and prepared inputs are cast to float64.
    """

    backbone: Backbone
    loss: LossAdapter
    wide: bool = False

    @classmethod
    def of(cls, pair: Pair) -> Subject:
        """Return the subject for a pair; classes are replaced by their tiny instances."""
        backbone, loss = pair
        return cls(
            backbone if isinstance(backbone, Backbone) else backbone.tiny(),
            loss if isinstance(loss, LossAdapter) else loss.tiny(),
        )

    def batch(self) -> dict[str, Tensor]:
        """Return the backbone's example, each tensor (batch, ...); random numbers replace floating-point zeros."""
        batch = self.backbone.example(NUM_ROWS)
        rng = generator("conformance", "batch")
        return {
            name: torch.randn(t.shape, generator=rng).to(t) if t.is_floating_point() and not t.any() else t
            for name, t in batch.items()
        }

    def inputs(self) -> dict[str, Tensor]:
        """Return prepared inputs, each (batch, ...)."""
        inputs = self.loss.prepare(self.batch(), fixed_rng())
        return {name: t.double() if self.wide and t.is_floating_point() else t for name, t in inputs.items()}

    def gates(self, model: nn.Module) -> Gates:
        """Return gates for all blocks of a network; what probing a network of its own has shown holds for all."""
        return Gates(model, *self._probed)

    @cached_property
    def _probed(self) -> tuple[Any, ...]:
        batch = self.batch()
        task = Task(backbone=self.backbone, loss=self.loss, train=Tensors(batch), held_out=Tensors(batch))
        return task.blocks, task.batch_dim(task.teacher), task.streams, self.backbone.unneeded

    def network(self) -> nn.Module:
        """Return the full network."""
        model = self.backbone.build()
        return model.double() if self.wide else model

    def pruned(self, removed: Sequence[int]) -> nn.Module:
        """Return the network without these blocks."""
        model = self.network()
        blocks = self.backbone.unit_paths(model)
        remove_blocks(self.backbone, model, [blocks[i] for i in removed])
        return model.eval()

    def every_other(self) -> list[int]:
        """Return indices of blocks that can all be removed at once: every second one, starting with the second."""
        return list(range(1, len(self.backbone.unit_paths(self.backbone.build())), 2))


def precisely(subject: Subject, run: Callable[[Subject], T]) -> T:
    """Run a function in float64, where rounding decides nothing; if that fails, in the original precision."""
    with suppress(Exception):  # whatever a stranger's class raises; it raises it again if float64 is not the reason
        return run(replace(subject, wide=True))
    return run(subject)


def random_mask(num_blocks: int) -> Tensor:
    """Return zeros and ones, (batch, num_blocks), the same each time."""
    return (torch.rand(NUM_ROWS, num_blocks, generator=generator("conformance", "mask")) < 0.5).float()


def fixed_rng(first: int = 0) -> Rng:
    """Return the random streams of the rows from `first` on, the same each time."""
    return Rng(0, "conformance", step=3, first=first)


def made(thing: Any, *arguments: object, **options: object) -> tuple[Any, bool]:
    """Return the instance to check: made from a class, or the given instance.

    Args:
        thing: the class, or an instance. A class with a classmethod `tiny` is made by that.
        arguments: arguments that constructor and `tiny` always take.
        options: passed to the constructor if it has a parameter of that name.

    Returns:
        The instance, and whether it was given an option.

    Raises:
        UserError: the class needs more than that.
    """
    if not inspect.isclass(thing):
        return thing, False
    if hasattr(thing, "tiny"):
        return thing.tiny(*arguments), False
    taken = {name: value for name, value in options.items() if name in inspect.signature(thing).parameters}
    try:
        inspect.signature(thing).bind(*arguments, **taken)
    except TypeError as e:
        raise UserError(
            f"{thing.__name__} cannot be made to be checked: {e}; give it a classmethod `tiny` that returns a small one"
        ) from None
    return thing(*arguments, **taken), bool(taken)
