"""What the checks of a backbone and a loss look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..protocols.backbone import Backbone
from ..protocols.data import Tensors
from ..protocols.loss import LossAdapter
from ..protocols.task import Task
from ..pruning.gating import Gates
from ..pruning.prune import remove_blocks
from ..runtime.seeding import Rng, generator

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
    """

    backbone: Backbone
    loss: LossAdapter

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
        return self.loss.prepare(self.batch(), fixed_rng())

    def gates(self, model: nn.Module) -> Gates:
        """Gates for all blocks."""
        batch = self.batch()
        task = Task(backbone=self.backbone, loss=self.loss, train=Tensors(batch), held_out=Tensors(batch), model=model)
        return Gates(model, task.blocks, task.batch_dim(model), self.backbone.streams)

    def pruned(self, removed: Sequence[int]) -> nn.Module:
        """The network without these blocks."""
        model = self.backbone.build()
        blocks = self.backbone.block_paths(model)
        remove_blocks(self.backbone, model, [blocks[i] for i in removed])
        return model.eval()

    def every_other(self) -> list[int]:
        """Indices of blocks that can all be removed together: every second one, the first stays."""
        return list(range(1, len(self.backbone.block_paths(self.backbone.build())), 2))


def random_mask(num_blocks: int) -> Tensor:
    """(B, N) zeros and ones, the same each time."""
    return (torch.rand(NUM_ROWS, num_blocks, generator=generator("conformance", "mask")) < 0.5).float()


def fixed_rng(first: int = 0) -> Rng:
    """The streams of the rows from `first` on, the same each time."""
    return Rng(0, "conformance", step=3, first=first)
