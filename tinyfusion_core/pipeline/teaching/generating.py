"""A recipe's teacher makes training data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ...errors import UserError, about_a_recipe
from ...evaluation.evaluate import check_teacher
from ...evaluation.generated_data import GenerateData
from ...protocols.columns import checked, columns_of
from ...protocols.task import Task, check_loss_fits
from ..recipe import Recipe
from ..tasks import make_task


@about_a_recipe()
def generate_data(recipe: Recipe, how: GenerateData, out: Path) -> dict[str, Any]:
    """Make training data with the teacher of a recipe. Its data are not read where labels are all that they would tell.

    Args:
        recipe: the backbone and the objective.
        how: how many samples, and which.
        out: the folder.

    Returns:
        The content of `out/metadata.json`.

    Raises:
        UserError: the recipe trains its teacher itself, its loss does not fit the network or cannot generate, or its
            data lack what they would tell.
        Interrupted: a signal arrived; the same call goes on.
    """
    if recipe.train is not None:
        raise UserError("train: generate-data needs a teacher; give the backbone the checkpoint that a run has trained")
    how.check(recipe.loss)
    check_loss_fits(recipe.backbone, recipe.loss, recipe.on_meta)
    return how(_task(recipe), recipe.trainer, out)


def _task(recipe: Recipe) -> Task:
    """The teacher, with as much of the data as says what to make."""
    if recipe.backbone.num_labels(recipe.on_meta) is not None:
        return Task.without_data(recipe.backbone, recipe.loss, recipe.backbone.build())
    columns, train = columns_of(recipe.backbone, recipe.on_meta, recipe.data.conditions), recipe.data.train()
    if "x" not in columns.shapes or "x" in train.__getitems__([0]):
        task = make_task(recipe)
        check_teacher(task, recipe.trainer)
        return task
    # Conditions alone: what is to be made of them is not there yet.
    told = replace(columns, shapes={name: shape for name, shape in columns.shapes.items() if name != "x"})
    train = checked(train, told, "training")
    return Task(backbone=recipe.backbone, loss=recipe.loss, train=train, held_out=train, data=recipe.data)
