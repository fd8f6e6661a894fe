"""Random numbers as a pure function of (seed, stage, step, row, purpose).

Nothing here keeps state: a run that was killed and resumed, or one spread over several processes, draws the same
numbers as an uninterrupted run in one process, and there is no generator state to save.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError


def seed_of(*key: object) -> int:
    """Hash a key of strings and numbers to a 56-bit seed."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=7).digest(), "little")


def generator(*key: object) -> torch.Generator:
    """Return a CPU generator seeded by a key of strings and numbers."""
    return torch.Generator().manual_seed(seed_of(*key))


def seed_forward(seed: int, device: torch.device) -> None:
    """Seed the global generators from which dropout and its like draw on a device.

    On the CPU it is `torch.manual_seed` without what that does for accelerators: it takes 4 ms to note down, with the
    stack of the caller, the seed of each kind that is not in use.
    """
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


def to_device(values: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Send what was drawn in main memory to a device, and wait for nothing.

    Args:
        values: of any shape.
        device: where to.
        dtype: what they become; by default they stay what they are.
    """
    values = values.to(dtype or values.dtype)
    pinned = device.type == "cuda" and values.device.type == "cpu"  # or the copy waits all the same
    return (values.pin_memory() if pinned else values).to(device, non_blocking=True)


@dataclass(frozen=True)
class Rng:
    """The random streams of one batch: row `i` draws from the stream of global row `first + i`.

    Args:
        seed: the run's seed.
        stage: the stage that draws (`"search"`, `"recover"`, ...).
        step: the optimizer update, or the batch number of an evaluation.
        first: global index of row 0 within the step.
        strata: if positive, scalar draws are stratified over that many rows: one row in each of `strata` equal
            intervals, shuffled anew for every purpose. Evaluations use it: the same expectation with far less variance.
            0 draws independently.
        rows: global index of every row, where they do not follow one another; then nothing can be drawn for the batch.
    """

    seed: int
    stage: str
    step: int = 0
    first: int = 0
    strata: int = 0
    rows: tuple[int, ...] | None = None

    def batch(self, purpose: str) -> torch.Generator:
        """Return one generator for the whole batch, the same on every process.

        With `strata`, each batch of an evaluation has its own.

        Raises:
            UserError: the rows come from different batches.
        """
        if self.rows is not None:
            raise UserError(f"the objective draws '{purpose}' once for a batch; a cache keeps what is drawn by row")
        part = (self.first,) if self.strata else ()
        return generator(self.seed, self.stage, self.step, purpose, *part)

    def normal(self, purpose: str, like: Tensor) -> Tensor:
        """Draw standard normal numbers.

        Args:
            purpose: name of the stream.
            like: (batch, ...) tensor that gives shape, dtype and device.

        Returns:
            (batch, ...), the same shape as `like`.
        """
        return to_device(self._rows(purpose, like.shape, Tensor.normal_), like.device, like.dtype)

    def uniform(self, purpose: str, num_rows: int, *shape: int) -> Tensor:
        """Draw uniform numbers in [0, 1); scalar ones are stratified if `strata` is set.

        Args:
            purpose: name of the stream.
            num_rows: batch size.
            shape: dimensions of each row.

        Returns:
            (batch, *shape), float64 on the CPU.
        """
        u = self._rows(purpose, torch.Size([num_rows, *shape]), Tensor.uniform_, torch.float64)
        if self.strata and not shape:
            order = torch.randperm(self.strata, generator=generator(self.seed, self.stage, self.step, purpose))
            rows = torch.arange(self.first, self.first + num_rows)
            u = (order[rows % self.strata] + u) / self.strata
        return u

    def integers(self, purpose: str, high: int, num_rows: int, *shape: int) -> Tensor:
        """Draw integers in [0, high): (batch, *shape), int64 on the CPU."""
        return (self.uniform(purpose, num_rows, *shape) * high).long()

    def gumbel(self, purpose: str, num_rows: int, num_columns: int) -> Tensor:
        """Draw standard Gumbel noise, `-ln E` with E ~ Exp(1): (batch, num_columns), float32 on the CPU."""
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
            number = self.first + i if self.rows is None else self.rows[i]
            stream.manual_seed(seed_of(self.seed, self.stage, self.step, purpose, number))
            fill(row, generator=stream)
        return out
