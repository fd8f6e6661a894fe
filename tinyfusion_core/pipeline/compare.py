"""`tinyfusion compare` and `audit`: from a recipe, or from findings, to tables, figures and one page."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import rich.table
from rich.console import Console

from ..comparison.figures import draw_distribution, draw_kept, draw_scatter
from ..comparison.results import Findings
from ..comparison.statistics import guides, reference, rows
from ..comparison.study import Audit, Compare, Comparison
from ..comparison.tables import Table, table_csv, tables, trials_csv
from ..errors import UserError
from ..evaluation.metrics import check_teacher
from ..reporting.report import page, picture_html
from ..runtime.distributed import on_main_process
from ..runtime.files import write_text
from ..runtime.run_folder import COMPARISON_RESULTS
from .plan import make_comparison_plan
from .recipe import Recipe
from .run import make_task


def compare_recipe(recipe: Recipe, view: str, run_dir: Path | str, command: str = "") -> tuple[Findings, Path]:
    """Do what a recipe's `compare` or `audit` says, or what is left of it.

    Args:
        recipe: has a recovery, a search or candidates, and the checkpoint of a trained network.
        view: the section that counts; without it its defaults do.
        run_dir: where cells are kept and the report is written.
        command: what the user typed, for the record.

    Returns:
        What was found, and the path of the report.

    Raises:
        UserError: the plan does not work out, or candidates do not fit or differ in their budget.
        Interrupted: a signal came; the same call goes on.
    """
    stage: Comparison = recipe.compare or Compare() if view == "compare" else recipe.audit or Audit()
    plan = make_comparison_plan(recipe, stage)
    if plan.problems or plan.missing:
        raise UserError("\n".join(plan.problems + plan.missing))
    assert recipe.recover is not None  # else the plan has a problem
    task = make_task(recipe)
    check_teacher(task, recipe.trainer)
    findings = stage(task, recipe.recover, recipe.trainer, run_dir, recipe.search, recipe.evaluate)

    def keep() -> Path:
        recipe.save(Path(run_dir))
        return write_comparison(run_dir, command)

    return findings, on_main_process(keep)


def write_comparison(run_dir: Path | str, command: str = "") -> Path:
    """Write tables, figures and `report.html` beside the findings in a folder. Returns the path of the page."""
    folder = Path(run_dir)
    findings = Findings.load(folder / COMPARISON_RESULTS)
    write_text(folder / "table.csv", table_csv(findings))
    write_text(folder / "trials.csv", trials_csv(findings))
    sections = [_table_html(table, findings.learned) for table in tables(findings)]
    for title, file, caption in _draw(findings, folder / "figures"):
        picture = picture_html(folder / "figures" / file, "", title)
        sections.append(
            f"<section><h2>{title}</h2><div class='scroll'>{picture}</div>"
            f"<p class='note'>{html.escape(caption)}</p></section>"
        )
    recipe = folder / "recipe.yaml"
    record = f"<pre>{html.escape(command)}</pre>" if command else ""
    if recipe.exists():
        text = html.escape(recipe.read_text())
        record += f"<details><summary>Recipe, resolved</summary><pre>{text}</pre></details>"
    if record:
        sections.append(f"<section><h2>Record</h2>{record}</section>")
    text = page(folder.resolve().name, "", sections, brand=f"tinyfusion {findings.view}", style=OWN_STYLE)
    write_text(folder / "report.html", text)
    return folder / "report.html"


def print_tables(findings: Findings) -> None:
    """Print the tables; lines that a narrow terminal has to wrap are better than figures that it cuts off."""
    console = Console(highlight=False)
    console = Console(highlight=False, width=max(console.width, MIN_WIDTH))
    for table in tables(findings):
        shown = rich.table.Table(
            title=table.title, title_justify="left", title_style="bold", box=None, padding=(0, 1, 0, 0)
        )
        body = [[cell.replace("± ", "±") for cell in row] for row in table.rows]
        for i, name in enumerate(table.columns):
            words = [word for text in (name, *(row[i] for row in body)) for word in text.split()]
            justify: Literal["left", "right"] = "left" if i == 0 or name == "kept blocks" else "right"
            shown.add_column(name, justify=justify, overflow="fold", min_width=max(map(len, words), default=0))
        for row in body:
            shown.add_row(*row)
        console.print(shown)
        console.print()


def _draw(findings: Findings, figures: Path) -> list[tuple[str, str, str]]:
    """Draw what there are figures for. Returns sections as (title, file, caption)."""
    found = rows(findings)
    candidates = [row for row in found if row.kept]
    healed = {row.name: row.healed.mean for row in candidates if row.healed.mean is not None}
    subsets: dict[tuple[int, ...], list[tuple[float, float]]] = {}
    for mask in findings.masks:
        if mask.calibration is not None and mask.healed is not None:
            subsets.setdefault(mask.kept, []).append((mask.calibration, mask.healed))
    points = [(some[0][0], sum(y for _, y in some) / len(some)) for some in subsets.values()]
    marks = {
        row.name: (row.calibration.mean, healed[row.name])
        for row in candidates
        if row.calibration.mean is not None and row.name in healed
    }
    drawn = []
    if findings.view == "audit" and points:
        choices = {n: [t.healed for t in findings.trials if t.method == n and t.healed is not None] for n in healed}
        draw_distribution([y for _, y in points], choices, findings.learned, figures / "distribution.png")
        caption = "Below: one mark for each seed, searches in blue. The dotted line is the best of the random subsets."
        drawn.append(("Where the choices fall", "distribution.png", caption))
    if points or marks:
        draw_scatter(points, marks, findings.learned, figures / "scatter.png")
        drawn.append(("Is the loss right after pruning a guide?", "scatter.png", _scatter_caption(findings)))
    fractions = {
        row.name: [sum(i in kept for kept in row.kept) / len(row.kept) for i in range(len(findings.blocks))]
        for row in candidates
    }
    draw_kept(fractions, figures / "kept.png")
    caption = "Dark: kept with every seed; pale: with none. Best recovered on top."
    drawn.append(("Which blocks stay", "kept.png", caption))
    return drawn


def _scatter_caption(findings: Findings) -> str:
    caption = "Candidates are means over the seeds, searches in blue."
    rho = guides(findings)["calibration loss"] if findings.masks else None
    if rho is not None and rho.mean is not None:
        num = len(reference(findings, findings.seeds[0]))
        caption = f"Spearman's rho over the {num} random subsets: {rho.text('.2f')}. {caption}"
    lost = sum(t.calibration is None or t.healed is None for t in (*findings.trials, *findings.masks))
    return caption + (f" Not shown: {lost} with a loss that is not finite." if lost else "")


def _table_html(table: Table, learned: Sequence[str]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in table.columns)
    body = "".join(
        f"<tr{' class=learned' if row[0] in learned else ''}><th scope='row'>{html.escape(row[0])}</th>"
        + "".join(f"<td>{html.escape(cell).replace(chr(10), '<br>')}</td>" for cell in row[1:])
        + "</tr>"
        for row in table.rows
    )
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in table.notes)
    return (
        f"<section><h2>{html.escape(table.title)}</h2><div class='scroll'><table class='plain'><thead><tr>{head}</tr>"
        f"</thead><tbody>{body}</tbody></table></div><ul class='notes'>{notes}</ul></section>"
    )


MIN_WIDTH = 110
OWN_STYLE = """
.plain td:last-child { color: inherit; font-weight: inherit; }
.plain { font-size: .9rem; } .plain th, .plain td { padding: .35rem .5rem; }
.plain thead th { white-space: normal; vertical-align: bottom; }
.plain td, .plain tbody th { vertical-align: top; } .plain .learned { color: var(--accent); }
.plain td:nth-child(2):not(:last-child) { white-space: normal; text-align: left; min-width: 8rem; max-width: 15rem; }
.plain th:nth-child(2):not(:last-child) { text-align: left; }
ul.notes { padding-left: 1rem; }
"""
