"""What the checks of a backbone and a loss look at, and how an instance to check is made of a class."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
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
"""Rows of the batch that checks run."""


@dataclass(frozen=True)
class Subject:
    """What a check looks at.

    Args:
        backbone: an instance whose network runs in milliseconds.
        loss: an instance that fits it.
        wide: networks and prepared inputs are cast to float64.
    """

    backbone: Backbone
    loss: LossAdapter
    wide: bool = False

    @classmethod
    def of(cls, pair: Pair) -> Subject:
        """Classes stand for their tiny instances."""
        backbone, loss = pair
        return cls(
            backbone if isinstance(backbone, Backbone) else backbone.tiny(),
            loss if isinstance(loss, LossAdapter) else loss.tiny(),
        )

    def batch(self) -> dict[str, Tensor]:
        """The backbone's example; where a tensor of numbers is all zeros, random ones in its place."""
        batch = self.backbone.example(NUM_ROWS)
        rng = generator("conformance", "batch")
        return {
            name: torch.randn(t.shape, generator=rng).to(t) if t.is_floating_point() and not t.any() else t
            for name, t in batch.items()
        }

    def inputs(self) -> dict[str, Tensor]:
        """Prepared inputs."""
        inputs = self.loss.prepare(self.batch(), fixed_rng())
        return {name: t.double() if self.wide and t.is_floating_point() else t for name, t in inputs.items()}

    def gates(self, model: nn.Module) -> Gates:
        """Gates for all blocks of a network; a new one is probed, which is not cast."""
        batch = self.batch()
        task = Task(backbone=self.backbone, loss=self.loss, train=Tensors(batch), held_out=Tensors(batch))
        return Gates(model, task.blocks, task.batch_dim(task.teacher), self.backbone.streams)

    def network(self) -> nn.Module:
        """The whole network."""
        model = self.backbone.build()
        return model.double() if self.wide else model

    def pruned(self, removed: Sequence[int]) -> nn.Module:
        """The network without these blocks."""
        model = self.network()
        blocks = self.backbone.block_paths(model)
        remove_blocks(self.backbone, model, [blocks[i] for i in removed])
        return model.eval()

    def every_other(self) -> list[int]:
        """Indices of blocks that can all be removed together: every second one, the first stays."""
        return list(range(1, len(self.backbone.block_paths(self.backbone.build())), 2))


def precisely(subject: Subject, run: Callable[[Subject], T]) -> T:
    """What `run` finds in float64, where rounding decides nothing; as things are when they cannot be run in it."""
    with suppress(Exception):  # whatever a stranger's class raises; it raises it again if float64 is not the reason
        return run(replace(subject, wide=True))
    return run(subject)


def random_mask(num_blocks: int) -> Tensor:
    """(B, N) zeros and ones, the same each time."""
    return (torch.rand(NUM_ROWS, num_blocks, generator=generator("conformance", "mask")) < 0.5).float()


def fixed_rng(first: int = 0) -> Rng:
    """The streams of the rows from `first` on, the same each time."""
    return Rng(0, "conformance", step=3, first=first)


def made(thing: Any, *arguments: object, **options: object) -> tuple[Any, bool]:
    """The instance to check of a class, or an instance as it is.

    Args:
        thing: the class, or an instance. Of a class that has a classmethod `tiny` it is what that returns.
        arguments: what constructor and `tiny` take in any case.
        options: what the constructor gets of these is what it has a parameter for.

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
