"""Several budgets from one search: cost and loss for every number of kept blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import nn

from ..errors import Diverged, UserError
from ..evaluation.evaluate import evaluate
from ..evaluation.metrics import HeldOutLoss
from ..protocols.task import Task
from ..pruning.decision import Decision
from ..pruning.prune import load_pretrained, origin, prune
from ..pruning.record import decision_of
from ..reporting.report import BUDGETS, write_report
from ..runtime.distributed import on_main_process
from ..runtime.files import write_json
from ..runtime.run_folder import RunFolder
from ..selection.given import Nested
from .recipe import Recipe, load_recipe
from .run import make_task, sections_of_metrics


@dataclass(frozen=True)
class Row:
    """The result for one budget.

    Attributes:
        kept: the kept blocks; those that the search kept most often.
        parameters: number of parameters of the student.
        flops: floating-point operations of one prediction for one sample; None if they cannot be counted.
        pruned: held-out loss, measured as in the run's own evaluation, right after pruning; None if not finite.
        recovered: held-out loss after recovery; None without recovery, or if it diverged.
    """

    kept: tuple[int, ...]
    parameters: float | None
    flops: float | None
    pruned: float | None
    recovered: float | None = None


def budgets_of(folder: RunFolder, keep: Sequence[int] = (), recover_steps: int = 0) -> list[Row]:
    """Prune a run's teacher to several budgets, by the marginals of its search; see `Nested`.

    Rows are written to `budgets.json` of the run folder as they become known, and in the end drawn in the report of a
    finished run. Recovery trains a student for every budget, without checkpoints.

    Args:
        folder: a run whose search has finished.
        keep: numbers of blocks; by default all from full depth, the teacher's, down to one, except those at which the
            search does not separate two blocks.
        recover_steps: steps of recovery of each student, otherwise as in the recipe, with an average, if it has one, of
            that length; 0 turns recovery off.

    Raises:
        UserError: the run has several rounds, has no learned search, or cannot keep so many blocks.
    """
    recipe = load_recipe(folder / "recipe.yaml")
    if recipe.rounds:
        raise UserError(f"{folder.path}: takes a run of one search, and this has rounds")
    if recover_steps and recipe.recover is None:
        raise UserError(f"{folder / 'recipe.yaml'}: has no recover section that says how")
    found = decision_of(folder)
    trainer, rows = recipe.trainer, []
    task = make_task(recipe) if recipe.train is None else _trained(recipe, folder / "teacher")
    held_out = next((m for m in recipe.evaluate if isinstance(m, HeldOutLoss)), HeldOutLoss())
    for num in keep or _told_apart(found):
        decision = Nested(keep=num, decision=str(folder / "decision.json"))(task, trainer)
        student = prune(task, decision)
        measured = {m.name: m.values["student"] for m in evaluate(task, {"student": student}, [held_out], trainer)}
        row = Row(decision.kept, measured["parameters"], measured["FLOPs"], measured["held-out loss"])
        if recover_steps and decision.removed:
            row = replace(row, recovered=_recovered(task, student, decision, recipe, recover_steps, held_out))
        rows.append(row)
        _save(folder, rows, recover_steps)
    if (folder / "metrics.json").exists():
        on_main_process(lambda: write_report(folder, sections_of_metrics(recipe, folder)))
    return rows


def _trained(recipe: Recipe, teacher: Path) -> Task:
    """The task with the teacher that the run has trained."""
    return replace(make_task(recipe, load_pretrained(teacher)), origin=origin(teacher))


def _save(folder: RunFolder, rows: Sequence[Row], recover_steps: int) -> None:
    record = {"format_version": 1, "recover_steps": recover_steps, "rows": [asdict(row) for row in rows]}
    on_main_process(lambda: write_json(folder / BUDGETS, record))


def _recovered(
    task: Task, student: nn.Module, decision: Decision, recipe: Recipe, steps: int, held_out: HeldOutLoss
) -> float | None:
    assert recipe.recover is not None  # else the command was refused
    try:
        student = recipe.recover.with_steps(steps)(task, student, decision, recipe.trainer)
    except Diverged:
        return None
    *_, recovered = evaluate(task, {"student": student}, [held_out], recipe.trainer)
    return recovered.values["student"]


def _told_apart(decision: Decision) -> list[int]:
    """The numbers of blocks at which the search separates kept from removed blocks; always the full depth."""
    depth, ranked = len(decision.blocks), sorted(decision.ranking, reverse=True)
    return [depth, *(k for k in range(len(ranked) - 1, 0, -1) if ranked[k - 1] > ranked[k])]
