"""The report of a run, from the files of its folder: a table for the terminal, one HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict

import yaml
from rich.table import Table

from ..errors import UserError
from ..parsing.records import read_as, read_text
from ..pruning.decision import Decision
from ..pruning.prune import DECISION, decision_of
from ..runtime.files import write_text
from ..runtime.run_folder import RunFolder, RunRecord
from ..runtime.stages import SEARCH
from .figures import draw_dynamics, draw_losses, draw_quality, draw_race, draw_strip
from .page import Figures, Picture, render_page


class _Measured(TypedDict):
    name: str
    values: dict[str, float | None]
    unit: str
    better: str
    note: str


class _Metrics(TypedDict):
    measurements: list[_Measured]


PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def results(folder: RunFolder) -> tuple[list[str], list[tuple[str, list[str], str, str]]]:
    """Return the results table of a run.

    Returns:
        The names of the models, and rows of (measurement, a value for each model, last relative to first, note).

    Raises:
        UserError: the run has not reached its evaluation.
    """
    path = folder / "metrics.json"
    if not path.exists():
        done = ", ".join(folder.finished()) or "none"
        raise UserError(f"{folder.path}: no metrics.json: not a finished run (finished stages: {done})")
    measurements = _measurements(folder)
    names = list(measurements[0]["values"]) if measurements else []
    rows = []
    for m in measurements:
        values = [m["values"].get(name) for name in names]
        cells = [_figure(v, m["unit"]) for v in values]
        first, last = values[0], values[-1]
        ratio = f"{last / first:.2f}x" if len(values) > 1 and first and last is not None else ""
        rows.append((f"{m['name']} {_arrow(m['better'])}".strip(), cells, ratio, m["note"]))
    return names, rows


def _measurements(folder: RunFolder) -> list[_Measured]:
    return read_as(folder / "metrics.json", _Metrics, "restore it, or run with --restart-from evaluate")["measurements"]


def results_table(folder: RunFolder) -> Table:
    """Return the results table for a terminal; the ratio is the last model's value over the first's.

    Raises:
        UserError: the run has not reached its evaluation.
    """
    names, rows = results(folder)
    table = Table(title=_headline(folder), title_justify="left", title_style="bold")
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    if len(names) > 1:
        table.add_column("ratio", justify="right")
    for label, cells, ratio, _ in rows:
        table.add_row(label, *cells, *([ratio] if len(names) > 1 else []))
    if faults := _faults(folder):
        table.caption, table.caption_justify = "; ".join(faults), "left"
    return table


def write_report(folder: RunFolder, exhibits: Sequence[Figures] = ()) -> Path:
    """Draw the figures and write `report.html`, a self-contained page.

    Args:
        folder: a run that was evaluated.
        exhibits: the sections of its metrics.

    Returns:
        The path of the page.
    """
    decisions, record = _decisions(folder), folder.record()
    names, rows = results(folder)
    page = render_page(
        "report.html.j2",
        title=_headline(folder),
        figures=[*_draw_decisions(folder, decisions), *exhibits, *_draw_training(folder)],
        command=record.get("command", ""),
        recipe=read_text(folder / "recipe.yaml"),
        brand="tinyfusion",
        facts=_facts(folder, decisions),
        names=names,
        rows=rows,
        notes=list(dict.fromkeys(note for *_, note in rows if note)),
        provenance=_provenance(record, decisions),
    )
    write_text(folder / "report.html", page)
    return folder / "report.html"


def _draw_decisions(folder: RunFolder, decisions: Mapping[str, Decision]) -> list[Figures]:
    figures, drawn = folder / "figures", list[Figures]()
    for name, decision in decisions.items():
        made, prefix = folder.round(name), f"{name}_" if name else ""
        of = f": {name}" if name else ""
        strip, dynamics = figures / f"{prefix}blocks.png", figures / f"{prefix}dynamics.png"
        draw_strip(decision, strip)
        removed = ", ".join(map(str, decision.removed)) or "none"
        sure = "; the numbers above are the confidence" if decision.confidences else ""
        caption = f"Removed: {removed}. Decided by {decision.method}{sure}."
        drawn.append(Figures(f"What was kept{of}", caption, [Picture(strip)]))
        if rounds := decision.provenance.get("race"):
            race = figures / f"{prefix}race.png"
            draw_race(rounds, race)
            caption = (
                "Who proposed each entrant, and how far its recovered loss is behind, with the standard error of that."
            )
            drawn.append(Figures(f"The race{of}", caption, [Picture(race)]))
        if depths := decision.provenance.get("quality"):
            quality = figures / f"{prefix}quality.png"
            loss = None if name else _recovered_loss(folder)  # the table compares with the first round's teacher
            draw_quality(depths, None if loss is None else (len(decision.kept), loss), quality)
            chosen = next(e for e in depths if e["kept"] == list(decision.kept))
            caption = (
                f"Depths that were tried. The fewest blocks within the loss: {len(decision.kept)}; with probability "
                f"{chosen['probability']:.2f}, as far as the samples that judged can tell."
            )
            drawn.append(Figures(f"Depth against quality{of}", caption, [Picture(quality)]))
        search = made.metrics(SEARCH)
        if search:
            draw_dynamics(search, len(decision.blocks), dynamics)
            caption = "The decision of the averaged gate logits at every logged step, after figure 6 of the paper."
            drawn.append(Figures(f"How the decision came about{of}", caption, [Picture(dynamics)]))
    return drawn


def _recovered_loss(folder: RunFolder) -> float | None:
    """The recovered network's held-out loss as a multiple of the teacher's; None if it was not measured."""
    for measured in _measurements(folder):
        values = list(measured["values"].values())
        if measured["name"] == "held-out loss" and len(values) > 1 and values[0] and values[-1] is not None:
            return values[-1] / values[0]
    return None


def _draw_training(folder: RunFolder) -> list[Figures]:
    curves = {stage.title: folder.round(stage.round).metrics(stage.name) for stage in folder.stages()}
    curves = {title: entries for title, entries in curves.items() if entries}
    if not curves:
        return []
    path = folder / "figures" / "losses.png"
    draw_losses(curves, path)
    caption = "Means between logged steps, and a running mean. A search's loss is that of sampled subnetworks."
    if any("kd" in entry for entries in curves.values() for entry in entries[-1:]):
        caption += " A distillation's is the weighted sum of its terms."
    return [Figures("Training", caption, [Picture(path)])]


def _headline(folder: RunFolder) -> str:
    decisions = list(_decisions(folder).values())
    depths = [len(d.blocks) for d in decisions[:1]] + [len(d.kept) for d in decisions]
    name = folder.path.resolve().name
    return f"{name}: {' → '.join(map(str, depths))} blocks" if depths else name


def _facts(folder: RunFolder, decisions: Mapping[str, Decision]) -> list[str]:
    """The summary of a run under its title."""
    stages = dict(folder.finished())
    for name in filter(None, decisions):
        stages |= {f"{name} {stage}": entry for stage, entry in folder.round(name).finished().items()}
    total = sum(s["seconds"] for s in stages.values())
    times = ", ".join(f"{name} {duration(s['seconds'])}" for name, s in stages.items())
    facts = []
    for label, _, ratio, _ in results(folder)[1]:
        name = label.removesuffix(" ↓")
        if ratio and name in ("parameters", "latency", "held-out loss"):
            facts.append(f"{name} {ratio}")
    confidences = [d.confidence for d in decisions.values() if d.confidence is not None]
    if confidences:
        facts.append(f"confidence {', '.join(f'{c:.2f}' for c in confidences)}")
    if stages:
        facts.append(f"{duration(total)} in all ({times})")
    return facts + _faults(folder)


def _faults(folder: RunFolder) -> list[str]:
    """The steps that the stages have skipped and the samples that they have replaced, in words."""
    return [
        f"{stage.title}: {count} {what}"
        for stage in folder.stages()
        for what, count in folder.round(stage.round).faults(stage.name).items()
    ]


def _provenance(record: RunRecord, decisions: Mapping[str, Decision]) -> str:
    """Versions, hardware and how every decision was made, as YAML."""
    parts = {"versions": record.get("versions", {}), "hardware": record.get("hardware", {})}
    for name, decision in decisions.items():
        parts[f"decision {name}".strip()] = {"kept": list(decision.kept), **decision.provenance}
    return yaml.safe_dump(parts, sort_keys=False, allow_unicode=True, default_flow_style=None)


def _decisions(folder: RunFolder) -> dict[str, Decision]:
    """The decisions of the rounds by name; without rounds, the name is empty."""
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
