"""What pieces of work are handed to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TypeVar

from ...errors import UserError
from ..distributed import rank_and_world_size

P = TypeVar("P")


class Workers(ABC):
    """Processes that do pieces of work, here or on other machines that see the same files."""

    def started(self) -> AbstractContextManager[object]:
        """Keep processes between several calls of `run` in the context, where whoever starts them can.

        Raises:
            UserError: they cannot be started.
        """
        return nullcontext()

    @abstractmethod
    def run(self, work: Callable[[P], object], pieces: Sequence[P], logs: Path) -> Iterator[P]:
        """Do the pieces, in any order.

        Args:
            work: does one; pickled, as the pieces are. A process may call it for several pieces, one after another. If
                a process dies, another one begins its piece again.
            pieces: what to do.
            logs: a folder for what the processes print, if whoever starts them keeps that in files.

        Yields:
            Each piece when it is done.

        Raises:
            UserError: `work` raised it, processes cannot be started, or they die again and again.
        """


def check_alone() -> None:
    """Check that no other processes were started with this one.

    Raises:
        UserError: some were, as by torchrun.
    """
    if rank_and_world_size()[1] > 1:
        raise UserError("--workers starts processes of its own: start the command once, without torchrun or accelerate")


def attempt(work: Callable[[P], object], piece: P) -> str | None:
    """Do a piece, in a worker. Returns the message of a `UserError`, which would arrive wrapped in a traceback."""
    try:
        work(piece)
    except UserError as e:
        return str(e)
    return None
