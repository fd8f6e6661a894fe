"""Progress a person can watch: a bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

console = Console(stderr=True, highlight=False)


SECONDS_BETWEEN_LINES = 10.0


class Tracker:
    """Counts units of work; made by `track`."""

    def __init__(self, name: str, total: int, done: int, bar: Progress | None, show: bool) -> None:
        self.name, self.total, self.done = name, total, done
        self._bar, self._show = bar, show
        self._started = self._told = time.monotonic()
        self._task = bar.add_task(name, total=total, completed=done, note="") if bar else None

    def advance(self, units: int = 1, note: str = "") -> None:
        self.done += units
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self.done, note=note)
            return
        now = time.monotonic()
        if self._show and (self.done >= self.total or now - self._told >= SECONDS_BETWEEN_LINES):
            self._told = now
            console.print(f"{self.name}: {self.done}/{self.total} {note} ({now - self._started:.0f} s)", soft_wrap=True)


@contextmanager
def track(name: str, total: int, done: int = 0, show: bool = True) -> Iterator[Tracker]:
    """Show the progress of `total` units of work.

    Args:
        name: what is being done.
        total: units of work.
        done: units that an earlier run has done.
        show: False on all processes but one.
    """
    if not show or not console.is_terminal:
        yield Tracker(name, total, done, None, show)
        return
    columns = (
        TextColumn("{task.description:<24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as bar:
        yield Tracker(name, total, done, bar, show)
