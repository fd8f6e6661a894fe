"""The report of a run, from the files of its folder: a table for the terminal, one HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import yaml

from ..parsing.records import read_as, read_text
from ..pruning.decision import Decision
from ..runtime.files import write_text
from ..runtime.progress import duration
from ..runtime.run_folder import RunFolder, RunRecord
from ..runtime.stages import SEARCH
from .expected import draw_expectations
from .figures import decided, draw_budgets, draw_dynamics, draw_loss, draw_quality, draw_race
from .measured import LOSS, last_to_first, measurements, results
from .next_steps import next_steps
from .page import Figures, Picture, render_page
from .results import decisions_of, faults_of, headline
from .strip import strip_of
from .verdict import verdict

BUDGETS = "budgets.json"
"""File in a run folder with what `tinyfusion budgets` found."""


class _Budgets(TypedDict):
    recover_steps: int
    rows: list[dict[str, Any]]


def write_report(folder: RunFolder, exhibits: Sequence[Figures] = ()) -> Path:
    """Draw the figures and write `report.html`, a self-contained page.

    Args:
        folder: a run that was evaluated.
        exhibits: the sections of its metrics.

    Returns:
        The path of the page.
    """
    decisions, record = decisions_of(folder), folder.record()
    names, rows = results(folder)
    strips = {name: strip_of(decision) for name, decision in decisions.items()}
    page = render_page(
        "report.html.j2",
        title=headline(folder),
        figures=[
            *_draw_decisions(folder, decisions),
            *_draw_budgets(folder),
            *exhibits,
            *_draw_training(folder),
            *draw_expectations(folder),
        ],
        command=record.get("command", ""),
        recipe=read_text(folder / "recipe.yaml"),
        brand="tinyfusion",
        facts=_facts(folder, decisions, record),
        verdict=verdict(decisions, measurements(folder)),
        strips=strips,
        numbered=any(confidence for rows in strips.values() for row in rows for _, confidence in row.groups),
        methods=list(dict.fromkeys(decision.method for decision in decisions.values())),
        next=next_steps(folder, decisions, exhibits),
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
        prefix, of = (f"{name}_", f": {name}") if name else ("", "")
        if rounds := decision.provenance.get("race"):
            paths = [figures / f"{prefix}race_{number}.svg" for number in range(1, len(rounds) + 1)]
            for number, (entrants, path) in enumerate(zip(rounds, paths, strict=True), start=1):
                draw_race(number, entrants, path)
            caption = (
                "Who proposed each entrant, and how far its recovered loss is behind, with the standard error of that."
            )
            drawn.append(Figures(f"The race{of}", caption, list(map(Picture, paths))))
        if depths := decision.provenance.get("quality"):
            quality = figures / f"{prefix}quality.svg"
            chosen = next(e for e in depths if e["kept"] == list(decision.kept))
            measures = chosen.get("measures", LOSS)
            loss = None if name else _recovered(folder, measures)  # the table compares with the first round's teacher
            draw_quality(depths, None if loss is None else (len(decision.kept), loss), quality)
            caption = f"Depths that were tried. The fewest blocks within what was allowed: {len(decision.kept)}"
            if chosen["probability"] is not None:
                sure = f"{chosen['probability']:.2f}"
                caption += f"; with probability {sure}, as far as the samples that judged can tell"
            drawn.append(Figures(f"Depth against quality{of}", f"{caption}.", [Picture(quality)]))
        search = decided(folder.round(name).metrics(SEARCH), len(decision.blocks))
        if search:
            paths = [figures / f"{prefix}{what}.svg" for what in ("dynamics", "marginals")]
            draw_dynamics(search, decision.blocks, *paths)
            caption = (
                "The decision of the averaged gate logits at every logged step, after figure 6 of the paper; the "
                "fuller the colour, the higher its confidence. Beside it, how probable it was that each block is kept."
            )
            drawn.append(Figures(f"How the decision came about{of}", caption, list(map(Picture, paths))))
    return drawn


def _recovered(folder: RunFolder, name: str) -> float | None:
    """What was measured of the recovered network, as a multiple of the teacher's; None if it was not."""
    return next((last_to_first(m) for m in measurements(folder) if m["name"] == name), None)


def _draw_budgets(folder: RunFolder) -> list[Figures]:
    """What `tinyfusion budgets` has found in this run, if it was asked."""
    if not (folder / BUDGETS).exists():
        return []
    found = read_as(folder / BUDGETS, _Budgets, "delete it, or run `tinyfusion budgets` again")
    teacher = next((m["values"].get("teacher") for m in measurements(folder) if m["name"] == LOSS), None)
    path = folder / "figures" / "budgets.svg"
    draw_budgets(found["rows"], teacher, path)
    steps = found["recover_steps"]
    caption = f"Other depths from the same search{f', each recovered by {steps:,} steps' if steps else ''}."
    return [Figures("Depth against quality", caption, [Picture(path)])]


def _draw_training(folder: RunFolder) -> list[Figures]:
    curves = {stage: folder.round(stage.round).metrics(stage.name) for stage in folder.stages()}
    curves = {stage: entries for stage, entries in curves.items() if entries}
    if not curves:
        return []
    paths = [folder / "figures" / f"loss_{stage.key}.svg" for stage in curves]
    for (stage, entries), path in zip(curves.items(), paths, strict=True):
        draw_loss(stage.title, entries, path)
    caption = "A search's loss is that of sampled subnetworks."
    if any("kd" in entry for entries in curves.values() for entry in entries[-1:]):
        caption += " A distillation's is the weighted sum of its terms."
    caption += "".join(_shares(stage.title, entries) for stage, entries in curves.items())
    return [Figures("Training", caption, list(map(Picture, paths)))]


def _shares(stage: str, entries: Sequence[Mapping[str, Any]]) -> str:
    """What part of the gradient each term of a distillation was, on average; empty if there were not several."""
    told = [{name: entry[f"share_{name}"] for name in TERMS if f"share_{name}" in entry} for entry in entries]
    if not (told := list(filter(None, told))):
        return ""
    means = {TERMS[name]: sum(shares.get(name, 0) for shares in told) / len(told) for name in TERMS}
    parts = [f"{what} {f'{share:.0%}' if share >= 0.01 else 'less than 1%'}" for what, share in means.items() if share]
    return f" Of the gradient of {stage}, {', '.join(parts)}."


TERMS = {
    "kd": "the distance to the teacher's prediction was",
    "gt": "the training loss",
    "feature": "the features",
}
"""The terms of a distillation."""


def _facts(folder: RunFolder, decisions: Mapping[str, Decision], record: RunRecord) -> list[str]:
    """The summary of a run under its title."""
    stages = dict(folder.finished())
    for name in filter(None, decisions):
        stages |= {f"{name} {stage}": entry for stage, entry in folder.round(name).finished().items()}
    total = sum(s["seconds"] for s in stages.values())
    times = ", ".join(f"{name} {duration(s['seconds'])}" for name, s in stages.items())
    facts = []
    if stages:
        facts.append(f"{duration(total)} in all ({times})")
    for stage, ends in record.get("extended", {}).items():
        facts.append(f"{stage.replace('.', ' ')} extended after {' and '.join(f'{steps:,}' for steps in ends)} steps")
    return facts + faults_of(folder)


def _provenance(record: RunRecord, decisions: Mapping[str, Decision]) -> str:
    """Versions, hardware and how every decision was made, as YAML."""
    parts = {"versions": record.get("versions", {}), "hardware": record.get("hardware", {})}
    for name, decision in decisions.items():
        parts[f"decision {name}".strip()] = {"kept": list(decision.kept), **decision.provenance}
    return yaml.safe_dump(parts, sort_keys=False, allow_unicode=True, default_flow_style=None)
