"""Set samples apart, so that a network is never judged on what it was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from ..protocols.data import Prefetched, Samples, Sharded
from ..runtime.seeding import generator


class Part:
    """Some of the samples of a data set.

    Args:
        samples: the data set.
        indices: the samples of the part, in its order.
    """

    def __init__(self, samples: Samples, indices: Sequence[int]) -> None:
        self.samples, self.indices = samples, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """Return the named tensors of these samples of the part, each (rows, ...), one row per index."""
        return self.samples.__getitems__([self.indices[i] for i in indices])


class ShardedPart(Part):
    """Some of the samples of every shard.

    Args:
        samples: the data set.
        indices: the samples of the part, shard by shard.
        sizes: how many of them lie in each shard.
    """

    def __init__(self, samples: Sharded, indices: Sequence[int], sizes: Sequence[int]) -> None:
        super().__init__(samples, indices)
        self.sizes, self.mix = sizes, samples.mix

    def prefetch(self, indices: Sequence[int]) -> None:
        """Begin to read these samples of the part, where the data set can."""
        if isinstance(self.samples, Prefetched):
            self.samples.prefetch([self.indices[i] for i in indices])


def num_set_apart(samples: Samples, num: int) -> int:
    """Return how many samples `set_apart` takes where `num` are asked for: at most half of all."""
    return min(num, len(samples) // 2)


def set_apart(samples: Samples, num: int, seed: int, purpose: str) -> tuple[Part, Part]:
    """Split a data set at random.

    Args:
        samples: the data set.
        num: how many samples to set apart; at most half of them are.
        seed: the run's seed.
        purpose: distinguishes random streams.

    Returns:
        The samples that were not set apart, in shards if they were, and those that were.
    """
    order = torch.randperm(len(samples), generator=generator(seed, purpose, "set apart"))
    drawn = order[: num_set_apart(samples, num)].tolist()
    return without(samples, drawn), Part(samples, sorted(drawn))


def without(samples: Samples, gone: Sequence[int]) -> Part:
    """Return a data set without some of its samples, in shards if it was."""
    left = torch.ones(len(samples), dtype=torch.bool)
    left[torch.tensor(gone, dtype=torch.long)] = False
    others = left.nonzero().flatten().tolist()
    if not isinstance(samples, Sharded):
        return Part(samples, others)
    ends = [0, *accumulate(samples.sizes)]
    return ShardedPart(samples, others, [int(left[first:end].sum()) for first, end in pairwise(ends)])
