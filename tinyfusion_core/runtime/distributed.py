"""Several processes, one outcome: what fails on one of them fails on all, instead of leaving them waiting."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import FailedElsewhere, Interrupted, UserError
from .progress import track

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")
R = TypeVar("R")
PATIENCE = timedelta(days=1)
"""How long a process waits for the others; a guard against a machine that vanished without closing connections."""


_alone = False
"""Whether this process does something that the others wait for."""


def rank_and_world_size() -> tuple[int, int]:
    """The number of this process, and of all that work together: it alone, within `on_main_process`."""
    if _alone or not dist.is_available() or not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def all_gather_object(mine: T) -> list[T]:
    """What every process says, in their order; by pickle, so tensors belong on the CPU. All must call it alike."""
    _, size = rank_and_world_size()
    if size == 1:
        return [mine]
    found: list[Any] = [None] * size
    dist.all_gather_object(found, mine, group=_group())
    return found


def on_every_rank(work: Callable[[], T]) -> T:
    """Do something on every process, and wait for all of them.

    Args:
        work: must not wait for another process half-way, unless all of them fail alike.

    Returns:
        What `work` gave on this process.

    Raises:
        Exception: whatever `work` raised first in the order of the processes, on the process where it did.
        FailedElsewhere: on the others.
        Interrupted: on all of them, when one was asked to stop.
    """
    result, _ = _exchange(work, share=False)
    return result


def on_main_process(work: Callable[[], T]) -> T:
    """Do something on the main process alone and hand its result, by pickle, to all.

    Raises what `on_every_rank` does.
    """

    def mine() -> T | None:
        global _alone
        if rank_and_world_size()[0] != 0:
            return None
        before, _alone = _alone, True
        try:
            return work()
        finally:
            _alone = before

    return gather_results(mine)[0]  # type: ignore[return-value]  # the main process's is a T


def gather_results(work: Callable[[], T]) -> list[T]:
    """Do something on every process and give all of them what each made, by pickle.

    Raises what `on_every_rank` does.
    """
    _, results = _exchange(work, share=True)
    return results


def shutdown() -> None:
    """End the work of several processes, as the last thing that a program does.

    A backend's threads that are still there when the interpreter goes can abort a process whose work is done.
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _exchange(work: Callable[[], T], share: bool) -> tuple[T, list[T]]:
    """What `work` gave here, and, when it is to be shared, on each process."""
    if rank_and_world_size()[1] == 1:
        result = work()
        return result, [result]
    result, error = cast(T, None), None
    try:
        result = work()
    except (Exception, KeyboardInterrupt) as e:
        error = e
    signum = getattr(error, "signum", signal.SIGINT) if isinstance(error, KeyboardInterrupt) else None
    mine: tuple[Any, Any, Any] = (None if error is None else str(error), signum, result if share else None)
    answers = all_gather_object(mine)
    failed = [process for process, (message, _, _) in enumerate(answers) if message is not None]
    if not failed:
        return result, [shared for _, _, shared in answers]
    if error is not None and failed[0] == rank_and_world_size()[0]:
        raise error
    message, signum, _ = answers[failed[0]]
    raise FailedElsewhere(message) if signum is None else Interrupted(message, signum)


@cache
def _group() -> dist.ProcessGroup:
    """Over CPUs (gloo), whatever device and backend the networks train on.

    One process may take hours longer than the others without meeting the backend's timeout, and one that dies ends the
    waiting of the others at once, because its connections close.
    """
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    assert isinstance(group, dist.ProcessGroup)
    return group


def batches(num: int, size: int) -> list[range]:
    """The rows [0, num) in batches, the last one shorter: what processes share out."""
    return [range(first, min(first + size, num)) for first in range(0, num, size)]


def local_share(items: Sequence[T]) -> Sequence[T]:
    """The items that are this process's to work on, as `map_sharded` deals them out."""
    rank, size = rank_and_world_size()
    return items[rank::size]


def map_sharded(items: Sequence[T], work: Callable[[T], R]) -> list[R]:
    """Do some work for every item, each process for its share of them. All processes must call it alike.

    Args:
        items: the same on every process; there may be fewer of them than processes.
        work: must not depend on which process does it. Its results are pickled: tensors belong on the CPU.

    Returns:
        The results for all items, in their order, on every process.

    Raises:
        Exception: what `work` raised, as `on_every_rank` does.
    """
    found = gather_results(lambda: [work(item) for item in local_share(items)])
    return [found[i % len(found)][i // len(found)] for i in range(len(items))]


def complete_sharded(
    batches: Sequence[range], done: Callable[[range], bool], work: Callable[[range], object], name: str
) -> None:
    """Do the work that is not done yet, each process some of it; what it makes is kept in files that all can see.

    All processes must call it alike. It returns when everything is done.

    Args:
        batches: of the rows to work on.
        done: whether what a batch makes is there; asked on the main process.
        work: makes it, so that after an interruption it is there whole or not at all.
        name: what is being done, to show with the progress.
    """
    mine = local_share(on_main_process(lambda: [rows for rows in batches if not done(rows)]))

    def do() -> None:
        with track(name, sum(map(len, mine)), show=rank_and_world_size()[0] == 0) as progress:
            for rows in mine:
                work(rows)
                progress.advance(len(rows))

    on_every_rank(do)


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(tensors: Iterable[Tensor]) -> Tensor:
    """(3,) float32 on the CPU, small whole numbers that a different bit in a tensor changes: cheap to send along."""
    total = 0
    for position, t in enumerate(tensors, 1):
        bits = t.detach().contiguous().view(_BITS[t.element_size()])
        total += position * int(bits.sum(dtype=torch.int64))
    return torch.tensor([float(total >> shift & 0xFFFF) for shift in (0, 16, 32)])


def check_ranks_agree(accelerator: Accelerator, tensors: Iterable[Tensor], what: str) -> None:
    """Every process must call it.

    Raises:
        UserError: the processes do not hold the same tensors; raised on all of them.
    """
    check_rows_agree(accelerator.gather(fingerprint(tensors)[None].to(accelerator.device)), what)


def check_rows_agree(rows: Tensor, what: str) -> None:
    """Raises UserError unless all rows of fingerprints, one for each process, are the same."""
    odd = (rows != rows[0]).any(1).nonzero().flatten().tolist()
    if odd:
        raise UserError(
            f"{what} of process {', '.join(map(str, odd))} of {len(rows)} are not those of process 0. Give all "
            "processes the same files, versions and kind of device, then run again to go on from the last checkpoint"
        )
