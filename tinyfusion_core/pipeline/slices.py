"""Students of fewer blocks, cut out of one that was trained at several depths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from ..errors import UserError
from ..protocols.blocks.paths import word_for
from ..protocols.task import Task
from ..pruning.decision import Decision
from ..pruning.prune import load_pretrained, prune, save_pretrained
from ..pruning.record import DECISION, decision_of, read_record
from ..runtime.locking import FolderKind, check_free
from ..runtime.run_folder import RunFolder
from .recipe import load_recipe

SLICED = "slice"
"""The method of a decision that cuts a student out of another."""
SLICE = FolderKind(
    "a slice",
    "--out",
    lambda folder: (folder / DECISION).is_file() and Decision.load(folder / DECISION).method == SLICED,
    lambda folder, path: False,
)


def slice_of(task: Task, decision: Decision, depth: int) -> Decision:
    """Return which of a student's blocks a shallower one keeps.

    Args:
        task: the task with the student as its network.
        decision: how the student was made.
        depth: number of its blocks, or branches, to keep.

    Raises:
        UserError: there are not so many, or the decision does not say which.
    """
    return Decision(tuple(task.blocks), decision.inside(depth), SLICED)


def shallower(
    task: Task, student: nn.Module, decision: Decision, depths: Sequence[int], prefix: str = ""
) -> dict[str, nn.Module]:
    """Return the students inside of a student, by name, shallowest first.

    Args:
        task: what the student was pruned from.
        student: the network.
        decision: how it was made.
        depths: how many of its blocks, or branches, each of them keeps.
        prefix: name of its round, if there are several.

    Raises:
        UserError: there are not so many, or the decision does not say which.
    """
    what = f"{word_for(decision.blocks)} of {prefix}" if prefix else word_for(decision.blocks)
    within = replace(task, model=student)
    return {f"{depth} {what}": prune(within, slice_of(within, decision, depth)) for depth in sorted(depths)}


def write_slice(folder: RunFolder, depth: int, out: Path | None = None) -> Path:
    """Write a student of fewer blocks out of a run whose recovery trained several depths.

    Args:
        folder: the run; of several rounds the last counts.
        depth: number of blocks, or branches: from the smallest of `recover.depths` to below the student's.
        out: where to; by default `slices/DEPTH` in the run folder.

    Returns:
        The folder of the student.

    Raises:
        UserError: the run was not trained so, has not finished its recovery, or has no such depth.
    """
    recipe = load_recipe(folder / "recipe.yaml")
    names = list(recipe.each_round())
    if not names:
        raise UserError(f"{folder.path}: has no search, so nothing to cut a student out of")
    recover, place = recipe.each_round()[names[-1]].recover, folder.round(names[-1])
    if recover is None or not recover.depths:
        raise UserError(
            f"{folder / 'recipe.yaml'}: recover.depths names none, so the student works at its own depth only"
        )
    if not (place / "student").is_dir():
        raise UserError(f"{folder.path}: no student yet; let the run finish first")
    decision = decision_of(folder, names[-1])
    if not min(recover.depths) <= depth < len(decision.kept):
        trained = f"from {min(recover.depths)}, the smallest of recover.depths, to {len(decision.kept) - 1}"
        raise UserError(f"--depth {depth}: the student was trained for depths {trained}")
    target = out or place / "slices" / str(depth)
    check_free(target, SLICE)
    student = load_pretrained(place / "student")
    source = read_record(place / "student")["source"]
    task = replace(Task.without_data(recipe.backbone, recipe.loss, student), origin=source)
    sliced = prune(task, slice_of(task, decision, depth))
    # Its record speaks of the teacher's blocks, as the student's does.
    kept = tuple(decision.kept[i] for i in decision.inside(depth))
    of_teacher = replace(decision, kept=kept, method=SLICED, choices=(), confidences=())
    return save_pretrained(sliced, task, of_teacher, target)
