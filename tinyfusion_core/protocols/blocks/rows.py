"""Which rows of a batch run through a block, under a mask."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...runtime.seeding import to_device

Rows = tuple[Tensor, Tensor, Tensor]
"""Indices of the rows that keep a block, of those to run with the graph, and of the others whose values are needed."""


def split_rows(mask: Tensor, weight: Tensor) -> Rows:
    """Split the rows of a batch for one block.

    Attention code cannot take zero samples, and every parameter needs a gradient on every process: if nothing is
    kept, the first dropped row is run with the graph.

    Args:
        mask: (batch,) ones where the block is kept.
        weight: (batch,) of the dropped rows those of weight zero are not needed.
    """
    kept, dropped = mask.nonzero().flatten(), (mask == 0).nonzero().flatten()
    run, rest = (kept, dropped) if len(kept) else (dropped[:1], dropped[1:])
    return kept, run, rest[weight[rest] > 0]


def moved(blocks: Sequence[Rows], device: torch.device) -> Sequence[Rows]:
    """Return the rows of all blocks on a device, after one transfer, for which nothing waits."""
    if device.type == "cpu":
        return blocks
    packed = torch.cat([rows for block in blocks for rows in block])
    parts = torch.split(to_device(packed, device), [len(rows) for block in blocks for rows in block])
    return [(parts[i], parts[i + 1], parts[i + 2]) for i in range(0, len(parts), 3)]
