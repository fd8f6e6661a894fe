"""Whose run folder is it? The same settings go on, others are refused with a way on."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError, nearest
from ..pruning.decision import versions
from ..runtime.files import digest, read_json, write_json
from ..runtime.run_folder import FINDINGS, RunFolder
from ..training.trainer import NUMERICALLY_NEUTRAL
from .recipe import Recipe, flatten

OTHER_COMMANDS = ("compare", "audit")
"""Sections that a run does not read."""


def claim(recipe: Recipe, folder: RunFolder, command: str, restart_from: str | None) -> None:
    """Make the folder this recipe's.

    Args:
        recipe: what is to be run.
        folder: the run folder.
        command: what the user typed, for the way on that is offered.
        restart_from: forget this stage and the later ones.

    Raises:
        UserError: the folder holds a run with other settings, and `restart_from` leaves results of theirs, or
            there is no such stage.
    """
    now, order, forget = check_claim(recipe, folder, command, restart_from)
    present = _stages(now)
    if restart_from is not None:
        for stage in order[forget:]:
            round_name, _, name = stage.rpartition(".")
            folder.round(round_name).restart([name])
            if round_name and stage not in present:
                shutil.rmtree(folder / round_name, ignore_errors=True)
    recipe.save(folder.path)
    accelerator = recipe.trainer.accelerator
    hardware = {
        "device": str(accelerator.device),
        "precision": accelerator.mixed_precision,
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
    }
    write_json(
        folder / "run.json",
        {"format_version": 1, "command": command, "versions": versions(), "hardware": hardware, "settings": now},
    )


def check_claim(
    recipe: Recipe, folder: RunFolder, command: str, restart_from: str | None
) -> tuple[dict[str, Any], list[str], int]:
    """Refuse what `claim` would refuse, and change nothing.

    Returns:
        The recipe's fingerprint, all stages in their order, and the first of them to forget.
    """
    now = fingerprint(recipe)
    record = folder / "run.json"
    before = read_json(record)["settings"] if record.exists() else now
    changed = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k))
    if not record.exists() and any((folder / name).exists() for name in (FINDINGS, "cells")):
        raise UserError(f"{folder.path}: holds a comparison; choose another --run-dir")
    present = _stages(now)
    order = _stages({k: now.get(k) or before.get(k) for k in [*now, *before]})
    if restart_from is not None and restart_from not in order:
        raise UserError(f"--restart-from: no stage '{restart_from}'{nearest(restart_from, order)}")
    forget = order.index(restart_from) if restart_from else len(order)
    if changed:
        # What a removed stage left must go too, but only a stage that there is can be named.
        earliest = min(order.index(_stage(recipe, key, order)) for key in changed)
        first = next(s for s in order[earliest:] if s in present)
        if forget > order.index(first):
            lines = [f"  {key}: {before.get(key)} -> {now.get(key)}" for key in changed]
            raise UserError(
                f"{folder.path} holds a run with other settings:\n"
                + "\n".join(lines)
                + "\nEither make a new run, or replace this one from the first stage concerned:\n"
                f"  {command} --run-dir {_free_name(folder.path)}\n"
                f"  {command} --run-dir {folder.path} --restart-from {first}"
            )
        forget = min(forget, earliest)
    return now, order, forget


def stage_keys(recipe: Recipe) -> dict[str, str]:
    """For every stage a hash of all that decides its outcome, that of the stages before it included."""
    settings = fingerprint(recipe)
    upstream, keys, stages = "", {}, _stages(settings)
    for stage in stages:
        own = {k: v for k, v in settings.items() if _stage(recipe, k, stages) == stage}
        keys[stage] = upstream = digest([upstream, own])
    return keys


def fingerprint(recipe: Recipe) -> dict[str, Any]:
    """Every setting and input file that can change a number, by key. The content of data sets is not hashed."""
    settings = {
        k: v for k, v in flatten(recipe.settings).items() if k.removeprefix("trainer.") not in NUMERICALLY_NEUTRAL
    }
    settings = {k: v for k, v in settings.items() if k.partition(".")[0] not in OTHER_COMMANDS}
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


def _stages(settings: Mapping[str, Any]) -> list[str]:
    """The stages of a run in their order; those of progressive pruning are `ROUND.search` and `ROUND.recover`.

    A round without recovery has the stage too: it saves the student.
    """
    given = [key.partition(" ")[0].split(".") for key, value in settings.items() if value is not None]
    sections = {path[0] for path in given}
    rounds = dict.fromkeys(path[1] for path in given if path[0] == "rounds")
    stages = ["train"] if "train" in sections else []
    stages += ["search", "recover"] if "search" in sections else []
    return [*stages, *(f"{name}.{stage}" for name in rounds for stage in ("search", "recover")), "evaluate"]


def _stage(recipe: Recipe, key: str, stages: Sequence[str]) -> str:
    """The first stage whose outcome a setting can change: its own section's, or all of them."""
    section, _, name = key.partition(" ")[0].partition(".")
    if section == "loss" and name in recipe.loss.sampling_options():
        return "evaluate"
    own = ".".join(name.split(".")[:2]) if section == "rounds" else section
    return own if own in stages else stages[0]


def _free_name(path: Path) -> Path:
    number = next(n for n in range(2, 10_000) if not path.with_name(f"{path.name}-{n}").exists())
    return path.with_name(f"{path.name}-{number}")
