"""The data loader: reads training samples, here or in worker processes, and substitutes damaged ones."""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader

from ..errors import UserError
from ..protocols.backbone import Batch
from ..protocols.data import Prefetched, Samples
from ..runtime.seeding import seed_of

AHEAD = 32
"""How many batches after a batch the samples are that data are told of, so that they begin to read them."""
ATTEMPTS = 8
"""How many substitutes to try for a bad sample."""
BUGS = (TypeError, AttributeError, NameError, AssertionError, NotImplementedError)
"""Exceptions that mean a bug in the data set's code, not a damaged file."""


@dataclass(frozen=True)
class LoadedBatch:
    """A batch, and what could not be read for it.

    Attributes:
        batch: the named tensors; None if no substitute was found for a bad sample.
        problems: one message for every bad sample.
    """

    batch: Batch | None
    problems: tuple[str, ...] = ()


def load_batches(data: Samples, indices: Iterable[list[int]], num_workers: int) -> Iterator[LoadedBatch]:
    """Load batches of samples, in worker processes if there are any.

    A sample that cannot be read is substituted by another. The substitute depends on the index of the bad sample only,
    so it is the same for any number of processes.

    Args:
        data: the samples.
        indices: indices of each batch.
        num_workers: worker processes; 0 reads in this one.

    Raises:
        UserError: a worker process was killed.
    """
    loader: DataLoader[Any] = DataLoader(
        _Substituting(data),  # type: ignore[arg-type]  # read by lists of indices, see Samples
        batch_sampler=_requests(indices) if isinstance(data, Prefetched) else indices,
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
    """Samples with substitutes for bad ones.

    Problems are returned, not raised: an exception in a worker process loses its message.
    """

    def __init__(self, data: Samples) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitems__(self, indices: list[int]) -> LoadedBatch:
        if isinstance(indices, _Request) and isinstance(self.data, Prefetched):
            self.data.prefetch(indices.soon)
        for _ in range(2):  # what comes from far away may be cut short once
            try:
                return LoadedBatch(self.data.__getitems__(indices))
            except BUGS:
                raise
            except Exception:  # whatever a data set makes of a damaged file; rows read alone will tell which one
                continue
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


class _Request(list[int]):
    """Indices of a batch, with those of samples that will be asked for later on."""

    soon: list[int]


def _requests(batches: Iterable[list[int]]) -> Iterator[_Request]:
    """The same batches, each with the one that comes `AHEAD` batches after it; the first with all until there."""
    later = iter(batches)
    first = list(islice(later, AHEAD))
    waiting, soon = deque(first), [index for batch in first for index in batch]
    while waiting:
        request = _Request(waiting.popleft())
        if (batch := next(later, None)) is not None:
            waiting.append(batch)
            soon += batch
        request.soon, soon = soon, []
        yield request


def _leave_stopping_to_the_trainer(worker: int) -> None:
    """Ignore stop signals in workers: schedulers and Ctrl-C reach them too, but the current step needs its data."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)


def _as_is(batch: Any) -> Any:
    return batch
