"""Whether the cache of a teacher's predictions that a recovery names is there, and is the right one."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

from ...errors import UserError
from ...pruning.decision import Decision
from ...runtime.seeding import Rng
from ...runtime.stages import RECOVER, Stage
from ...training.distillation import OutputKD
from ...training.recover import Recover
from ...training.teacher_cache.samples import (
    check_of_recovery,
    check_whole,
    read_metadata,
    settings_made_of,
    size_of,
)
from ...training.teacher_cache.settings import TeacherCache
from ..recipe import Recipe


def cache_of(stage: Stage) -> TeacherCache | None:
    """Return the cache that a stage learns from; None if it has none."""
    how = stage.settings
    return how.kd.cache if isinstance(how, Recover) and how.kd is not None else None


def caches_of(recipe: Recipe) -> dict[str, TeacherCache]:
    """Return the caches that recoveries of a recipe learn from, those that it compares among them, by their folders."""
    compared = recipe.compare.other_recoveries().values() if recipe.compare else ()
    stages = [*recipe.stages(), *(Stage(RECOVER, settings=how) for how in compared)]
    return {cache.folder: cache for stage in stages if (cache := cache_of(stage)) is not None}


def cache_text(recipe: Recipe, stage: Stage, kd: OutputKD, decision: Decision) -> str:
    """Return what a cache holds, in a line of the plan.

    Args:
        recipe: the recipe.
        stage: the recovery.
        kd: its distillation, with a cache.
        decision: how the student may be made.

    Raises:
        MissingFileError: the cache has not been written.
        UserError: it is for something else, cannot be made, or its teacher is not there before the run.
    """
    check_known_before(recipe, stage)
    check_kept(recipe, kd, decision)
    check_keepable(recipe)
    assert kd.cache is not None
    folder = Path(kd.cache.folder)
    found = read_metadata(folder)
    check_of_recovery(found["made_of"], settings_made_of(kd.cache, recipe.loss), folder)
    check_whole(found, folder)
    return f"{folder}, {size_of(found, folder)}; the teacher is not run"


def check_kept(recipe: Recipe, kd: OutputKD, decision: Decision) -> None:
    """Check that a cache keeps all that a student may be compared with, before it is decided what the student is.

    Args:
        recipe: the recipe.
        kd: its distillation, with a cache.
        decision: how the student may be made, in whole blocks.

    Raises:
        UserError: it lacks a block.
    """
    # Of which branches go nothing is certain, as it is of groups.
    kd.check_cache(replace(decision, choices=()) if recipe.backbone.units else decision, final=False)


def check_keepable(recipe: Recipe) -> None:
    """Check that the objective draws row by row, and that its predictions can be kept.

    Raises:
        UserError: they cannot.
    """
    inputs = recipe.loss.prepare(recipe.backbone.example(1), Rng(0, "plan", rows=(0,)))
    on_meta = {name: t.to("meta") for name, t in inputs.items()}
    with suppress(NotImplementedError, RuntimeError), torch.no_grad():  # without a meta kernel the run itself will tell
        recipe.loss.keep(recipe.loss.predict(recipe.on_meta.eval(), on_meta), on_meta)


def check_known_before(recipe: Recipe, stage: Stage) -> None:
    """Check that the teacher of a recovery is the checkpoint that the recipe names.

    Raises:
        UserError: the run makes it.
    """
    first = next(iter(recipe.each_round()))
    if recipe.train is not None or stage.round != first:
        made = "its own train stage" if stage.round == first else "the round before"
        raise UserError(
            f"recover.kd.cache: holds predictions of a checkpoint, and this teacher comes from {made}; give the "
            "backbone that checkpoint, or leave the cache out"
        )
