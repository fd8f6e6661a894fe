"""Asking a program to stop: at once, or a running loop after its step."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from ..errors import Interrupted

FORWARDED = 2.0
"""Seconds in which a signal that comes again is the same one: launchers pass on what their processes got themselves."""


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGINT and SIGTERM raise Interrupted, wherever the program is."""

    def stop(signum: int) -> None:
        raise Interrupted(f"stopped by {signal.Signals(signum).name}", signum)

    with _on_signal(stop):
        yield


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """A list that receives the signal when SIGINT or SIGTERM asks to stop; a second one raises Interrupted at once.

    So does the end, when nobody has taken notice.
    """
    asked: list[int] = []

    def ask(signum: int) -> None:
        if asked:
            raise Interrupted(f"stopped at once by a second {signal.Signals(signum).name}", signum)
        asked.append(signum)

    with _on_signal(ask):
        yield asked
    if asked:
        raise Interrupted(f"stopped by {signal.Signals(asked[0]).name}", asked[0])


@contextmanager
def _on_signal(act: Callable[[int], None]) -> Iterator[None]:
    """Let SIGINT and SIGTERM act; only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    last = -math.inf

    def handle(signum: int, frame: FrameType | None) -> None:
        nonlocal last
        if time.monotonic() - last > FORWARDED:
            last = time.monotonic()
            act(signum)

    before = {signum: signal.signal(signum, handle) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
