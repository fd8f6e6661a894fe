"""Shows the progress of a run from the files in its folder, which may be on another machine's shared disk."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ..comparison.results import ComparisonResults
from ..errors import MissingFileError, UserError
from ..parsing.records import beside, check_regular, read_as
from ..pruning.record import DECISION, decision_of
from ..reporting.results import results_table
from ..runtime.progress import duration, plain_console
from ..runtime.run_folder import COMPARISON_RESULTS, NOW, RESULT_CACHE, RUN_RECORD, RunFolder
from ..runtime.stages import EVALUATE, SEARCH, Now, Stage, log_line
from .printing import print_table, print_tables

LEVELS = "▁▂▃▄▅▆▇█"
TAIL_BYTES = 256 * 1024
"""How much of the end of a long `metrics.jsonl` is read, in bytes."""
NUM_SHOWN = 60
"""Number of points of a curve."""
QUIET_SECONDS = 120.0
"""A run is reported as quiet if it has logged nothing for this long, and for ten times its usual interval."""


class Tail:
    """Follows the newest entries of a growing `metrics.jsonl`, which a resume truncates by replacing it.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._clear()

    def _clear(self) -> None:
        self.file, self.offset, self.rest = 0, 0, b""
        self.entries: dict[str, deque[dict[str, Any]]] = {}

    def read(self) -> bool:
        """Read new lines. Returns whether there were any."""
        try:
            check_regular(self.path)
            with self.path.open("rb") as file:
                status = self.path.stat()
                if status.st_ino != self.file or status.st_size < self.offset:
                    self._clear()
                    self.file, self.offset = status.st_ino, max(0, status.st_size - TAIL_BYTES)
                file.seek(self.offset)
                new = file.read()
        except (OSError, UserError):  # not there yet, or a shared disk that is away for a moment
            return False
        self.offset += len(new)
        *lines, self.rest = (self.rest + new).split(b"\n")
        for line in lines:
            if (entry := log_line(line)) is not None:  # it may be the end of a line whose beginning was not read
                self.entries.setdefault(entry["stage"], deque(maxlen=NUM_SHOWN)).append(entry)
        return bool(new)


def shown_stages(folder: RunFolder) -> list[Stage]:
    """Return the stages of a run that do work, in order; a round without recovery has no recover stage."""
    return [stage for stage in folder.stages() if stage.settings is not None]


def num_steps(stage: Stage) -> int | None:
    """Return the number of steps of a stage; None if it does not count steps."""
    return _steps(stage.settings) if isinstance(stage.settings, Mapping) else None


def _steps(section: Mapping[str, Any]) -> int | None:
    own = section.get("init_args", section)
    inner = own.get("search")  # of a search with finals after it
    return _steps(inner) if isinstance(inner, Mapping) else own.get("steps")


class View:
    """The current state of a run folder, or of a comparison's folder.

    Args:
        path: the folder.

    Raises:
        UserError: it is neither.
    """

    def __init__(self, path: Path) -> None:
        self.folder = RunFolder(path)
        self.compares = self.folder.holds_comparison()
        if not self.compares and not (path / "recipe.yaml").is_file():
            raise UserError(f"{path}: not a run folder (no recipe.yaml in it; has the run begun?){beside(path)}")
        self.tails: dict[Path, Tail] = {}
        self.changed: float | None = None

    def finished(self) -> bool:
        """Return whether the run or comparison has finished."""
        if self.compares:
            return (self.folder / COMPARISON_RESULTS).exists()
        return (self.folder / "metrics.json").exists() and EVALUATE in self.folder.finished()

    def frame(self) -> RenderableType:
        """Return what to show now."""
        body = list(self._comparison() if self.compares else self._run())
        return Group(Text(str(self.folder.path), style="bold"), *body)

    def _tail(self, folder: Path) -> Tail:
        path = folder / "metrics.jsonl"
        tail = self.tails.setdefault(folder, Tail(path))
        if tail.read():
            # At the first look the file's own time counts, later ours: another machine's clock may be off.
            first = self.changed is None and path.exists()
            self.changed = time.monotonic() - (max(0.0, time.time() - path.stat().st_mtime) if first else 0.0)
        return tail

    def _run(self) -> Iterator[RenderableType]:
        stages = shown_stages(self.folder)
        done = {name: self.folder.round(name).finished() for name in {stage.round for stage in stages}}
        current = next((s for s in stages if s.name not in done[s.round]), stages[-1])
        table = Table.grid(padding=(0, 2))
        for stage in stages:
            if (record := done[stage.round].get(stage.name)) is not None:
                table.add_row(Text("done", "green"), stage.title, f"in {duration(record['seconds'])}")
            elif stage is current:
                table.add_row(Text("now", "cyan"), stage.title, "")
            else:
                table.add_row(Text("later", "dim"), Text(stage.title, "dim"), "")
        if (self.folder / RUN_RECORD).exists():
            hardware = self.folder.record().get("hardware", {})
            yield Text(", ".join(f"{key} {value}" for key, value in hardware.items()), style="dim")
        yield table
        # Every folder is read at every look, or the old lines of a round would pass for news later.
        tails = {name: self._tail(self.folder.round(name).path) for name in done}
        folder = self.folder.round(current.round)
        parts, own = folder.checkpoints(current.name).path, tails[current.round].entries.get(current.name, ())
        if (parts / NOW).exists():
            yield from self._parts(parts, own)
        else:
            yield from self._training(own, num_steps(current))
            yield from _expected(folder, own)
        yield from self._decided([s for s in stages if s.name == SEARCH and s.name in done[s.round]])

    def _decided(self, searches: Sequence[Stage]) -> Iterator[RenderableType]:
        """The decisions of finished searches."""
        for stage in searches:
            if (self.folder.round(stage.round) / DECISION).exists():
                decision = decision_of(self.folder, stage.round)
                chosen = {"decision": decision.kept, "marginals": decision.marginals}
                yield Text.assemble((f"{stage.title} decided: ", "bold"), _choice(chosen))

    def _comparison(self) -> Iterator[RenderableType]:
        cache = self.folder / RESULT_CACHE
        counts = {
            what: len(list(cache.glob(f"{kind}-*.json")))
            for what, kind in (("decisions", "decision"), ("calibrations", "calibration"), ("recoveries", "healing"))
        }
        yield Text(", ".join(f"{count} {what}" for what, count in counts.items()) + " done")
        yield from self._parts(cache, ())
        for path in sorted(cache.glob(f"*/{NOW}")):  # of workers
            yield from self._parts(path.parent, next(reversed(self._tail(path.parent).entries.values()), ()))

    def _parts(self, folder: Path, own: Sequence[Mapping[str, Any]]) -> Iterator[RenderableType]:
        """Work of several parts, whose `now.json` is in a folder; what it logs elsewhere are the run's own entries."""
        try:
            now = read_as(folder / NOW, Now, "delete it; what is running goes on without it")
        except MissingFileError:  # it has not begun, or has just finished
            return
        if now["total"]:
            yield _bar(now["done"], now["total"], "")
        yield Text(now["what"])
        if now["part"]:
            own = next(reversed(self._tail(folder / now["part"]).entries.values()), ())
        yield from self._training(own, now.get("steps"))

    def _training(self, entries: Sequence[Mapping[str, Any]], steps: int | None) -> Iterator[RenderableType]:
        """The progress of a training of so many steps, if it has logged anything."""
        entries, pace = list(entries), 0.0
        if entries:
            last, first = entries[-1], entries[max(0, len(entries) - 10)]
            if len(entries) > 1 and last["seconds"] > first["seconds"]:
                pace = (last["step"] - first["step"]) / (last["seconds"] - first["seconds"])
            yield Text("")
            left = f"{duration((steps - last['step']) / pace)} left" if pace and steps else ""
            yield _bar(last["step"], steps, left)
            yield _facts(entries, pace)
        quiet = 0.0 if self.changed is None else time.monotonic() - self.changed
        between = (entries[-1]["step"] - entries[-2]["step"]) / pace if pace else 0.0
        if quiet > max(QUIET_SECONDS, 10 * between):
            yield Text(f"nothing logged for {duration(quiet)}: stopped, or busy with what is not logged", "yellow")


def _bar(done: int, total: int | None, left: str) -> RenderableType:
    row = Table.grid(padding=(0, 2))
    of = f"{done:,} of {total:,}" if total else f"step {done:,}"
    row.add_row(ProgressBar(total=total or 1, completed=done if total else 0, width=40), of, left)
    return row


def _facts(entries: Sequence[Mapping[str, Any]], pace: float) -> RenderableType:
    """Loss, speed, and the state of a search at its last logged step."""
    last = entries[-1]
    table = Table.grid(padding=(0, 2))
    losses = [e["loss"] for e in entries if e.get("loss") is not None]
    if losses:
        table.add_row("loss", Text.assemble(f"{losses[-1]:.4g}  ", (sparkline(losses), "cyan")))
    judged = [(e["validation"], e["step"]) for e in entries if e.get("validation") is not None]
    if judged:
        best, step = min(judged)
        table.add_row("validation", f"{judged[-1][0]:.4g}, the best {best:.4g} at step {step:,}")
    if pace:
        table.add_row("speed", f"{pace:.3g} steps/s")
    if last.get("skipped"):
        table.add_row("skipped", Text(f"{last['skipped']} steps whose loss or gradient was not finite", "yellow"))
    if "confidence" in last:
        curve = sparkline([e["confidence"] for e in entries], 0.0, 1.0)
        table.add_row("confidence", Text.assemble(f"{last['confidence']:.3f}  ", (curve, "cyan")))
    if "decision" in last:
        table.add_row("decision", _choice(last))
    return table


def _expected(folder: RunFolder, entries: Sequence[Mapping[str, Any]]) -> Iterator[RenderableType]:
    """What a recovery is expected to come to since its last judgement, if it is foretold."""
    judged = [entry["step"] for entry in entries if "validation" in entry]
    if judged and (found := folder.forecasts()) is not None and (newest := found["newest"])["step"] == judged[-1]:
        end, likely, low, high = newest["curve"][-1]
        text = f"expected    {likely:.4g} at step {end:,.0f} ({low:.4g} to {high:.4g})"
        if newest["limit"] is not None and newest["reached"] is not None:
            at = newest["reached"][0]
            text += f", {newest['limit']:.4g} {'not in sight' if at is None else f'at step {at:,.0f}'}"
        yield Text(text)


def _choice(entry: Mapping[str, Any]) -> Text:
    """Every block's probability of being kept as a bar, kept ones in green; and their indices."""
    text = Text()
    for block, level in enumerate(sparkline(entry["marginals"], 0.0, 1.0)):
        text.append(level, "bold green" if block in entry["decision"] else "dim")
    return text.append(f"{'  ' if text else ''}keeps {' '.join(map(str, entry['decision']))}")


def sparkline(values: Sequence[float], low: float | None = None, high: float | None = None) -> str:
    """Draw values as a line of bars, between their own extremes or the given ones."""
    low = min(values, default=0.0) if low is None else low
    high = max(values, default=1.0) if high is None else high
    span = (high - low) or 1.0
    top = len(LEVELS) - 1
    return "".join(LEVELS[min(top, max(0, round((v - low) / span * top)))] for v in values)


def watch(path: Path, once: bool = False, every: float = 2.0) -> None:
    """Show the progress of a run until it has finished, then its results table.

    Args:
        path: the run folder.
        once: print the current state and return.
        every: seconds between updates.

    Raises:
        UserError: there is no run and no comparison in the folder.
    """
    console, view = plain_console(), View(path)
    if not view.finished():
        if once:
            console.print(view.frame())
            return
        with Live(view.frame(), console=console, auto_refresh=False) as live:
            while not view.finished():
                time.sleep(every)
                live.update(view.frame(), refresh=True)
    if view.compares:
        print_tables(ComparisonResults.load(path / COMPARISON_RESULTS))
    else:
        print_table(results_table(view.folder))
