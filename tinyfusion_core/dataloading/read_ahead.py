"""Reading before it is asked for: what comes from far away takes as long as many steps."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

T = TypeVar("T")


class ReadAhead(Generic[T]):
    """Reads numbered pieces in threads of their own. A copy in another process begins with none.

    Args:
        read: reads a piece.
        most: how many pieces may be on their way, or wait to be taken; besides those that are being taken.
    """

    def __init__(self, read: Callable[[int], T], most: int) -> None:
        self._read, self._most = read, most
        self._forget()

    def __reduce__(self) -> tuple[type[ReadAhead[T]], tuple[Callable[[int], T], int]]:
        return type(self), (self._read, self._most)

    def begin(self, piece: int) -> None:
        """Begin to read a piece, now or as soon as there is room for it."""
        if self._process != os.getpid():
            self._forget()
        if piece not in self._coming:
            self._wanted[piece] = None
        self._fill()

    def take(self, piece: int) -> T:
        """Return a piece: what was read ahead, or is read now, also where reading it ahead has failed."""
        if self._process != os.getpid():
            self._forget()
        self._wanted.pop(piece, None)
        coming = self._coming.pop(piece, None)
        self._fill()
        if coming is None or coming.exception() is not None:
            return self._read(piece)
        return coming.result()

    def _forget(self) -> None:
        """Begin with none: threads do not survive a fork."""
        self._process = os.getpid()
        self._wanted, self._coming = dict[int, None](), dict[int, Future[T]]()

    def _fill(self) -> None:
        while self._wanted and len(self._coming) < self._most:
            piece, _ = next(iter(self._wanted.items()))
            del self._wanted[piece]
            self._coming[piece] = coming = Future[T]()
            # No pool, whose threads the end of the program would wait for.
            threading.Thread(target=self._fulfil, args=(coming, piece), daemon=True).start()

    def _fulfil(self, coming: Future[T], piece: int) -> None:
        try:
            coming.set_result(self._read(piece))
        except Exception as e:  # it is tried again where it is needed, and told there
            coming.set_exception(e)
