"""A recipe's teacher writes its predictions, which recoveries then learn from without it."""

from __future__ import annotations

from pathlib import Path

from ...errors import UserError, about_a_recipe
from ...evaluation.evaluate import check_teacher
from ...training.teacher_cache.samples import size_of
from ...training.teacher_cache.writing import write_cache
from ..planning.cached_teacher import caches_of
from ..planning.plan import make_plan
from ..recipe import Recipe
from ..tasks import make_task


@about_a_recipe()
def cache_teacher(recipe: Recipe) -> str:
    """Write what is missing of the teacher's predictions that the recipe's recovery, or a compared one, learns from.

    Returns:
        The folders, and how much is in each, in words.

    Raises:
        UserError: no recovery names a cache, or the cache cannot be written.
        Interrupted: a signal arrived; the same call goes on.
    """
    if not (caches := caches_of(recipe)):
        raise UserError("recover.kd.cache: no recovery of the recipe names one; set recover.kd.cache.folder")
    if problems := make_plan(recipe).problems:
        raise UserError("\n".join(problems))
    task = make_task(recipe)
    check_teacher(task, recipe.trainer)
    made = {name: write_cache(cache, task, recipe.trainer) for name, cache in caches.items()}
    return "\n".join(f"{name}: {size_of(found, Path(name))}" for name, found in made.items())
