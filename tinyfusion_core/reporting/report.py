"""The report of a run, from the files of its folder alone: a table for the terminal, one HTML page."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table
from safetensors.torch import load_file

from ..errors import UserError
from ..pruning.decision import Decision
from ..runtime.files import read_json, write_text
from ..runtime.run_folder import RunFolder
from ..runtime.stages import SEARCH
from .figures import draw_dynamics, draw_images, draw_losses, draw_strip

PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def results(folder: RunFolder) -> tuple[list[str], list[tuple[str, list[str], str, str]]]:
    """The final table of a run.

    Returns:
        The names of the models, and rows of (measurement, a figure for each model, last against first, note).

    Raises:
        UserError: the run has not come to its evaluation.
    """
    path = folder / "metrics.json"
    if not path.exists():
        done = ", ".join(folder.finished()) or "none"
        raise UserError(f"{folder.path}: no metrics.json: not a finished run (finished stages: {done})")
    measurements = read_json(path)["measurements"]
    names = list(measurements[0]["values"])
    rows = []
    for m in measurements:
        values = [m["values"].get(name) for name in names]
        cells = [_figure(v, m["unit"]) for v in values]
        first, last = values[0], values[-1]
        ratio = f"{last / first:.2f}x" if len(values) > 1 and first and last is not None else ""
        rows.append((f"{m['name']} {_arrow(m['better'])}".strip(), cells, ratio, m["note"]))
    return names, rows


def results_table(folder: RunFolder) -> Table:
    """The final table for a terminal; the ratio is the last model's figure over the first's."""
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


def write_report(folder: RunFolder) -> Path:
    """Draw the figures and write `report.html`, one page that needs no other file. Returns its path."""
    decisions = _decisions(folder)
    sections = [_table_html(folder)]
    for title, caption, pictures in _draw(folder, decisions):
        panels = "".join(picture_html(folder / "figures" / name, shown, title) for name, shown in pictures)
        kind = "grids" if len(pictures) > 1 else "scroll"
        sections.append(
            f"<section><h2>{title}</h2><div class='{kind}'>{panels}</div>"
            f"<p class='note'>{html.escape(caption)}</p></section>"
        )
    sections.append(_record_html(folder, decisions))
    write_text(folder / "report.html", page(_headline(folder), _summary_html(folder, decisions), sections))
    return folder / "report.html"


def page(title: str, facts: str, sections: Sequence[str], brand: str = "tinyfusion", style: str = "") -> str:
    """A page that needs no other file.

    Args:
        title: plain text.
        facts: HTML to stand under the title.
        sections: HTML.
        brand: plain text to stand above the title.
        style: CSS on top of the common one.
    """
    name = html.escape(title)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}</title><link rel="icon" href="data:,"><style>{STYLE}{style}</style></head>
<body><main><header><p class="brand">{html.escape(brand)}</p><h1>{name}</h1>{facts}</header>
{"".join(sections)}
</main></body></html>
"""


Section = tuple[str, str, list[tuple[str, str]]]
"""Title, caption and pictures; of a picture its file, and what it shows."""


def _draw(folder: RunFolder, decisions: Mapping[str, Decision]) -> list[Section]:
    """Draw what the run has figures for."""
    return [*_draw_decisions(folder, decisions), *_draw_samples(folder), *_draw_training(folder)]


def _draw_decisions(folder: RunFolder, decisions: Mapping[str, Decision]) -> list[Section]:
    figures, drawn = folder / "figures", list[Section]()
    for name, decision in decisions.items():
        made, prefix = folder.round(name), f"{name}_" if name else ""
        of = f": {name}" if name else ""
        draw_strip(decision, figures / f"{prefix}blocks.png")
        removed = ", ".join(map(str, decision.removed)) or "none"
        sure = "; the numbers above are the confidence" if decision.confidences else ""
        caption = f"Removed: {removed}. Decided by {decision.method}{sure}."
        drawn.append((f"What was kept{of}", caption, [(f"{prefix}blocks.png", "")]))
        search = made.metrics(SEARCH)
        if search:
            draw_dynamics(search, len(decision.blocks), figures / f"{prefix}dynamics.png")
            caption = "The decision of the averaged gate logits at every logged step, after figure 6 of the paper."
            drawn.append((f"How the decision came about{of}", caption, [(f"{prefix}dynamics.png", "")]))
    return drawn


def _draw_samples(folder: RunFolder) -> list[Section]:
    samples = folder / "samples.safetensors"
    if not samples.exists():
        return []
    images = load_file(samples)
    order = images.pop("labels").argsort(stable=True)
    pictures: list[tuple[str, str]] = []
    for name in [n for n in results(folder)[0] if n in images]:
        file = f"samples_{name.replace(' ', '_')}.png"
        draw_images(images[name][order], folder / "figures" / file, columns=8)
        pictures.append((file, name))
    return [("Samples", "The same noise and label at the same place in every grid.", pictures)]


def _draw_training(folder: RunFolder) -> list[Section]:
    curves = {stage.title: folder.round(stage.round).metrics(stage.name) for stage in folder.stages()}
    curves = {title: entries for title, entries in curves.items() if entries}
    if not curves:
        return []
    draw_losses(curves, folder / "figures" / "losses.png")
    caption = "Means between logged steps, and a running mean. A search's loss is that of sampled subnetworks."
    if any("kd" in entry for entries in curves.values() for entry in entries[-1:]):
        caption += " A distillation's is the weighted sum of its terms."
    return [("Training", caption, [("losses.png", "")])]


def picture_html(path: Path, shown: str, title: str) -> str:
    image = base64.b64encode(path.read_bytes()).decode()
    caption = f"<figcaption>{html.escape(shown)}</figcaption>" if shown else ""
    alt = html.escape(f"{title}: {shown}" if shown else title)
    return f"<figure><img src='data:image/png;base64,{image}' alt='{alt}'>{caption}</figure>"


def _headline(folder: RunFolder) -> str:
    decisions = list(_decisions(folder).values())
    depths = [len(d.blocks) for d in decisions[:1]] + [len(d.kept) for d in decisions]
    name = folder.path.resolve().name
    return f"{name}: {' → '.join(map(str, depths))} blocks" if depths else name


def _summary_html(folder: RunFolder, decisions: Mapping[str, Decision]) -> str:
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
    facts += _faults(folder)
    return f"<p class='facts'>{html.escape(' · '.join(facts))}</p>"


def _faults(folder: RunFolder) -> list[str]:
    """The steps that the stages have skipped and the samples that they have replaced, in words."""
    return [
        f"{stage.title}: {count} {what}"
        for stage in folder.stages()
        for what, count in folder.round(stage.round).faults(stage.name).items()
    ]


def _table_html(folder: RunFolder) -> str:
    names, rows = results(folder)
    ratio = f"<th>{names[-1]} / {names[0]}</th>" if len(names) > 1 else ""
    head = "".join(f"<th>{html.escape(n)}</th>" for n in names)
    body, notes = [], []
    for label, cells, last, note in rows:
        mark = ""
        if note:
            if note not in notes:
                notes.append(note)
            mark = f"<sup>{notes.index(note) + 1}</sup>"
        numbers = "".join(f"<td>{html.escape(c)}</td>" for c in cells)
        numbers += f"<td>{last}</td>" if ratio else ""
        body.append(f"<tr><th scope='row'>{html.escape(label)}{mark}</th>{numbers}</tr>")
    items = "".join(f"<li>{html.escape(n)}</li>" for n in notes)
    return (
        f"<section><h2>Results</h2><div class='scroll'><table><thead><tr><th></th>{head}{ratio}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></div><ol class='notes'>{items}</ol></section>"
    )


def _record_html(folder: RunFolder, decisions: Mapping[str, Decision]) -> str:
    record: dict[str, Any] = read_json(folder / "run.json")
    parts = {"versions": record["versions"], "hardware": record["hardware"]}
    for name, decision in decisions.items():
        parts[f"decision {name}".strip()] = {"kept": list(decision.kept), **decision.provenance}
    text = yaml.safe_dump(parts, sort_keys=False, allow_unicode=True, default_flow_style=None)
    recipe = (folder / "recipe.yaml").read_text()
    return (
        f"<section><h2>Record</h2><pre>{html.escape(record['command'])}</pre>"
        f"<details><summary>Recipe, resolved</summary><pre>{html.escape(recipe)}</pre></details>"
        f"<details><summary>Provenance</summary><pre>{html.escape(text)}</pre></details></section>"
    )


def _decisions(folder: RunFolder) -> dict[str, Decision]:
    """What the rounds of a run have decided, by name; a search of its own is the round without a name."""
    searches = [stage for stage in folder.stages() if stage.name == SEARCH]
    paths = {stage.round: folder.round(stage.round) / "decision.json" for stage in searches}
    return {name: Decision.load(path) for name, path in paths.items() if path.exists()}


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
    """Seconds for people: `2 min 5 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


STYLE = """
:root { color-scheme: light; --ink: #23303d; --soft: #616e7c; --line: #e4e7eb; --accent: #1b6ca8; }
* { box-sizing: border-box; }
body { margin: 0; background: #f5f7fa; color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 2rem 1rem 4rem; }
.brand { margin: 0; color: var(--accent); font-weight: 600; letter-spacing: .04em; }
h1 { margin: .1rem 0 .3rem; font-size: 1.7rem; line-height: 1.2; }
h2 { margin: 0 0 .8rem; font-size: 1.05rem; }
.facts, .note, .notes, figcaption { color: var(--soft); font-size: .875rem; }
.note { margin: .8rem 0 0; }
section { background: white; border: 1px solid var(--line); border-radius: 10px; padding: 1.2rem; margin-top: 1.2rem; }
.scroll { overflow-x: auto; }
.scroll img { display: block; max-width: min(100%, 900px); min-width: 480px; height: auto; }
.grids { display: grid; grid-template-columns: repeat(auto-fit, minmax(230px, 1fr)); gap: 1rem; }
.grids img { display: block; width: 100%; height: auto; border-radius: 6px; }
figure { margin: 0; } figcaption { margin-top: .3rem; text-align: center; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: .4rem .7rem; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child { text-align: left; font-weight: 500; position: sticky; left: 0; background: white; }
thead th { color: var(--soft); font-weight: 600; }
td:last-child { color: var(--accent); font-weight: 600; }
sup { color: var(--soft); margin-left: .2em; } .notes { margin: .8rem 0 0; padding-left: 1.2rem; }
pre { overflow-x: auto; background: #f5f7fa; border-radius: 6px; padding: .8rem; font-size: .8rem; margin: .5rem 0; }
summary { cursor: pointer; margin-top: .6rem; }
@media (max-width: 600px) {
  main { padding: 1rem .6rem 3rem; } section { padding: .9rem; } h1 { font-size: 1.4rem; }
  th, td { padding: .35rem .4rem; font-size: .8rem; }
}
"""
