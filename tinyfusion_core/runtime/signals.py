"""Stop requests: interrupt the program at once, or a training loop after its current step."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from ..errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)
FORWARDED = 2.0
"""Seconds within which a repeated signal counts as the same one: launchers forward what they received."""


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise Interrupted on SIGINT or SIGTERM, anywhere in the program.

    Raises:
        Interrupted: a signal arrived.
    """

    def stop(signum: int) -> None:
        raise Interrupted(f"stopped by {signal.Signals(signum).name}", signum)

    with _on_signal(stop):
        yield


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Yield a list to which SIGINT and SIGTERM append their number.

    Raises:
        Interrupted: a second signal arrived, or the context ends after one.
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
def handlers_kept() -> Iterator[None]:
    """Put back, at the end, the handlers that a library replaces meanwhile; outside the main thread it cannot."""
    before = {signum: signal.getsignal(signum) for signum in SIGNALS}
    yield
    if threading.current_thread() is threading.main_thread():
        for signum, handler in before.items():
            signal.signal(signum, handler)


@contextmanager
def _on_signal(act: Callable[[int], None]) -> Iterator[None]:
    """Call `act` on SIGINT and SIGTERM; does nothing outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    last = -math.inf

    def handle(signum: int, frame: FrameType | None) -> None:
        nonlocal last
        if time.monotonic() - last > FORWARDED:
            last = time.monotonic()
            act(signum)

    before = {signum: signal.signal(signum, handle) for signum in SIGNALS}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
