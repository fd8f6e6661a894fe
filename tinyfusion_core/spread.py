"""Work that processes share: each does a part, all get the whole.

Results travel, and processes wait, through a group of its own over CPUs (gloo), whatever device and backend the
networks train on: one process may take hours longer than the others without meeting the backend's timeout, and one
that dies ends the waiting of the others at once, because its connections close.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch.distributed as dist

from .errors import UserError
from .progress import track

T = TypeVar("T")
R = TypeVar("R")
PATIENCE = timedelta(days=1)
"""How long a process waits for the others; a guard against a machine that vanished without closing connections."""


def share(items: Sequence[T]) -> Sequence[T]:
    """The items that are this process's to work on, as `spread` deals them out."""
    rank, size = place()
    return items[rank::size]


def spread(items: Sequence[T], work: Callable[[T], R]) -> list[R]:
    """Do some work for every item, each process for its share of them. All processes must call it alike.

    Args:
        items: the same on every process; there may be fewer of them than processes.
        work: must not depend on which process does it. Its results are pickled: tensors belong on the CPU.

    Returns:
        The results for all items, in their order, on every process.
    """
    mine = [work(item) for item in share(items)]
    _, size = place()
    if size == 1:
        return mine
    found: list[Any] = [None] * size
    dist.all_gather_object(found, mine, group=_group())
    return [found[i % size][i // size] for i in range(len(items))]


def finish(batches: Sequence[range], done: Callable[[range], bool], work: Callable[[range], object], name: str) -> None:
    """Do the work that is not done yet, each process some of it; what it makes is kept in files that all can see.

    All processes must call it alike. It returns when everything is done.

    Args:
        batches: of the rows to work on.
        done: whether what a batch makes is there; asked on the main process.
        work: makes it, so that after an interruption it is there whole or not at all.
        name: what is being done, to show with the progress.
    """
    mine = share(alone(lambda: [rows for rows in batches if not done(rows)]))
    with track(name, sum(map(len, mine)), show=place()[0] == 0) as progress:
        for rows in mine:
            work(rows)
            progress.advance(len(rows))
    wait()


def alone(work: Callable[[], R]) -> R:
    """Do something on the main process, while the others wait; all get its result. All must call it alike.

    Raises:
        UserError: what `work` raised, on every process.
    """
    rank, size = place()
    if size == 1:
        return work()
    told: list[Any] = [None, None]
    if rank == 0:
        try:
            told[0] = work()
        except UserError as e:
            told[1] = e
    dist.broadcast_object_list(told, src=0, group=_group())
    if told[1] is not None:
        raise told[1]
    result: R = told[0]
    return result


def wait() -> None:
    """Wait until every process has come here."""
    if place()[1] > 1:
        dist.barrier(group=_group())


def place() -> tuple[int, int]:
    """The number of this process, and of all processes."""
    if not dist.is_available() or not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


@cache
def _group() -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    assert isinstance(group, dist.ProcessGroup)
    return group
