"""The task of a recipe, and that of a run's search, as other processes take it from the run folder."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import lru_cache

from torch import nn

from ..errors import UserError
from ..protocols.columns import checked, columns_of
from ..protocols.task import Task
from ..pruning.prune import load_pretrained, origin
from ..runtime.run_folder import RunFolder
from ..runtime.workers.base import check_alone
from ..selection.judging.recoveries import Entrant
from .recipe import Recipe, load_recipe


def make_task(recipe: Recipe, model: nn.Module | None = None) -> Task:
    """Return the task of a recipe, its data checked as they are read; without a model its backbone builds one."""
    columns = columns_of(recipe.backbone, recipe.on_meta if model is None else model, recipe.data.conditions)
    return Task(
        backbone=recipe.backbone,
        loss=recipe.loss,
        train=checked(recipe.data.train(), columns, "training"),
        held_out=checked(recipe.data.held_out(), columns, "held-out"),
        feature_space=recipe.data.feature_space(),
        data=recipe.data,
        model=model,
    )


@lru_cache(maxsize=1)
def searched_task(run_dir: str, round_name: str = "", version: str = "") -> tuple[Recipe, Task]:
    """Return a run's recipe, and the task that a search of it is given; made once in a process.

    Args:
        run_dir: the run folder, with the recipe and what the stages before the search have made.
        round_name: of the search; empty where there is one.
        version: another task is made where it is another one.
    """
    folder = RunFolder(run_dir)
    recipe = load_recipe(folder / "recipe.yaml")
    names = list(recipe.each_round())
    before = names[: names.index(round_name)]
    if not before and recipe.train is None:
        return recipe, make_task(recipe)
    network = folder.round(before[-1]) / "student" if before else folder / "teacher"
    return recipe, replace(make_task(recipe, load_pretrained(network)), origin=origin(network))


def check_workers(recipe: Recipe) -> None:
    """Check that workers have something to do in a run.

    Raises:
        UserError: they have not, or were given to one of several processes.
    """
    check_alone()
    if not any(step.search.hands_out for step in recipe.each_round().values()):
        raise UserError(
            "--workers: this run has nothing for them; they recover the entrants of a race (search: {keep: K}), and "
            "what `compare`, `audit` and `budgets` compute"
        )


def recover_entrant(run_dir: str, round_name: str, working_folder: str, entrant: Entrant) -> None:
    """Do a piece of a run's search, as a worker.

    Args:
        run_dir: the run folder.
        round_name: of the search; empty where there is one.
        working_folder: relative paths in the recipe begin here.
        entrant: the piece.
    """
    os.chdir(working_folder)
    recipe, task = searched_task(run_dir, round_name)
    entrant.recover(task, recipe.trainer, RunFolder(run_dir).round(round_name))
