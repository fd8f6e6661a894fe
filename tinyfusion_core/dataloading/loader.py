"""Reading training data that may be damaged, in this process or in others."""

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
"""Samples to try in the place of a bad one."""
BUGS = (TypeError, AttributeError, NameError, AssertionError, NotImplementedError)
"""What a data set's code raises, not its files."""


@dataclass(frozen=True)
class Read:
    """A batch, and what could not be read for it.

    Attributes:
        batch: the named tensors; None when there was nothing to put in the place of a bad sample.
        bad: for every bad sample what was wrong.
    """

    batch: Batch | None
    bad: tuple[str, ...] = ()


def read_batches(data: Samples, indices: Iterable[list[int]], num_workers: int) -> Iterator[Read]:
    """Read batches of samples, in other processes when there are workers.

    A sample that cannot be read is replaced by another, which depends on its index alone: any number of processes puts
    the same one in its place.

    Args:
        data: the samples.
        indices: of each batch.
        num_workers: processes that read; 0 reads in this one.

    Raises:
        UserError: a process that reads has been killed.
    """
    loader: DataLoader[Any] = DataLoader(
        _Tolerant(data),  # type: ignore[arg-type]  # read by lists of indices, see Samples
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


class _Tolerant:
    """Samples, as `Read` instead of an exception: one that was raised in another process would lose its words."""

    def __init__(self, data: Samples) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitems__(self, indices: list[int]) -> Read:
        try:
            return Read(self.data.__getitems__(indices))
        except BUGS:
            raise
        except Exception:  # whatever a data set makes of a damaged file; rows read alone will tell which one
            return self._mended(indices)

    def _mended(self, indices: list[int]) -> Read:
        instead, bad = list(indices), []
        for row, index in enumerate(indices):
            problem = self._problem(index)
            if problem is None:
                continue
            bad.append(f"training sample {index} cannot be read: {problem}")
            others = (seed_of("in the place of", index, i) % len(self.data) for i in range(ATTEMPTS))
            found = next((other for other in others if self._problem(other) is None), None)
            if found is None:
                return Read(None, tuple(bad))
            instead[row] = found
        return Read(self.data.__getitems__(instead), tuple(bad))

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
