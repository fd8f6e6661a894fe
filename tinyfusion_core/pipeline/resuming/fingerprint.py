"""What of a recipe decides the result of each stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from pkgutil import resolve_name
from typing import Any, get_args, get_type_hints

from ...comparison.legacy_keys import PATHS
from ...runtime.files import digest, without_later
from ...runtime.stages import EVALUATE
from ...training.recover import Recover
from ...training.trainer import NUMERICALLY_NEUTRAL, Trainer
from ..recipe import Recipe, flatten

OTHER_COMMANDS = ("compare", "audit")
"""Sections that a run ignores."""
PLAIN: Mapping[str, type[Any]] = {"trainer": Trainer, "train": Recover, "recover": Recover}
"""Sections of one class."""


def stage_keys(recipe: Recipe) -> dict[str, str]:
    """Return for every stage, by key, a hash of everything that decides its result, including the stages before it."""
    settings = run_fingerprint(recipe)
    stages = [stage.key for stage in recipe.stages()]
    upstream, hashes = "", {}
    for stage in stages:
        own = {k: v for k, v in settings.items() if decided_by(recipe, k, stages) == stage}
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


def path_of(key: str) -> list[str]:
    """Return the path of a setting in a fingerprint; a suffix in brackets is not part of it."""
    return key.partition(" ")[0].split(".")


def decided_by(recipe: Recipe, key: str, stages: Sequence[str]) -> str:
    """Return the first stage whose result a setting can change: that of its own section, else the first."""
    section, *names = path_of(key)
    if section == "loss" and names[:1] and names[0] in recipe.loss.sampling_options():
        makes = (s.key for s in recipe.stages() if isinstance(s.settings, Recover) and s.settings.on_policy)
        return next(makes, EVALUATE)
    own = ".".join(names[:2]) if section == "rounds" else section
    return own if own in stages else stages[0]
