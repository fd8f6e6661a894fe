"""Whether the cache of a teacher's predictions that a recovery names is there, and is the right one."""

from __future__ import annotations

from pathlib import Path

from ...errors import UserError
from ...pruning.decision import Decision
from ...runtime.stages import Stage
from ...training.distillation import OutputKD
from ...training.teacher_cache.samples import check_made_of, read_metadata, settings_made_of, size_of
from ..recipe import Recipe


def cache_text(recipe: Recipe, stage: Stage, kd: OutputKD, decision: Decision) -> str:
    """Return what a cache holds, in a line of the plan.

    Args:
        recipe: the recipe.
        stage: the recovery.
        kd: its distillation, with a cache.
        decision: how the student may be made.

    Raises:
        MissingFileError: the cache has not been written.
        UserError: it is for something else, or the teacher of this recovery is not there before the run.
    """
    assert kd.cache is not None
    check_known_before(recipe, stage)
    kd.check_cache(decision, final=False)
    folder = Path(kd.cache.folder)
    found = read_metadata(folder)
    check_made_of(found["made_of"], settings_made_of(kd.cache, recipe.loss), folder)
    return f"{folder}, {size_of(found, folder)}; the teacher is not run"


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
