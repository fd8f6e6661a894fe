"""Randomness as a pure function of (seed, stage, step, row, purpose).

Nothing here keeps state. A run that was killed and resumed, or one spread over several processes, draws
the very numbers of an uninterrupted run in one process, and there is no generator to save.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor


def seed_of(*key: object) -> int:
    """A 56-bit seed from any key of strings and numbers."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=7).digest(), "little")


def generator(*key: object) -> torch.Generator:
    """A CPU generator seeded by the key."""
    return torch.Generator().manual_seed(seed_of(*key))


@dataclass(frozen=True)
class Rng:
    """The random streams of one batch: row `i` draws from its own stream, that of global row `first + i`.

    Args:
        seed: the run's seed.
        stage: the stage that draws (`"search"`, `"recover"`, ...).
        step: the optimizer update, or the batch number of an evaluation.
        first: global index of row 0 within the step.
        strata: when positive, scalar draws are spread evenly over that many rows (one row in each of
            `strata` equal intervals, shuffled anew for every purpose). Evaluations use it: the same
            expectation at a fraction of the variance. 0 draws independently.
    """

    seed: int
    stage: str
    step: int = 0
    first: int = 0
    strata: int = 0

    def batch(self, purpose: str) -> torch.Generator:
        """One generator for the whole batch, the same on every process; an evaluation's batches each have their own."""
        part = (self.first,) if self.strata else ()
        return generator(self.seed, self.stage, self.step, purpose, *part)

    def normal(self, purpose: str, like: Tensor) -> Tensor:
        """Standard normal numbers with the shape (B, ...), dtype and device of `like`."""
        return self._rows(purpose, like.shape, Tensor.normal_).to(like)

    def uniform(self, purpose: str, num_rows: int, *shape: int) -> Tensor:
        """(B, *shape) numbers in [0, 1), float64 on the CPU; scalar ones stratified when `strata` is set."""
        u = self._rows(purpose, torch.Size([num_rows, *shape]), Tensor.uniform_, torch.float64)
        if self.strata and not shape:
            order = torch.randperm(self.strata, generator=generator(self.seed, self.stage, self.step, purpose))
            rows = torch.arange(self.first, self.first + num_rows)
            u = (order[rows % self.strata] + u) / self.strata
        return u

    def integers(self, purpose: str, high: int, num_rows: int, *shape: int) -> Tensor:
        """(B, *shape) integers in [0, high), int64 on the CPU."""
        return (self.uniform(purpose, num_rows, *shape) * high).long()

    def gumbel(self, purpose: str, num_rows: int, num_columns: int) -> Tensor:
        """(B, K) standard Gumbel numbers, `-ln E` with E ~ Exp(1), float32 on the CPU."""
        return -self._rows(purpose, torch.Size([num_rows, num_columns]), Tensor.exponential_).log()

    def _rows(
        self,
        purpose: str,
        shape: torch.Size,
        fill: Callable[..., Tensor],
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        out = torch.empty(shape, dtype=dtype)
        stream = torch.Generator()
        for i, row in enumerate(out.view(shape[0], -1)):
            stream.manual_seed(seed_of(self.seed, self.stage, self.step, purpose, self.first + i))
            fill(row, generator=stream)
        return out


class Order:
    """The order in which a stage sees its data: a fresh permutation for every pass over it.

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
        """For every step in [start, stop): the data indices of rows [first, first + count)."""
        for step in range(start, stop):
            base = step * self.batch_size + first
            yield [self[base + i] for i in range(count)]


class ShardedOrder(Order):
    """An order for data that lie in shards: every pass sees every sample once, and a batch touches few shards.

    A pass lines up the shards in a fresh order, the samples of each in a fresh order. `mix` readers set out from
    evenly spaced points of this line, and each feeds rows of its own in every batch: neighbouring rows, so that a
    process reads the shards of its rows alone. The order does not depend on the number of processes.

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
        """Line up the shards, and find where each reader sets out so that together they read everything once."""
        self._epoch = epoch
        self._shards = torch.randperm(len(self._sizes), generator=generator(*self.key, epoch, "shards")).tolist()
        self._ends = list(accumulate(self._sizes[shard] for shard in self._shards))
        first, end = epoch * self.num_samples, (epoch + 1) * self.num_samples
        begun = [self._read(reader, first) for reader in range(self._mix)]
        shares = [self._read(reader, end) - begun[reader] for reader in range(self._mix)]
        # Less what earlier passes have read: `_read` counts from the very first position.
        self._starts = [start - done for start, done in zip(accumulate([0, *shares]), begun, strict=False)]

    def _read(self, reader: int, position: int) -> int:
        """How many samples this reader has fed before a position."""
        steps, row = divmod(position, self.batch_size)
        first, end = self._first_rows[reader : reader + 2]
        return steps * (end - first) + min(max(row - first, 0), end - first)

    def _permute(self, epoch: int, shard: int) -> Tensor:
        return torch.randperm(self._sizes[shard], generator=generator(*self.key, epoch, shard))
