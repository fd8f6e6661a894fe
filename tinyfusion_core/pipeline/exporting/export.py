"""Export the student or decision of a finished run to other software."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...errors import UserError, nearest
from ...parsing.records import read_as, read_text
from ...protocols.backbone import constructed
from ...protocols.blocks.branches import removed_branches
from ...protocols.blocks.paths import list_lengths
from ...protocols.task import Task
from ...pruning.decision import Decision
from ...pruning.interop_formats import TEXTS, describe_clients
from ...pruning.prune import load_pretrained, origin
from ...pruning.read_back import weights_in, write_checked
from ...pruning.record import decision_of, read_record
from ...runtime.files import write_json, write_text
from ...runtime.locking import FolderKind, check_free, check_replaceable
from ...runtime.run_folder import RunFolder
from ..recipe import Recipe, load_recipe
from .low_rank import adapter_files, rank_of

FOLDERS = ("transformers", "diffusers", "single-file")
"""What a backbone may write: folders of libraries, and a file with the names that the publisher gave the weights."""
ADAPTER = "adapter"
"""What a recovery by LoRA has added to the sliced teacher."""
MARK = "tinyfusion_export.json"
"""File that tells an exported folder, so that it may be written again."""
EXPORT = FolderKind(
    "an export",
    "--out",
    lambda folder: (
        (folder / MARK).exists() and "library" in read_as(folder / MARK, dict[str, Any], "choose another folder")
    ),
    lambda folder, path: False,
)
FORMATS = (*FOLDERS, ADAPTER, *TEXTS)


def export_run(folder: RunFolder, to: str, out: Path | None = None) -> str:
    """Write a run's student for another library, or its kept blocks in the format of another tool.

    Args:
        folder: a run that has saved a student.
        to: one of `FORMATS`. The blocks of several rounds are given as indices of the first round's teacher.
        out: folder or file to write; by default `export/FORMAT` in the run folder for a folder, none for a text.

    Returns:
        The text, or the path that was written; and in a further line what is known of other tools.

    Raises:
        UserError: there is no student, no such format, the network cannot be exported to it, or `out` holds something
            else.
    """
    if to not in FORMATS:
        raise UserError(f"--to: no format '{to}'{nearest(to, FORMATS)}")
    recipe = load_recipe(folder / "recipe.yaml")
    names = list(recipe.each_round())
    last = folder.round(names[-1]) / "student" if names else None
    if last is None or not last.is_dir():
        raise UserError(f"{folder.path}: no student yet; let the run finish first")
    decisions = [decision_of(folder, name) for name in names]
    blocks, kept = decisions[0].blocks, list(range(len(decisions[0].blocks)))
    for decision in decisions:
        kept = [kept[i] for i in decision.kept]
    if to == ADAPTER:
        return str(_write_adapter(recipe, folder, last, decisions, kept, out))
    with torch.device("meta"):
        student = constructed(recipe.backbone, read_record(last)["network"], str(last))
    _check_whole(recipe, student, to)
    clients = recipe.backbone.clients(recipe.on_meta, student, kept)
    if to in FOLDERS:
        target = _write(recipe, load_pretrained(last), to, out, folder)
        return "\n".join([str(target), *([f"other tools: {describe_clients(clients)}"] if clients else [])])
    if reason := clients.get(to):
        raise UserError(f"--to {to}: would not be the student: {reason}. Export it to transformers, or keep others")
    if len(list_lengths(blocks)) > 1 and to != "indices":
        raise UserError(f"--to {to}: takes one list of layers, this network has {', '.join(list_lengths(blocks))}")
    text = TEXTS[to](kept, len(blocks), _checkpoint(recipe, folder))
    if out is None:
        return text.rstrip("\n")
    # These formats have no room for a mark: a file is ours if it says the same.
    check_replaceable(out, "--out", lambda file: read_text(file) == text)
    write_text(out, text)
    return str(out)


def _checkpoint(recipe: Recipe, folder: RunFolder) -> str:
    name = str(recipe.backbone.source().get("checkpoint") or origin(folder / "teacher")["checkpoint"])
    return str(Path(name).absolute()) if Path(name).is_dir() else name  # a relative path may look like one on the hub


def _check_whole(recipe: Recipe, student: nn.Module, to: str) -> None:
    """Raise UserError if a student is not made of whole blocks, as other software knows them."""
    if recipe.backbone.units and (to not in FOLDERS or removed_branches(student)):
        raise UserError(
            f"--to {to}: the student lacks branches inside its blocks, which only tinyfusion_core.load_pretrained puts "
            f"together; search whole blocks, without backbone.units, for {to}"
        )


def _target(folder: RunFolder, to: str, out: Path | None) -> Path:
    """The folder to write; raises UserError if it is given and holds what is not ours."""
    if out is not None:
        check_free(out, EXPORT)
    return out or folder / "export" / to


def _write(recipe: Recipe, student: nn.Module, to: str, out: Path | None, folder: RunFolder) -> Path:
    """Write a student as a folder of a library; what the backbone can load is read back and compared."""
    target, backbone = _target(folder, to, out), recipe.backbone
    # A folder with our mark holds no weights but those of an earlier export.
    ours = weights_in(target) if (target / MARK).exists() else []
    there, empty = target.exists(), not any(target.glob("*"))
    write_json(target / MARK, {"format_version": 1, "library": to})  # first: what a kill leaves is known to be ours
    try:
        if to == backbone.library:

            def write(made: Path) -> list[str]:
                backbone.export(student, to, made)
                return sorted(path.name for path in made.iterdir())

            write_checked(student, Task.without_data(backbone, recipe.loss, student), target, write, ours)
        else:  # a network of another kind, which is not loaded here
            backbone.export(student, to, target)
    except BaseException:
        if empty:
            for path in target.iterdir():
                path.unlink()
            if not there:
                target.rmdir()
        raise
    return target


def _write_adapter(
    recipe: Recipe, folder: RunFolder, last: Path, decisions: Sequence[Decision], kept: Sequence[int], out: Path | None
) -> Path:
    """Write what the student saved in `last` has more than its sliced teacher, for whoever has the teacher."""
    rank, (first, *later) = rank_of(recipe), decisions
    if later:
        first = Decision(first.blocks, tuple(kept), later[-1].method, provenance=first.provenance)
    target, trained = _target(folder, ADAPTER, out), folder / "teacher"
    teacher = load_pretrained(trained) if recipe.train else recipe.backbone.build()
    task = Task.without_data(recipe.backbone, recipe.loss, teacher)
    task = replace(task, origin=origin(trained)) if recipe.train else task
    files = adapter_files(task, load_pretrained(last), first, rank)
    write_json(target / MARK, {"format_version": 1, "library": ADAPTER})
    for name, write in files.items():
        write(target / name)
    return target
