"""Collective operations that fail on all processes when one fails, so that none waits for ever."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from ..errors import FailedElsewhere, Interrupted, UserError
from .progress import track

T = TypeVar("T")
R = TypeVar("R")
PATIENCE = timedelta(days=1)
"""Timeout of collective calls on the CPU; guards against a machine that vanished without closing its connections."""

_GONE = re.compile(
    r"connection (closed|reset) by peer|connection refused|broken pipe|remote process exited", re.IGNORECASE
)
"""What gloo, NCCL and the store of torch say when the process at the other end has gone."""

_alone = False
"""Whether this process is running something in which the others have no part."""


def rank_and_world_size() -> tuple[int, int]:
    """Return this process's rank and the number of processes; (0, 1) for one that works `alone`."""
    if _alone or not dist.is_available() or not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def device_of_this_process() -> torch.device:
    """Return the device that this process works on, after it has joined those that were started with it."""
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    # Without being told, accelerate makes no group of processes that have no GPU: each would think itself alone.
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    found: torch.device = PartialState(cpu).device
    return found


@contextmanager
def naming_the_dead() -> Iterator[None]:
    """Say in one message that another process has gone; also a decorator. Put it around collective calls.

    Raises:
        UserError: a collective call has failed because a process at the other end has ended.
    """
    try:
        yield
    except RuntimeError as e:  # gloo has no type of its own
        if rank_and_world_size()[1] == 1 or not _GONE.search(str(e)):
            raise
        raise UserError(
            "another process of this run has died: killed, out of memory, or by an error that it shows itself. Run the "
            "same command again: a run goes on from its last checkpoint"
        ) from e


def is_alone() -> bool:
    """Return whether this process works `alone`, though it may be one of several."""
    return _alone


@contextmanager
def alone() -> Iterator[None]:
    """Work by oneself: inside, this process is the only one, to collective calls of ours and to accelerate's."""
    states, one = list[dict[str, Any]](), dict[str, Any]()
    if dist.is_available() and dist.is_initialized() and "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, DistributedType, PartialState

        # The attributes of every instance, where something has made one.
        states = [state for state in (PartialState._shared_state, AcceleratorState._shared_state) if state]
        one = {"num_processes": 1, "process_index": 0, "distributed_type": DistributedType.NO}
    together = [{name: state[name] for name in one} for state in states]
    try:
        for state in states:
            state.update(one)
        with _while_others_wait():
            yield
    finally:
        for state, was in zip(states, together, strict=True):
            state.update(was)


@contextmanager
def _while_others_wait() -> Iterator[None]:
    """Collective calls of ours concern this process alone."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


@naming_the_dead()
def all_gather_object(mine: T) -> list[T]:
    """Gather one object from every process, in order of rank. A collective call.

    Args:
        mine: pickled, so tensors belong on the CPU.

    Raises:
        UserError: another process has died.
    """
    _, size = rank_and_world_size()
    if size == 1:
        return [mine]
    found: list[Any] = [None] * size
    dist.all_gather_object(found, mine, group=_group())
    return found


def on_every_rank(work: Callable[[], T]) -> T:
    """Run a function on every process and wait for all of them. A collective call.

    Args:
        work: must not wait for another process half-way, unless all of them fail alike.

    Returns:
        What `work` returned on this process.

    Raises:
        Exception: whatever `work` raised, on the first process (by rank) where it failed.
        FailedElsewhere: on the other processes.
        Interrupted: on all processes, if one was asked to stop.
    """
    result, _ = _exchange(work, share=False)
    return result


def on_main_process(work: Callable[[], T]) -> T:
    """Run a function on the main process alone and send its pickled result to all. A collective call.

    Raises:
        Exception: as `on_every_rank`.
    """

    def mine() -> T | None:
        if rank_and_world_size()[0] != 0:
            return None
        with _while_others_wait():
            return work()

    return gather_results(mine)[0]  # type: ignore[return-value]  # the main process's is a T


def gather_results(work: Callable[[], T]) -> list[T]:
    """Run a function on every process and return the pickled results of all, by rank. A collective call.

    Raises:
        Exception: as `on_every_rank`.
    """
    _, results = _exchange(work, share=True)
    return results


def shutdown() -> None:
    """Destroy the process group; call it last in a program.

    Backend threads that outlive the interpreter can abort a process whose work is done.
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _exchange(work: Callable[[], T], share: bool) -> tuple[T, list[T]]:
    """Run `work`; return its result here and, if shared, those of all processes."""
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
    """A gloo group on the CPU, whatever device and backend the networks train on.

    One process may take hours longer than the others without hitting the backend's timeout, and a process that dies
    ends the others' wait at once, because its connections close.
    """
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    assert isinstance(group, dist.ProcessGroup)
    return group


def batches(num: int, size: int) -> list[range]:
    """Split the rows [0, num) into ranges of `size`; the last may be shorter."""
    return [range(first, min(first + size, num)) for first in range(0, num, size)]


def local_share(items: Sequence[T]) -> Sequence[T]:
    """Return this process's share of the items, as `map_sharded` distributes them."""
    rank, size = rank_and_world_size()
    return items[rank::size]


def map_sharded(items: Sequence[T], work: Callable[[T], R]) -> list[R]:
    """Apply a function to every item, each process to its share. A collective call.

    Args:
        items: the same on every process; there may be fewer than processes.
        work: must not depend on which process runs it. Results are pickled: tensors belong on the CPU.

    Returns:
        The results for all items, in order, on every process.

    Raises:
        Exception: what `work` raised, as in `on_every_rank`.
    """
    found = gather_results(lambda: [work(item) for item in local_share(items)])
    return [found[i % len(found)][i // len(found)] for i in range(len(items))]


def map_alone(items: Sequence[T], work: Callable[[T], R]) -> list[R]:
    """Apply a function to every item, each process to its share as if it were the only process. A collective call.

    Args:
        items: the same on every process.
        work: may make collective calls, which concern its process alone. Results are pickled.

    Returns:
        The results for all items, in order, on every process.

    Raises:
        Exception: what `work` raised, as in `on_every_rank`.
    """

    def mine(item: T) -> R:
        with alone():
            return work(item)

    return map_sharded(items, mine)


def complete_sharded(
    batches: Sequence[range], done: Callable[[range], bool], work: Callable[[range], object], name: str, screen: bool
) -> None:
    """Make the files that are still missing, each process a share of them. A collective call.

    It returns when everything is done. Results go to files that all processes can see.

    Args:
        batches: ranges of the rows to work on.
        done: whether the result of a batch exists; asked on the main process.
        work: makes it atomically, so that after an interruption it exists completely or not at all.
        name: label of the progress bar.
        screen: whether to show it.
    """
    mine = local_share(on_main_process(lambda: [rows for rows in batches if not done(rows)]))

    def do() -> None:
        with track(name, sum(map(len, mine)), main=rank_and_world_size()[0] == 0, screen=screen) as progress:
            for rows in mine:
                work(rows)
                progress.advance(len(rows))

    on_every_rank(do)
