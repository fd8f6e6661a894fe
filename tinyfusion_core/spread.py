"""Work that processes share: each does a part, all get the whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from .progress import track
from .together import all_of, everywhere, on_main, place

T = TypeVar("T")
R = TypeVar("R")


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

    Raises:
        Exception: what `work` raised, as `together.everywhere` does.
    """
    found = all_of(lambda: [work(item) for item in share(items)])
    return [found[i % len(found)][i // len(found)] for i in range(len(items))]


def finish(batches: Sequence[range], done: Callable[[range], bool], work: Callable[[range], object], name: str) -> None:
    """Do the work that is not done yet, each process some of it; what it makes is kept in files that all can see.

    All processes must call it alike. It returns when everything is done.

    Args:
        batches: of the rows to work on.
        done: whether what a batch makes is there; asked on the main process.
        work: makes it, so that after an interruption it is there whole or not at all.
        name: what is being done, to show with the progress.
    """
    mine = share(on_main(lambda: [rows for rows in batches if not done(rows)]))

    def do() -> None:
        with track(name, sum(map(len, mine)), show=place()[0] == 0) as progress:
            for rows in mine:
                work(rows)
                progress.advance(len(rows))

    everywhere(do)
