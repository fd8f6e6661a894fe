"""Progress output: a bar on a terminal, an occasional line in a log file, and the same lines for Python's logging."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

SECONDS_BETWEEN_LINES = 10.0
SWITCH = "TINYFUSION_PROGRESS"
"""Environment variable; 0 keeps all progress off the screen."""
logger = logging.getLogger("tinyfusion")
"""Everything that is logged goes here, at the level INFO."""


def plain_console(stderr: bool = False, width: int | None = None) -> Console:
    """Return a console that prints every text as it is: names and paths may look like markup, [/b] or :bug:."""
    return Console(stderr=stderr, width=width, highlight=False, markup=False, emoji=False)


console = plain_console(stderr=True)


def duration(seconds: float) -> str:
    """Format seconds for people: `2 min 5 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


class Tracker:
    """Counts units of work; made by `track`."""

    def __init__(
        self, name: str, total: int, done: int, bar: Progress | None, log: bool, lines: bool, outer: Tracker | None
    ) -> None:
        self.name, self.total, self.done = name, total, done
        self._bar, self._log, self._lines, self._outer = bar, log, lines, outer
        self._started = self._told = time.monotonic()
        self._task = bar.add_task(name, total=total, completed=done, note="") if bar else None
        self._note = ""

    def advance(self, units: int = 1, note: str = "") -> None:
        """Count finished units of work, and show a short note."""
        self.done += units
        self._tell(note)

    def tell(self, note: str) -> None:
        """Show what is being done now; nested work appends its own progress."""
        self._note = note
        self._tell(note)

    def announce(self, text: str) -> None:
        """Log a sentence, and print it above what is shown; that of nested work is only logged."""
        if self._log:
            logger.info("%s", text)
            if self._bar is not None or (self._lines and self._outer is None):
                console.print(text, soft_wrap=True)

    def _tell(self, note: str) -> None:
        if self._outer is not None:
            self._outer._tell(f"{self._outer._note} ({self.name} {self.done}/{self.total} {note}".rstrip() + ")")
            return
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self.done, note=note)
        now = time.monotonic()
        if self._log and (self.done >= self.total or now - self._told >= SECONDS_BETWEEN_LINES):
            self._told = now
            spent = f"({now - self._started:.0f} s)"
            line = " ".join(filter(None, (f"{self.name}: {self.done}/{self.total}", note, spent)))
            logger.info("%s", line)
            if self._lines:
                console.print(line, soft_wrap=True)


_shown: list[Tracker] = []
"""The tracker on the screen; nested work gets no bar of its own."""


@contextmanager
def track(name: str, total: int, done: int = 0, main: bool = True, screen: bool = True) -> Iterator[Tracker]:
    """Show and log the progress of `total` units of work.

    Args:
        name: label.
        total: units of work.
        done: units that an earlier, interrupted run has done.
        main: False on all processes but one, which neither show nor log it, nor nested work.
        screen: whether to show it, unless `SWITCH` is off.
    """
    screen = main and screen and os.environ.get(SWITCH) != "0"
    with ExitStack() as stack:
        if not screen or _shown or not console.is_terminal:
            tracker = Tracker(name, total, done, None, main, screen, _shown[0] if _shown else None)
        else:
            columns = (
                TextColumn("{task.description:<24}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}", markup=False),
            )
            bar = stack.enter_context(Progress(*columns, console=console))
            tracker = Tracker(name, total, done, bar, main, False, None)
        if not _shown:
            _shown.append(tracker)
            stack.callback(_shown.clear)
        yield tracker


@contextmanager
def quietly(*logs: Any) -> Iterator[None]:
    """Keep libraries of Hugging Face from showing bars and warnings while the context is open.

    Args:
        logs: their modules of that purpose, such as `transformers.utils.logging`.
    """
    before = [(log, log.get_verbosity(), log.is_progress_bar_enabled()) for log in logs]
    for log in logs:
        log.set_verbosity_error()
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log, verbosity, bar in before:
            log.set_verbosity(verbosity)
            if bar:
                log.enable_progress_bar()
