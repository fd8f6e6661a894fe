"""What a run has measured, as `metrics.json` has it, and its numbers for people."""

from __future__ import annotations

from typing import TypedDict

from ..errors import UserError
from ..parsing.records import read_as
from ..runtime.run_folder import RunFolder


class Measured(TypedDict):
    """One measurement of all networks: the values by their names, the teacher's first."""

    name: str
    values: dict[str, float | None]
    unit: str
    better: str
    note: str


class _Metrics(TypedDict):
    measurements: list[Measured]


LOSS = "held-out loss"
PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def measurements(folder: RunFolder) -> list[Measured]:
    """Read the measurements of a run.

    Raises:
        UserError: the run has not reached its evaluation.
    """
    path = folder / "metrics.json"
    if not path.exists():
        done = ", ".join(folder.finished()) or "none"
        raise UserError(f"{folder.path}: no metrics.json: not a finished run (finished stages: {done})")
    return read_as(path, _Metrics, "restore it, or run with --restart-from evaluate")["measurements"]


def results(folder: RunFolder) -> tuple[list[str], list[tuple[str, list[str], str, str]]]:
    """Return the results table of a run.

    Returns:
        The names of the models, and rows of (measurement, a value for each model, last relative to first, note).

    Raises:
        UserError: the run has not reached its evaluation.
    """
    measured = measurements(folder)
    names = list(measured[0]["values"]) if measured else []
    rows = []
    for m in measured:
        values = [m["values"].get(name) for name in names]
        cells = [figure(v, m["unit"]) for v in values]
        ratio = last_to_first(m)
        shown = f"{ratio:.2f}x" if ratio is not None else ""
        rows.append((f"{m['name']} {_arrow(m['better'])}".strip(), cells, shown, m["note"]))
    return names, rows


def last_to_first(measured: Measured) -> float | None:
    """Return the last network's value over the first's; None without two values, or if the first is 0."""
    values = list(measured["values"].values())
    if len(values) < 2 or not values[0] or values[-1] is None:
        return None
    return values[-1] / values[0]


def figure(value: float | None, unit: str = "") -> str:
    """Format a value for people: `5.38 MFLOP`; `n/a` for None."""
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
