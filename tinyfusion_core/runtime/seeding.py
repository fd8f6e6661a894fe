"""Randomness as a pure function of (seed, stage, step, row, purpose).

Nothing here keeps state. A run that was killed and resumed, or one spread over several processes, draws
the very numbers of an uninterrupted run in one process, and there is no generator to save.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

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
