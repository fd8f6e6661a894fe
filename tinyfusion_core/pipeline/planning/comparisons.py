"""Plans a comparison."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...comparison.study import Comparison
from ...errors import UserError
from ...protocols.task import Task
from ...pruning.decision import Decision
from ...pruning.removal import in_blocks, remove_blocks
from ...runtime.stages import RECOVER, Stage
from ...selection.base import within
from ...selection.budget import measure
from ...training.recover import Recover
from ...training.teacher_cache.samples import read_metadata
from ..recipe import Recipe
from .cached_teacher import check_kept
from .of_search import check_inherited
from .training import Plan, plan_training


def plan_comparison(stage: Comparison, plan: Plan, recipe: Recipe) -> None:
    """Plan a comparison.

    Raises:
        UserError: it cannot be made with this recipe.
    """
    if recipe.rounds:
        raise UserError(
            f"{stage.view}: takes one search and one recovery; write a recipe of the round you want to compare in"
        )
    if recipe.recover is None:
        raise UserError(f"{stage.view}: needs recover, to train what was pruned")
    if recipe.train is not None:
        raise UserError(
            f"{stage.view}: needs a trained network; `tinyfusion run` with this recipe trains one. Then go on from it: "
            "--train null --backbone.checkpoint RUN_DIR/teacher"
        )
    model = recipe.on_meta
    blocks = recipe.backbone.unit_paths(model)
    task = Task.without_data(recipe.backbone, recipe.loss, model)
    costs = measure(stage.cost_budgets(recipe.search), task, recipe.trainer)
    found = stage.candidates_for(recipe.search, blocks, costs)
    limits = recipe.backbone.limits(model)
    decisions = {name: within(s, limits).preview(blocks) for name, s in found.selectors.items()}
    seeds = f"{stage.seeds} seed{'s' if stage.seeds > 1 else ''}"
    ways = "ways to choose and recover" if found.recoveries else "candidates"
    plan.rows.append((stage.view, f"{len(found.selectors)} {ways} that keep {found.said}, {seeds}"))
    recoveries = {"": recipe.recover, **stage.other_recoveries()}
    for name, decision in decisions.items():
        recovery = found.recoveries.get(name, "")
        with _named(stage, recovery):
            _check(recipe, recoveries[recovery], in_blocks(recipe.backbone, model, decision)[0])
    decision, pruned = next(iter(decisions.values())), copy.deepcopy(model)
    remove_blocks(recipe.backbone, pruned, [blocks[i] for i in decision.removed])
    whole, _ = in_blocks(recipe.backbone, model, decision)
    for name, how in stage.other_recoveries().items():
        with _named(stage, name):
            plan_training(plan, recipe, Stage(RECOVER, settings=how), pruned, model, whole, f"{stage.view}, {name}: ")


def _check(recipe: Recipe, recover: Recover, decision: Decision) -> None:
    check_inherited(recover, None)
    if recover.depths:
        raise UserError(f"depths is {list(recover.depths)}; expected [], since students of one depth are compared")
    if recover.kd is not None and recover.kd.cache is not None:
        check_kept(recipe, recover.kd, decision)
        read_metadata(Path(recover.kd.cache.folder))


@contextmanager
def _named(stage: Comparison, recovery: str) -> Iterator[None]:
    """Say of which recovery an error is."""
    try:
        yield
    except UserError as e:
        raise type(e)(f"{stage.view}.recoveries.{recovery}: {e}" if recovery else f"{stage.view}: {e}") from e
