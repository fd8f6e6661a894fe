"""The results of a run, from the files of its folder. Reading them imports no torch."""

from __future__ import annotations

from typing import Any, TypedDict

from rich.table import Table

from ..errors import UserError
from ..parsing.records import read_as
from ..pruning.decision import Decision
from ..pruning.record import DECISION, decision_of
from ..runtime.run_folder import RunFolder
from ..runtime.stages import SEARCH


class Measured(TypedDict):
    """A measurement as `metrics.json` has it: a value for each network by name."""

    name: str
    values: dict[str, float | None]
    unit: str
    better: str
    note: str


class _Metrics(TypedDict):
    measurements: list[Measured]


PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def results(folder: RunFolder) -> tuple[list[str], list[tuple[str, list[str], str, str]]]:
    """Return the results table of a run.

    Returns:
        The names of the models, and rows of (measurement, a value for each model, last relative to first, note).

    Raises:
        UserError: the run has not reached its evaluation.
    """
    measurements = measurements_of(folder)
    names = list(measurements[0]["values"]) if measurements else []
    rows = []
    for m in measurements:
        values = [m["values"].get(name) for name in names]
        cells = [_figure(v, m["unit"]) for v in values]
        first, last = values[0], values[-1]
        ratio = f"{last / first:.2f}x" if len(values) > 1 and first and last is not None else ""
        rows.append((f"{m['name']} {_arrow(m['better'])}".strip(), cells, ratio, m["note"]))
    return names, rows


def measurements_of(folder: RunFolder) -> list[Measured]:
    """Return what the evaluation of a run has measured.

    Raises:
        UserError: the run has not reached its evaluation.
    """
    path = folder / "metrics.json"
    if not path.exists():
        done = ", ".join(folder.finished()) or "none"
        raise UserError(f"{folder.path}: no metrics.json: not a finished run (finished stages: {done})")
    return read_as(path, _Metrics, "restore it, or run with --restart-from evaluate")["measurements"]


def results_table(folder: RunFolder) -> Table:
    """Return the results table for a terminal; the ratio is the last model's value over the first's.

    Raises:
        UserError: the run has not reached its evaluation.
    """
    names, rows = results(folder)
    table = Table(title=headline(folder), title_justify="left", title_style="bold")
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    if len(names) > 1:
        table.add_column("ratio", justify="right")
    for label, cells, ratio, _ in rows:
        table.add_row(label, *cells, *([ratio] if len(names) > 1 else []))
    if faults := faults_of(folder):
        table.caption, table.caption_justify = "; ".join(faults), "left"
    return table


def results_record(folder: RunFolder) -> dict[str, Any]:
    """Return the results of a run as plain values, for programs.

    Raises:
        UserError: the run has not reached its evaluation.
    """
    measurements = measurements_of(folder)
    made = {
        name: {
            "kept": decision.kept,
            "blocks": decision.blocks,
            "method": decision.method,
            "confidence": decision.confidence,
        }
        for name, decision in decisions_of(folder).items()
    }
    return {
        "run_dir": str(folder.path),
        "decisions": made,
        "measurements": measurements,
        "faults": faults_of(folder),
    }


def headline(folder: RunFolder) -> str:
    """Return the name of a run, and how many blocks there were and are."""
    decisions = list(decisions_of(folder).values())
    depths = [len(d.blocks) for d in decisions[:1]] + [len(d.kept) for d in decisions]
    name = folder.path.resolve().name
    return f"{name}: {' → '.join(map(str, depths))} blocks" if depths else name


def faults_of(folder: RunFolder) -> list[str]:
    """Return the steps that the stages have skipped and the samples that they have replaced, in words."""
    return [
        f"{stage.title}: {count} {what}"
        for stage in folder.stages()
        for what, count in folder.round(stage.round).faults(stage.name).items()
    ]


def decisions_of(folder: RunFolder) -> dict[str, Decision]:
    """Return the decisions of the rounds by name; without rounds, the name is empty."""
    searches = [stage for stage in folder.stages() if stage.name == SEARCH]
    rounds = [stage.round for stage in searches if (folder.round(stage.round) / DECISION).exists()]
    return {name: decision_of(folder, name) for name in rounds}


def _figure(value: float | None, unit: str) -> str:
    if value is None:
        return "n/a"
    if float(value).is_integer() and abs(value) < 1e4 and not unit:
        return str(int(value))
    for size, prefix in PREFIXES:
        if abs(value) >= size:
            return f"{value / size:.3g} {prefix}{unit}".strip()
    return f"{value:.4g} {unit}".strip()


def _arrow(better: str) -> str:
    return {"lower": "↓", "higher": "↑"}.get(better, "")


def duration(seconds: float) -> str:
    """Format seconds for people: `2 min 5 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
