"""Decides whether a run may resume in a folder: yes with the same settings; otherwise it explains what to do."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...errors import UserError, nearest
from ...evaluation.evaluate import known_exhibits
from ...pruning.decision import versions
from ...pruning.record import decision_of
from ...runtime.files import write_json
from ...runtime.locking import check_free
from ...runtime.run_folder import RUN, RUN_RECORD, RunFolder
from ...runtime.stages import EVALUATE, RECOVER, SEARCH, Stage, stages_of
from ..recipe import Recipe
from .fingerprint import decided_by, path_of, run_fingerprint

Changes = Mapping[str, Mapping[str, tuple[Any, Any]]]
"""Changed settings by stage: what each one was, and what it is; None where there is no such setting."""


class Asked(NamedTuple):
    """What a user has asked of a run.

    Attributes:
        command: what was typed, for the commands that messages suggest.
        restart_from: delete this stage and the later ones first.
        extend: go on with the recovery whose steps have become more.
    """

    command: str
    restart_from: str | None = None
    extend: bool = False


class Resume(NamedTuple):
    """What resuming in a run folder implies.

    Attributes:
        fingerprint: fingerprint of the recipe.
        forget: the stages whose results must be deleted, including those that the recipe no longer has.
        extends: the recovery that goes on with more steps, and how many it was to have; None if none does.
    """

    fingerprint: dict[str, Any]
    forget: Sequence[Stage]
    extends: tuple[Stage, int] | None


def extended(recipe: Recipe, folder: RunFolder) -> Recipe:
    """Return the recipe as `--extend` means it: what a recovery's steps have laid out stays as it is with more of them.

    Raises:
        UserError: the folder holds no run.
    """
    if not (folder / RUN_RECORD).exists():
        raise UserError(f"--extend: {folder.path} holds no run to go on with; leave it out")
    before = folder.record()["settings"]
    for stage in recipe.stages():
        steps, horizon = (before.get(f"{stage.section}.{name}") for name in ("steps", "horizon"))
        if stage.name == RECOVER and stage.settings is not None and isinstance(steps, int):
            grows = stage.settings.steps > steps
            if stage.settings.horizon is None and (grows or horizon):
                recipe = recipe.with_horizon(stage, horizon or steps)
            if grows:  # what follows begins anew
                break
    return recipe


def take_run_folder(recipe: Recipe, folder: RunFolder, asked: Asked) -> None:
    """Prepare the folder for this recipe: delete what must be recomputed, and record what will be run.

    Args:
        recipe: the recipe.
        folder: the run folder.
        asked: how.

    Raises:
        UserError: as `check_resume`, or the state to go on from is damaged.
    """
    settings, forget, extends = check_resume(recipe, folder, asked)
    history = folder.record().get("extended", {}) if (folder / RUN_RECORD).exists() else {}
    history = {key: steps for key, steps in history.items() if key not in [stage.key for stage in forget]}
    if extends is not None:
        stage, steps = extends
        folder.round(stage.round).checkpoints(RECOVER).newest()
        folder.round(stage.round).reopen(RECOVER)
        history[stage.key] = [*history.get(stage.key, []), steps]
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
    told = {"command": asked.command, **({"extended": history} if history else {})}
    write_json(
        folder / RUN_RECORD,  # before all else, so that whatever is in the folder is known to be a run's
        {"format_version": 1, **told, "versions": versions(), "hardware": hardware, "settings": settings},
    )
    recipe.save(folder.path)


def check_resume(recipe: Recipe, folder: RunFolder, asked: Asked) -> Resume:
    """Check whether the recipe's run may begin or resume in the folder; changes nothing.

    Raises:
        UserError: the folder holds a comparison or files of no run, or results under other settings that
            `restart_from` would leave, or there is no such stage, or no recovery that could go on.
    """
    now, (command, restart_from, extend) = run_fingerprint(recipe), asked
    before = _settings_before(folder) or now
    stages = stages_of(_sections(now, before))
    keys = [stage.key for stage in stages]
    if restart_from is not None and restart_from not in keys:
        raise UserError(f"--restart-from: no stage '{restart_from}'{nearest(restart_from, keys)}")
    first = keys.index(restart_from) if restart_from else len(keys)
    changes, extends = _changes(recipe, before, now, keys), None
    if extend and _is_extended_now(recipe, folder, changes):
        stage, _ = extends = _extension(recipe, folder, changes)
        first, changes = _behind(stage, stages, first), {k: v for k, v in changes.items() if k != stage.key}
    if changes:
        # What a removed stage left must go too, but only a stage that there is can be named.
        earliest = keys.index(next(iter(changes)))
        named = next(stage for stage in stages[earliest:] if stage in recipe.stages())
        if first > stages.index(named):
            raise UserError(_refusal(folder, changes, command, named))
        first = min(first, earliest)
    _check_left(recipe, folder, [*stages[first:], *([extends[0]] if extends else [])])
    return Resume(now, stages[first:], extends)


def _check_left(recipe: Recipe, folder: RunFolder, again: Sequence[Stage]) -> None:
    """Check that recoveries find what their search has left, where the recovery is run and the search is not."""
    for stage in recipe.stages():
        there, search = folder.round(stage.round).finished(), Stage(SEARCH, stage.round)
        begins = stage.name == RECOVER and (stage in again or RECOVER not in there)
        if begins and SEARCH in there and search not in again and stage.settings is not None and stage.settings.start:
            stage.settings.start.check_left(folder.round(stage.round), decision_of(folder, stage.round))


def _settings_before(folder: RunFolder) -> dict[str, Any]:
    """The fingerprint of the run that the folder holds; empty if it is free for one. Raises UserError if it is not."""
    there = (folder / RUN_RECORD).exists()
    if not there and folder.holds_comparison():
        raise UserError(f"{folder.path}: holds a comparison; choose another --run-dir")
    check_free(folder.path, RUN)
    return folder.record()["settings"] if there else {}


def _changes(recipe: Recipe, before: Mapping[str, Any], now: Mapping[str, Any], keys: Sequence[str]) -> Changes:
    """The settings that differ between two fingerprints, by the first stage that they concern, in its order."""
    found: dict[str, dict[str, tuple[Any, Any]]] = {key: {} for key in keys}
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            found[decided_by(recipe, name, keys)][name] = before.get(name), now.get(name)
    return {key: changes for key, changes in found.items() if changes}


def _is_extended_now(recipe: Recipe, folder: RunFolder, changes: Changes) -> bool:
    """Whether `--extend` is to add steps; if not, they were added before, and the run goes on."""
    grows = any(_more_steps(stage, changes.get(stage.key, {})) for stage in recipe.stages())
    return grows or "extended" not in folder.record()


def _extension(recipe: Recipe, folder: RunFolder, changes: Changes) -> tuple[Stage, int]:
    """The recovery that goes on, and how many steps it was to have.

    Raises:
        UserError: other settings of it or of an earlier stage have changed, or there is nothing that could go on.
    """
    if not changes:
        raise UserError("--extend: no recovery has more steps than before; raise recover.steps")
    key, own = next(iter(changes.items()))
    stage = next((stage for stage in recipe.stages() if stage.key == key), None)
    if stage is None or not _more_steps(stage, own):
        raise UserError(
            f"--extend goes on with a recovery that is to have more steps, all else as it was; {folder.path} "
            f"has\n{_listed(own)}"
        )
    saved = folder.round(stage.round).checkpoints(RECOVER).last()
    if saved is None:
        raise UserError(
            f"--extend: {folder.round(stage.round).path} has no training state of {RECOVER} (trainer.keep_state was "
            f"false, it was deleted, or nothing was trained); begin anew with --restart-from {key}"
        )
    if saved.get("finished"):
        raise UserError(
            f"--extend: {key} was ended at step {saved['step']:,} by its validation or a callback, and would be again; "
            f"begin anew, with another validation, by --restart-from {key}"
        )
    return stage, own[f"{stage.section}.steps"][0]


def _more_steps(stage: Stage, changes: Mapping[str, tuple[Any, Any]]) -> bool:
    """Whether the changes of a stage are more steps of a recovery, and a horizon that is what it was, or not said."""
    keys = f"{stage.section}.steps", f"{stage.section}.horizon"
    (old, new), (horizon, now) = changes.get(keys[0], (0, 1)), changes.get(keys[1], (None, None))
    alone = bool(changes) and changes.keys() <= {*keys} and now in (None, horizon or old)
    return alone and stage.name == RECOVER and isinstance(old, int) and isinstance(new, int) and new > old


def _behind(stage: Stage, stages: Sequence[Stage], first: int) -> int:
    """The index of the stage after one that goes on, at which all begins anew; `first` is where it was to begin.

    Raises:
        UserError: it was to begin before, or results would go that nobody has given up.
    """
    after = next(i for i, other in enumerate(stages, 1) if other.key == stage.key)
    if first < after:
        raise UserError(f"--restart-from {stages[first].key} begins anew what --extend goes on with; leave one out")
    if first > after and stages[after].name != EVALUATE:
        raise UserError(
            f"--extend: {stages[after].key} and what follows begin with the student of {stage.key}; add "
            f"--restart-from {stages[after].key} to make them anew"
        )
    return after


def _listed(changes: Mapping[str, tuple[Any, Any]]) -> str:
    return "\n".join(f"  {key}: {old} -> {new}" for key, (old, new) in changes.items())


def _refusal(folder: RunFolder, changes: Changes, command: str, stage: Stage) -> str:
    """The changed settings of a run folder, and the ways to proceed."""
    path, own = folder.path, changes.get(stage.key, {})
    told = (
        f"{path} holds a run with other settings:\n"
        + "\n".join(map(_listed, changes.values()))
        + "\nEither make a new run, or replace this one from the first stage concerned:\n"
        f"  {command} --run-dir {_free_name(path)}\n"
        f"  {command} --run-dir {path} --restart-from {stage.key}"
    )
    if not _more_steps(stage, own) or folder.round(stage.round).checkpoints(RECOVER).last() is None:
        return told
    return f"{told}\nor go on with the recovery that it holds:\n  {command} --run-dir {path} --extend"


def _sections(*fingerprints: Mapping[str, Any]) -> dict[str, Any]:
    """The sections of the recipes with these fingerprints, nested as they were, without their values."""
    nested: dict[str, Any] = {}
    for key in (key for settings in fingerprints for key, value in settings.items() if value is not None):
        inner = nested
        for name in path_of(key):
            inner = inner.setdefault(name, {})
    return nested


def _free_name(path: Path) -> Path:
    number = next(n for n in range(2, 10_000) if not path.with_name(f"{path.name}-{n}").exists())
    return path.with_name(f"{path.name}-{number}")
