"""`tinyfusion compare` and `audit`: from a recipe, or from results, to tables, figures and one HTML page."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path

from ..comparison.figures import draw_choices, draw_kept, draw_scatter
from ..comparison.results import ComparisonResults, Entry
from ..comparison.statistics import Summary, guides, reference, summaries
from ..comparison.study import Audit, Compare, Comparison
from ..comparison.tables import table_csv, tables, trials_csv
from ..comparison.verdict import comparison_title, comparison_verdict
from ..errors import UserError, about_a_recipe
from ..evaluation.evaluate import check_teacher
from ..parsing.records import read_text
from ..reporting.page import Figures, Picture, render_page
from ..runtime.distributed import on_main_process
from ..runtime.files import write_text
from ..runtime.run_folder import COMPARISON_RESULTS
from ..runtime.workers.base import Workers, check_alone
from .planning.plan import make_comparison_plan
from .recipe import Recipe, load_recipe
from .run import keep_what_is_loaded
from .tasks import make_task


@about_a_recipe()
def compare_recipe(
    recipe: Recipe, view: str, run_dir: Path | str, command: str = "", workers: Workers | None = None
) -> tuple[ComparisonResults, Path]:
    """Run a recipe's `compare` or `audit` section, resuming what is there.

    Args:
        recipe: has a recovery, a search or candidates, and the checkpoint of a trained network.
        view: the section to run; without it its defaults are used.
        run_dir: where results are kept and the report is written.
        command: what the user typed, for the record.
        workers: compute the results instead of this process, which waits for them.

    Returns:
        The results, and the path of the report.

    Raises:
        UserError: the plan has problems, candidates do not fit or differ in their budget, or workers were given to
            several processes.
        Interrupted: a signal arrived; the same call resumes.
    """
    stage = _stage(recipe, view)
    plan = make_comparison_plan(recipe, stage)
    if plan.problems or plan.missing:
        raise UserError("\n".join(plan.problems + plan.missing))
    assert recipe.recover is not None  # else the plan has a problem
    if workers is not None:
        check_alone()
    task = make_task(recipe)
    check_teacher(task, recipe.trainer)
    keep_what_is_loaded()

    def elsewhere(entries: Sequence[Entry]) -> Iterator[Entry]:
        assert workers is not None
        stack.enter_context(workers.started())
        folder = Path(run_dir).resolve()
        recipe.save(folder)  # the workers read it
        yield from workers.run(partial(compute, str(folder), view, str(Path.cwd())), entries, folder / "workers")

    with ExitStack() as stack:
        results = stage(
            task,
            recipe.recover,
            recipe.trainer,
            run_dir,
            recipe.search,
            recipe.evaluate,
            elsewhere if workers is not None else None,
        )

    def keep() -> Path:
        recipe.save(Path(run_dir))
        return write_comparison(run_dir, command)

    return results, on_main_process(keep)


@about_a_recipe()
def compute(run_dir: str, view: str, working_folder: str, entry: Entry) -> None:
    """Compute one result of a comparison, as a worker.

    Args:
        run_dir: the comparison's folder, which has the recipe.
        view: the section of the recipe.
        working_folder: relative paths in the recipe begin here.
        entry: which result; see `Comparison.worker`.
    """
    os.chdir(working_folder)
    _worker(run_dir, view)(entry)


@cache
def _worker(run_dir: str, view: str) -> Callable[[Entry], None]:
    """What computes results; made once in a process."""
    recipe = load_recipe(Path(run_dir) / "recipe.yaml")
    assert recipe.recover is not None  # else the comparison would not have begun
    stage, task = _stage(recipe, view), make_task(recipe)
    return stage.worker(task, recipe.recover, recipe.trainer, run_dir, recipe.search, recipe.evaluate)


def _stage(recipe: Recipe, view: str) -> Comparison:
    return recipe.compare or Compare() if view == "compare" else recipe.audit or Audit()


def write_comparison(run_dir: Path | str, command: str = "") -> Path:
    """Write tables, figures and `report.html` beside the results in a folder. Returns the path of the page.

    Raises:
        UserError: the folder holds no results.
    """
    folder = Path(run_dir)
    results = ComparisonResults.load(folder / COMPARISON_RESULTS)
    write_text(folder / "table.csv", table_csv(results))
    write_text(folder / "trials.csv", trials_csv(results))
    recipe = folder / "recipe.yaml"
    page = render_page(
        "comparison.html.j2",
        title=f"{folder.resolve().name}: {comparison_title(results)}",
        figures=_draw(results, folder / "figures"),
        command=command,
        recipe=read_text(recipe) if recipe.exists() else "",
        brand=f"tinyfusion {results.view}",
        verdict=comparison_verdict(results),
        tables=tables(results),
        learned=results.learned,
    )
    write_text(folder / "report.html", page)
    return folder / "report.html"


def _draw(results: ComparisonResults, figures: Path) -> list[Figures]:
    """Draw the figures for which there are results."""
    candidates, points = [s for s in summaries(results) if s.kept], _points(results)
    fall = _where_choices_fall(results, candidates, points, figures / "choices.svg")
    if results.recoveries and len({s.kept for s in candidates}) == 1:  # one choice, and what each makes of it
        return fall
    return [
        *fall,
        *_whether_a_guide(results, candidates, points, figures / "scatter.svg"),
        _which_blocks_stay(candidates, len(results.blocks), figures / "kept.svg"),
    ]


def _where_choices_fall(
    results: ComparisonResults, candidates: Sequence[Summary], points: Sequence[tuple[float, float]], path: Path
) -> list[Figures]:
    losses = {s.name: [e.recovered for e in results.entries if e.method == s.name] for s in candidates}
    finite = {name: [loss for loss in some if loss is not None] for name, some in losses.items()}
    choices = {name: some for name, some in finite.items() if some}
    if not choices:
        return []
    draw_choices([recovered for _, recovered in points], choices, results.learned, path)
    caption = "One mark for each seed, searches in blue; below several marks their mean and standard deviation."
    if points:
        caption += " The dotted line is the best of the random subsets."
    return [Figures("Where the choices fall", caption, [Picture(path)])]


def _whether_a_guide(
    results: ComparisonResults, candidates: Sequence[Summary], points: Sequence[tuple[float, float]], path: Path
) -> list[Figures]:
    losses = {s.name: (s.calibration, s.recovered) for s in candidates}
    marks = {name: both for name, both in losses.items() if all(value.mean is not None for value in both)}
    if not marks and not points:
        return []
    draw_scatter(points, marks, results.learned, path)
    numbers = "; ".join(f"{number} {name}" for number, name in enumerate(marks, start=1))
    caption = f"{_scatter_caption(results)} {numbers}"
    return [Figures("Is the loss right after pruning a guide?", caption, [Picture(path)])]


def _which_blocks_stay(candidates: Sequence[Summary], num_blocks: int, path: Path) -> Figures:
    fractions = {
        s.name: [sum(i in kept for kept in s.kept) / len(s.kept) for i in range(num_blocks)] for s in candidates
    }
    draw_kept(fractions, path)
    caption = "Full: kept with every seed; faint: with none. Best recovered on top."
    return Figures("Which blocks stay", caption, [Picture(path)])


def _points(results: ComparisonResults) -> list[tuple[float, float]]:
    """For every random subset its loss right after pruning, and the mean of its losses after recovery."""
    subsets: dict[tuple[int, ...], list[tuple[float, float]]] = {}
    for mask in results.masks:
        if mask.calibration is not None and mask.recovered is not None:
            subsets.setdefault(mask.kept, []).append((mask.calibration, mask.recovered))
    return [(some[0][0], sum(y for _, y in some) / len(some)) for some in subsets.values()]


def _scatter_caption(results: ComparisonResults) -> str:
    caption = "Candidates are means over the seeds, searches in blue."
    if len(results.seeds) > 1:
        caption = "Candidates are means over the seeds, with standard deviations, searches in blue."
    rho = guides(results)["calibration loss"] if results.masks else None
    if rho is not None and rho.mean is not None:
        num = len(reference(results, results.seeds[0]))
        caption = f"Spearman's rho over the {num} random subsets: {rho.text('.2f')}. {caption}"
    lost = sum(e.calibration is None or e.recovered is None for e in (*results.entries, *results.masks))
    return caption + (f" Not shown: {lost} with a loss that is not finite." if lost else "")
