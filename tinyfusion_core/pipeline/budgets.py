"""Several budgets from one search: cost and loss for every number of kept blocks."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from torch import nn

from ..errors import Diverged, UserError
from ..evaluation.evaluate import evaluate
from ..evaluation.metrics import HeldOutLoss
from ..parsing.records import read_as
from ..protocols.task import Task
from ..pruning.decision import Decision
from ..pruning.prune import prune
from ..pruning.record import decision_of
from ..reporting.report import BUDGETS, write_report
from ..runtime.distributed import on_main_process
from ..runtime.files import digest, sha256, write_json
from ..runtime.run_folder import RunFolder
from ..runtime.workers.base import Workers, check_alone
from ..selection.given import Nested
from .recipe import Recipe, load_recipe
from .run import sections_of_metrics
from .tasks import searched_task

ROWS = "budgets"
"""Folder in a run folder with the rows that are known."""


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


def budgets_of(
    folder: RunFolder, keep: Sequence[int] = (), recover_steps: int = 0, workers: Workers | None = None
) -> list[Row]:
    """Prune a run's teacher to several budgets, by the marginals of its search; see `Nested`.

    Rows are kept in the run folder's `budgets` as they become known, and not computed again. All that were asked for
    are in `budgets.json`, and in the end drawn in the report of a finished run. Recovery trains a student for every
    budget, without checkpoints.

    Args:
        folder: a run whose search has finished.
        keep: numbers of blocks; by default all from full depth, the teacher's, down to one, except those at which the
            search does not separate two blocks.
        recover_steps: steps of recovery of each student, otherwise as in the recipe, with an average, if it has one, of
            that length; 0 turns recovery off.
        workers: compute the rows instead of this process, which waits for them.

    Raises:
        UserError: the run has several rounds, has no learned search, or cannot keep so many blocks; or workers were
            given to several processes.
    """
    recipe = load_recipe(folder / "recipe.yaml")
    if recipe.rounds:
        raise UserError(f"{folder.path}: takes a run of one search, and this has rounds")
    if recover_steps and recipe.recover is None:
        raise UserError(f"{folder / 'recipe.yaml'}: has no recover section that says how")
    if workers is not None:
        check_alone()
    paths = {num: _row_file(folder, num, recover_steps) for num in keep or _told_apart(decision_of(folder))}
    missing = [num for num, path in paths.items() if not path.exists()]
    do = partial(_compute, str(folder.path.resolve()), str(Path.cwd()), recover_steps)
    logs = folder / ROWS / "workers"
    with recipe.trainer.track("budgets", len(missing)) as progress:
        for _ in map(do, missing) if workers is None or not missing else workers.run(do, missing, logs):
            _gather(folder, paths.values(), recover_steps)
            progress.advance()
    rows = _gather(folder, paths.values(), recover_steps)
    if (folder / "metrics.json").exists():
        on_main_process(lambda: write_report(folder, sections_of_metrics(recipe, folder)))
    return rows


def _row_file(folder: RunFolder, num: int, recover_steps: int) -> Path:
    """Where a row is kept; the name is a hash of all that decides it."""
    name = digest([_decisive(folder), num, recover_steps])[:16]
    return folder / ROWS / f"{name}.json"


def _decisive(folder: RunFolder) -> str:
    """A hash of what decides all rows of a run."""
    return digest([sha256(folder / name) for name in ("recipe.yaml", "decision.json")])


def _gather(folder: RunFolder, paths: Iterable[Path], recover_steps: int) -> list[Row]:
    """Read the rows that are known, and write them to one file."""
    rows = [read_as(path, Row, "delete it to compute that row again") for path in paths if path.exists()]
    record = {"format_version": 1, "recover_steps": recover_steps, "rows": [asdict(row) for row in rows]}
    on_main_process(lambda: write_json(folder / BUDGETS, record))
    return rows


def _compute(run_dir: str, working_folder: str, recover_steps: int, num: int) -> None:
    """Compute one row and keep it, here or as a worker; relative paths in the recipe begin in the working folder."""
    os.chdir(working_folder)
    folder = RunFolder(run_dir)
    recipe, task = searched_task(run_dir, version=_decisive(folder))
    trainer = recipe.trainer
    held_out = next((m for m in recipe.evaluate if isinstance(m, HeldOutLoss)), HeldOutLoss())
    decision = Nested(keep=num, decision=str(folder / "decision.json"))(task, trainer)
    student = prune(task, decision)
    measured = {m.name: m.values["student"] for m in evaluate(task, {"student": student}, [held_out], trainer)}
    row = Row(decision.kept, measured["parameters"], measured["FLOPs"], measured["held-out loss"])
    if recover_steps and decision.removed:
        row = replace(row, recovered=_recovered(task, student, decision, recipe, recover_steps, held_out))
    path = _row_file(folder, num, recover_steps)
    on_main_process(lambda: write_json(path, asdict(row)))


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
