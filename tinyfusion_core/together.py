"""Several processes, one outcome: what fails on one of them fails on all, instead of leaving them waiting."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar, cast

from .errors import FailedElsewhere, Interrupted

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")


def everywhere(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Do something on every process, and wait for all of them.

    Args:
        accelerator: knows the processes.
        work: must not wait for another process half-way, unless all of them fail alike.

    Returns:
        What `work` gave on this process.

    Raises:
        Exception: whatever `work` raised first in the order of the processes, on the process where it did.
        FailedElsewhere: on the others.
        Interrupted: on all of them, when one was asked to stop.
    """
    result, _ = _exchange(accelerator, work, share=False)
    return result


def on_main(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Do something on the main process alone, and hand its result, by pickle, to all. Raises what `everywhere` does."""

    def mine() -> T | None:
        return work() if accelerator.is_main_process else None

    _, results = _exchange(accelerator, mine, share=True)
    return results[0]  # type: ignore[return-value]  # the main process's is a T


def _exchange(accelerator: Accelerator, work: Callable[[], T], share: bool) -> tuple[T, list[T]]:
    """What `work` gave here, and, when it is to be shared, on each process."""
    from accelerate.utils import gather_object

    if accelerator.num_processes == 1:
        result = work()
        return result, [result]
    result, error = cast(T, None), None
    try:
        result = work()
    except (Exception, KeyboardInterrupt) as e:
        error = e
    signum = getattr(error, "signum", signal.SIGINT) if isinstance(error, KeyboardInterrupt) else None
    told = gather_object([(None if error is None else str(error), signum, result if share else None)])
    failed = [process for process, (message, _, _) in enumerate(told) if message is not None]
    if not failed:
        return result, [shared for _, _, shared in told]
    if error is not None and failed[0] == accelerator.process_index:
        raise error
    message, signum, _ = told[failed[0]]
    raise FailedElsewhere(message) if signum is None else Interrupted(message, signum)
