"""The data loader: reads training samples, here or in worker processes, and substitutes those that are damaged."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader

from ..errors import UserError
from ..protocols.backbone import Batch
from ..protocols.data import Samples
from ..runtime.seeding import seed_of

ATTEMPTS = 8
"""Substitutes to try for a bad sample."""
BUGS = (TypeError, AttributeError, NameError, AssertionError, NotImplementedError)
"""What a data set's code raises, not its files."""


@dataclass(frozen=True)
class LoadedBatch:
    """A batch, and what could not be read for it.

    Attributes:
        batch: the named tensors; None when no substitute was found for a bad sample.
        problems: for every bad sample what was wrong.
    """

    batch: Batch | None
    problems: tuple[str, ...] = ()


def load_batches(data: Samples, indices: Iterable[list[int]], num_workers: int) -> Iterator[LoadedBatch]:
    """Load batches of samples, in other processes when there are workers.

    Another sample is substituted for one that cannot be read. It depends on the bad one's index alone, so any number
    of processes takes the same one.

    Args:
        data: the samples.
        indices: of each batch.
        num_workers: processes that read; 0 reads in this one.

    Raises:
        UserError: a process that reads has been killed.
    """
    loader: DataLoader[Any] = DataLoader(
        _Substituting(data),  # type: ignore[arg-type]  # read by lists of indices, see Samples
        batch_sampler=indices,
        collate_fn=_as_is,
        num_workers=num_workers,
        worker_init_fn=_leave_stopping_to_the_trainer,
        generator=torch.Generator(),  # else the loader draws from the global generator
    )
    try:
        yield from loader
    except RuntimeError as e:
        if "DataLoader worker" not in str(e):
            raise
        raise UserError(
            f"trainer.num_workers: a process that reads data was killed ({e}). If memory ran out, set fewer; "
            "run again to go on from the last checkpoint"
        ) from e


class _Substituting:
    """Samples, with others for bad ones; no exception, for one raised in a worker process would lose its message."""

    def __init__(self, data: Samples) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitems__(self, indices: list[int]) -> LoadedBatch:
        try:
            return LoadedBatch(self.data.__getitems__(indices))
        except BUGS:
            raise
        except Exception:  # whatever a data set makes of a damaged file; rows read alone will tell which one
            return self._substituted(indices)

    def _substituted(self, indices: list[int]) -> LoadedBatch:
        chosen, problems = list(indices), []
        for row, index in enumerate(indices):
            problem = self._problem(index)
            if problem is None:
                continue
            problems.append(f"training sample {index} cannot be read: {problem}")
            others = (seed_of("in the place of", index, i) % len(self.data) for i in range(ATTEMPTS))
            found = next((other for other in others if self._problem(other) is None), None)
            if found is None:
                return LoadedBatch(None, tuple(problems))
            chosen[row] = found
        return LoadedBatch(self.data.__getitems__(chosen), tuple(problems))

    def _problem(self, index: int) -> str | None:
        try:
            self.data.__getitems__([index])
        except BUGS:
            raise
        except Exception as e:
            return str(e) if isinstance(e, UserError) else f"{type(e).__name__}: {e}"
        return None


def _leave_stopping_to_the_trainer(worker: int) -> None:
    """A scheduler and Ctrl-C send their signal to readers too, but the step that has begun needs its data."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)


def _as_is(batch: Any) -> Any:
    return batch
