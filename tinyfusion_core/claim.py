"""Whose run folder is it? The same settings go on, others are refused with a way on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import yaml

from .decision import versions
from .errors import UserError
from .files import read_json, write_json, write_text
from .recipe import Recipe, flatten
from .run_folder import MADE_BY, RunFolder

STAGES = tuple(MADE_BY)
# Settings that change no number.
INDIFFERENT = {"trainer.num_workers", "trainer.log_every", "trainer.checkpoint_every", "trainer.max_skipped"}


def claim(recipe: Recipe, folder: RunFolder, command: str, restart_from: str | None) -> None:
    """Make the folder this recipe's.

    Args:
        recipe: what is to be run.
        folder: the run folder.
        command: what the user typed, for the way on that is offered.
        restart_from: forget this stage and the later ones.

    Raises:
        UserError: the folder holds a run with other settings, and `restart_from` leaves results of theirs.
    """
    now = fingerprint(recipe)
    record = folder / "run.json"
    before = read_json(record)["settings"] if record.exists() else now
    changed = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k))
    forget = STAGES.index(restart_from) if restart_from else len(STAGES)
    if changed:
        # What a removed stage left must go too, but only a stage that there is can be named.
        earliest = min(_stage_index(recipe, key) for key in changed)
        first = next(s for s in STAGES[earliest:] if s == "evaluate" or recipe.settings.get(s) is not None)
        if forget > STAGES.index(first):
            lines = [f"  {key}: {before.get(key)} -> {now.get(key)}" for key in changed]
            raise UserError(
                f"{folder.path} holds a run with other settings:\n"
                + "\n".join(lines)
                + "\nEither make a new run, or replace this one from the first stage concerned:\n"
                f"  {command} --run-dir {_free_name(folder.path)}\n"
                f"  {command} --run-dir {folder.path} --restart-from {first}"
            )
        forget = min(forget, earliest)
    if restart_from is not None:
        folder.restart(STAGES[forget:])
    write_text(folder / "recipe.yaml", yaml.safe_dump(dict(recipe.settings), sort_keys=False))
    accelerator = recipe.trainer.accelerator
    hardware = {
        "device": str(accelerator.device),
        "precision": accelerator.mixed_precision,
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
    }
    write_json(
        record,
        {"format_version": 1, "command": command, "versions": versions(), "hardware": hardware, "settings": now},
    )


def stage_keys(recipe: Recipe) -> dict[str, str]:
    """For every stage a hash of all that decides its outcome, that of the stages before it included."""
    settings = fingerprint(recipe)
    upstream, keys = "", {}
    for index, stage in enumerate(STAGES):
        own = {k: v for k, v in settings.items() if _stage_index(recipe, k) == index}
        keys[stage] = upstream = digest([upstream, own])
    return keys


def fingerprint(recipe: Recipe) -> dict[str, Any]:
    """Every setting and input file that can change a number, by key. The content of data sets is not hashed."""
    settings = {k: v for k, v in flatten(recipe.settings).items() if k not in INDIFFERENT}
    files = {} if recipe.search is None else recipe.search.inputs()
    if recipe.train is None:
        files = {**files, "backbone.checkpoint": recipe.backbone.source().get("sha256", "")}
    return {**settings, **{f"{key} (its content)": content for key, content in files.items()}}


def digest(value: Any) -> str:
    """A hash of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _stage_index(recipe: Recipe, key: str) -> int:
    """The first stage whose outcome a setting can change: its own section's, or all of them."""
    section, _, name = key.partition(" ")[0].partition(".")
    if section == "loss" and name in recipe.loss.sampling_options():
        section = "evaluate"
    return STAGES.index(section) if section in STAGES else 0


def _free_name(path: Path) -> Path:
    number = next(n for n in range(2, 10_000) if not path.with_name(f"{path.name}-{n}").exists())
    return path.with_name(f"{path.name}-{number}")
