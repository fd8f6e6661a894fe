"""Decides whether a run may resume in a folder: yes with the same settings; otherwise it explains what to do."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NamedTuple, get_args, get_type_hints

import torch

from ..comparison.legacy_keys import PATHS
from ..errors import UserError, nearest
from ..evaluation.evaluate import known_exhibits
from ..pruning.decision import versions
from ..runtime.files import digest, without_later, write_json
from ..runtime.locking import check_free
from ..runtime.run_folder import RUN, RUN_RECORD, RunFolder
from ..runtime.stages import EVALUATE, Stage, stages_of
from ..training.recover import Recover
from ..training.trainer import NUMERICALLY_NEUTRAL, Trainer
from .recipe import Recipe, flatten

OTHER_COMMANDS = ("compare", "audit")
"""Sections that a run ignores."""
PLAIN: Mapping[str, type[Any]] = {"trainer": Trainer, "train": Recover, "recover": Recover}
"""Sections of one class."""


class Resume(NamedTuple):
    """What resuming in a run folder implies.

    Attributes:
        fingerprint: fingerprint of the recipe.
        forget: the stages whose results must be deleted, including those that the recipe no longer has.
    """

    fingerprint: dict[str, Any]
    forget: Sequence[Stage]


def take_run_folder(recipe: Recipe, folder: RunFolder, command: str, restart_from: str | None) -> None:
    """Prepare the folder for this recipe: delete what must be recomputed, and record what will be run.

    Args:
        recipe: the recipe.
        folder: the run folder.
        command: what the user typed, for the suggested commands.
        restart_from: delete this stage and the later ones.

    Raises:
        UserError: as `check_resume`.
    """
    settings, forget = check_resume(recipe, folder, command, restart_from)
    present = recipe.stages()
    for stage in forget:
        folder.round(stage.round).restart(stage.name, known_exhibits() if stage.name == EVALUATE else ())
        if stage.round and stage not in present:
            shutil.rmtree(folder / stage.round, ignore_errors=True)
    accelerator = recipe.trainer.accelerator
    hardware = {
        "device": str(accelerator.device),
        "precision": accelerator.mixed_precision,
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
    }
    write_json(
        folder / RUN_RECORD,  # before all else, so that whatever is in the folder is known to be a run's
        {"format_version": 1, "command": command, "versions": versions(), "hardware": hardware, "settings": settings},
    )
    recipe.save(folder.path)


def check_resume(recipe: Recipe, folder: RunFolder, command: str, restart_from: str | None) -> Resume:
    """Check whether the recipe's run may begin or resume in the folder; changes nothing.

    Raises:
        UserError: the folder holds a comparison or files of no run, or results under other settings that
            `restart_from` would leave, or there is no such stage.
    """
    now = run_fingerprint(recipe)
    record = folder / RUN_RECORD
    if not record.exists() and folder.holds_comparison():
        raise UserError(f"{folder.path}: holds a comparison; choose another --run-dir")
    check_free(folder.path, RUN)
    before = folder.record()["settings"] if record.exists() else now
    stages = stages_of(_sections(now, before))
    keys = [stage.key for stage in stages]
    if restart_from is not None and restart_from not in keys:
        raise UserError(f"--restart-from: no stage '{restart_from}'{nearest(restart_from, keys)}")
    first = keys.index(restart_from) if restart_from else len(keys)
    if changes := _changes(before, now):
        # What a removed stage left must go too, but only a stage that there is can be named.
        earliest = min(keys.index(_decided_by(recipe, key, keys)) for key in changes)
        present = recipe.stages()
        named = next(i for i, stage in enumerate(stages) if i >= earliest and stage in present)
        if first > named:
            raise UserError(_refusal(folder.path, changes, command, keys[named]))
        first = min(first, earliest)
    return Resume(now, stages[first:])


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The settings that differ between two fingerprints, as (before, now); None where one has no such setting."""
    pairs = {key: (before.get(key), now.get(key)) for key in sorted(before.keys() | now.keys())}
    return {key: (old, new) for key, (old, new) in pairs.items() if old != new}


def _refusal(path: Path, changes: Mapping[str, tuple[Any, Any]], command: str, stage: str) -> str:
    """The changed settings of a run folder, and the two ways to proceed."""
    return (
        f"{path} holds a run with other settings:\n"
        + "\n".join(f"  {key}: {old} -> {new}" for key, (old, new) in changes.items())
        + "\nEither make a new run, or replace this one from the first stage concerned:\n"
        f"  {command} --run-dir {_free_name(path)}\n"
        f"  {command} --run-dir {path} --restart-from {stage}"
    )


def stage_keys(recipe: Recipe) -> dict[str, str]:
    """Return for every stage, by key, a hash of everything that decides its result, including the stages before it."""
    settings = run_fingerprint(recipe)
    stages = [stage.key for stage in recipe.stages()]
    upstream, hashes = "", {}
    for stage in stages:
        own = {k: v for k, v in settings.items() if _decided_by(recipe, k, stages) == stage}
        hashes[stage] = upstream = digest([upstream, own])
    return hashes


def run_fingerprint(recipe: Recipe) -> dict[str, Any]:
    """Return every setting and input file that can change a result, by key. The content of data sets is not hashed."""
    told = _as_first_told(recipe.settings)
    for part in (told, *(told.get("rounds") or {}).values()):
        part.update({name: _without_later(part[name], cls) for name, cls in PLAIN.items() if part.get(name)})
    flat = flatten(told)
    settings = {
        key: value
        for key, value in flat.items()
        if key.removeprefix("trainer.") not in NUMERICALLY_NEUTRAL and key.partition(".")[0] not in OTHER_COMMANDS
    }
    files, before = {f"plugins.{file.name}": file.sha256 for file in recipe.plugins}, ""
    for name, step in recipe.each_round().items():
        prefix = f"rounds.{name}." if name else ""
        files.update({f"{prefix}{key}": content for key, content in step.search.inputs().items()})
        if before:
            settings[f"{prefix}search (comes after)"] = before
        before = name
    if recipe.train is None:
        files["backbone.checkpoint"] = recipe.backbone.source().get("sha256", "")
    return {**settings, **{f"{key} (its content)": content for key, content in files.items()}}


def _as_first_told(settings: Any) -> Any:
    """Settings in the spelling of the first release: old class paths, without later options at neutral values."""
    if isinstance(settings, list):
        return [_as_first_told(value) for value in settings]
    if not isinstance(settings, Mapping):
        return settings
    told = {key: _as_first_told(value) for key, value in settings.items()}
    if "class_path" in told:
        path = told["class_path"]
        cls = resolve_name(path)
        told["init_args"] = _without_later(told.get("init_args") or {}, cls)
        told["class_path"] = PATHS.get(f"{path.partition('.')[0]}:{path.rpartition('.')[2]}", path)
    return told


def _without_later(arguments: Mapping[str, Any], cls: type[Any]) -> dict[str, Any]:
    """Arguments of a class without later options at neutral values, those of its plain parts too."""
    told = without_later(cls, arguments)
    for key, hint in get_type_hints(cls).items() if is_dataclass(cls) else ():
        part = next((kind for kind in (hint, *get_args(hint)) if is_dataclass(kind)), None)
        if isinstance(part, type) and isinstance(told.get(key), Mapping) and "class_path" not in told[key]:
            told[key] = _without_later(told[key], part)
    return told


def _path(key: str) -> list[str]:
    """The path of a setting in a fingerprint; a suffix in brackets is not part of it."""
    return key.partition(" ")[0].split(".")


def _sections(*fingerprints: Mapping[str, Any]) -> dict[str, Any]:
    """The sections of the recipes with these fingerprints, nested as they were, without their values."""
    nested: dict[str, Any] = {}
    for key in (key for settings in fingerprints for key, value in settings.items() if value is not None):
        inner = nested
        for name in _path(key):
            inner = inner.setdefault(name, {})
    return nested


def _decided_by(recipe: Recipe, key: str, stages: Sequence[str]) -> str:
    """The first stage whose result a setting can change: that of its own section, else the first."""
    section, *names = _path(key)
    if section == "loss" and ".".join(names) in recipe.loss.sampling_options():
        return EVALUATE
    own = ".".join(names[:2]) if section == "rounds" else section
    return own if own in stages else stages[0]


def _free_name(path: Path) -> Path:
    number = next(n for n in range(2, 10_000) if not path.with_name(f"{path.name}-{n}").exists())
    return path.with_name(f"{path.name}-{number}")
