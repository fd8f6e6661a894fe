"""The report of a run, from the files of its folder: a table for the terminal, one HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from ..parsing.records import read_text
from ..pruning.decision import Decision
from ..runtime.files import write_text
from ..runtime.run_folder import RunFolder, RunRecord
from ..runtime.stages import SEARCH
from .figures import draw_dynamics, draw_losses, draw_quality, draw_race, draw_strip
from .measured import LOSS, last_to_first, measurements, results
from .page import Figures, Picture, render_page
from .results import decisions_of, duration, faults_of, headline


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
    page = render_page(
        "report.html.j2",
        title=headline(folder),
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
    return next((last_to_first(m) for m in measurements(folder) if m["name"] == LOSS), None)


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
    return facts + faults_of(folder)


def _provenance(record: RunRecord, decisions: Mapping[str, Decision]) -> str:
    """Versions, hardware and how every decision was made, as YAML."""
    parts = {"versions": record.get("versions", {}), "hardware": record.get("hardware", {})}
    for name, decision in decisions.items():
        parts[f"decision {name}".strip()] = {"kept": list(decision.kept), **decision.provenance}
    return yaml.safe_dump(parts, sort_keys=False, allow_unicode=True, default_flow_style=None)
