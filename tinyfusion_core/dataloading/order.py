"""The order in which a stage sees its samples: a fresh permutation for every epoch, a function of the seed."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from ..protocols.data import Samples, Sharded
from ..runtime.seeding import generator


class Order:
    """The order in which a stage sees its data: a fresh permutation for every epoch.

    Args:
        seed: the run's seed.
        stage: the stage that reads.
        num_samples: length of the data set.
        batch_size: samples of one step over all processes.
    """

    def __init__(self, seed: int, stage: str, num_samples: int, batch_size: int) -> None:
        self.key = (seed, stage, "order")
        self.num_samples, self.batch_size = num_samples, batch_size
        self._epoch, self._permutation = -1, torch.empty(0, dtype=torch.long)

    def __getitem__(self, position: int) -> int:
        epoch, i = divmod(position, self.num_samples)
        if epoch != self._epoch:
            self._epoch = epoch
            self._permutation = torch.randperm(self.num_samples, generator=generator(*self.key, epoch))
        return int(self._permutation[i])

    def steps(self, start: int, stop: int, first: int, count: int) -> Iterator[list[int]]:
        """Yield, for every step in [start, stop), the data indices of rows [first, first + count)."""
        for step in range(start, stop):
            base = step * self.batch_size + first
            yield [self[base + i] for i in range(count)]


class ShardedOrder(Order):
    """An order for data in shards: every epoch sees every sample once, and a batch touches few shards.

    An epoch lines up the shards in a fresh order, and the samples of each in a fresh order. `mix` readers start from
    evenly spaced points of this line, and each fills its own rows of every batch: neighbouring rows, so that a process
    only reads the shards of its rows. The order does not depend on the number of processes.

    Args:
        seed: the run's seed.
        stage: the stage that reads.
        sizes: number of samples in each shard, in the order of their indices.
        batch_size: samples of one step over all processes.
        mix: how many shards a batch is drawn from.
    """

    def __init__(self, seed: int, stage: str, sizes: Sequence[int], batch_size: int, mix: int) -> None:
        super().__init__(seed, stage, sum(sizes), batch_size)
        self._sizes, self._mix = sizes, mix
        self._offsets = [0, *accumulate(sizes)]
        self._first_rows = [-(-reader * batch_size // mix) for reader in range(mix + 1)]
        # Two shards for each reader: the one that it is in, and the next, which the last rows of a batch may begin.
        self._permuted = lru_cache(maxsize=2 * mix)(self._permute)
        self._shards: list[int] = []

    def __getitem__(self, position: int) -> int:
        epoch = position // self.num_samples
        if epoch != self._epoch:
            self._begin(epoch)
        reader = position % self.batch_size * self._mix // self.batch_size
        i = self._starts[reader] + self._read(reader, position)
        place = bisect.bisect_right(self._ends, i)
        shard = self._shards[place]
        inside = i - self._ends[place] + self._sizes[shard]
        return self._offsets[shard] + int(self._permuted(epoch, shard)[inside])

    def _begin(self, epoch: int) -> None:
        """Line up the shards, and choose where each reader starts so that the readers cover every sample once."""
        self._epoch = epoch
        self._shards = torch.randperm(len(self._sizes), generator=generator(*self.key, epoch, "shards")).tolist()
        self._ends = list(accumulate(self._sizes[shard] for shard in self._shards))
        first, end = epoch * self.num_samples, (epoch + 1) * self.num_samples
        begun = [self._read(reader, first) for reader in range(self._mix)]
        shares = [self._read(reader, end) - begun[reader] for reader in range(self._mix)]
        # Less what earlier passes have read: `_read` counts from the very first position.
        self._starts = [start - done for start, done in zip(accumulate([0, *shares]), begun, strict=False)]

    def _read(self, reader: int, position: int) -> int:
        """How many samples this reader has supplied before a position."""
        steps, row = divmod(position, self.batch_size)
        first, end = self._first_rows[reader : reader + 2]
        return steps * (end - first) + min(max(row - first, 0), end - first)

    def _permute(self, epoch: int, shard: int) -> Tensor:
        return torch.randperm(self._sizes[shard], generator=generator(*self.key, epoch, shard))


def order_of(samples: Samples, seed: int, stage: str, batch_size: int) -> Order:
    """Return the order in which a stage sees its samples; by shards where the data are in shards."""
    if isinstance(samples, Sharded):
        return ShardedOrder(seed, stage, samples.sizes, batch_size, samples.mix)
    return Order(seed, stage, len(samples), batch_size)
