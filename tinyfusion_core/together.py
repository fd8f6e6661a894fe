"""Several processes, one outcome: what fails on one of them fails on all, instead of leaving them waiting."""

from __future__ import annotations

import signal
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar, cast

import torch.distributed as dist

from .errors import FailedElsewhere, Interrupted

T = TypeVar("T")
PATIENCE = timedelta(days=1)
"""How long a process waits for the others; a guard against a machine that vanished without closing connections."""


_alone = False
"""Whether this process does something that the others wait for."""


def place() -> tuple[int, int]:
    """The number of this process, and of all that work together: it alone, within `on_main`."""
    if _alone or not dist.is_available() or not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def told(mine: T) -> list[T]:
    """What every process says, in their order; by pickle, so tensors belong on the CPU. All must call it alike."""
    _, size = place()
    if size == 1:
        return [mine]
    found: list[Any] = [None] * size
    dist.all_gather_object(found, mine, group=_group())
    return found


def everywhere(work: Callable[[], T]) -> T:
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


def on_main(work: Callable[[], T]) -> T:
    """Do something on the main process alone, and hand its result, by pickle, to all. Raises what `everywhere` does."""

    def mine() -> T | None:
        global _alone
        if place()[0] != 0:
            return None
        before, _alone = _alone, True
        try:
            return work()
        finally:
            _alone = before

    return all_of(mine)[0]  # type: ignore[return-value]  # the main process's is a T


def all_of(work: Callable[[], T]) -> list[T]:
    """Do something on every process, and give all of them what each made, by pickle. Raises what `everywhere` does."""
    _, results = _exchange(work, share=True)
    return results


def leave() -> None:
    """End the work of several processes, as the last thing that a program does.

    A backend's threads that are still there when the interpreter goes can abort a process whose work is done.
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _exchange(work: Callable[[], T], share: bool) -> tuple[T, list[T]]:
    """What `work` gave here, and, when it is to be shared, on each process."""
    if place()[1] == 1:
        result = work()
        return result, [result]
    result, error = cast(T, None), None
    try:
        result = work()
    except (Exception, KeyboardInterrupt) as e:
        error = e
    signum = getattr(error, "signum", signal.SIGINT) if isinstance(error, KeyboardInterrupt) else None
    mine: tuple[Any, Any, Any] = (None if error is None else str(error), signum, result if share else None)
    answers = told(mine)
    failed = [process for process, (message, _, _) in enumerate(answers) if message is not None]
    if not failed:
        return result, [shared for _, _, shared in answers]
    if error is not None and failed[0] == place()[0]:
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
