"""The shipped recipes, each made small, with one key or a few bytes damaged."""

from __future__ import annotations

import importlib
import json
import random
from pathlib import Path
from typing import Any

import yaml

from fuzz.mutations import altered, another, damaged, spelled, written
from fuzz.runner import Case, warm_up
from places import ROOT
from tinyfusion_core.pipeline.schema import KEYS
from tinyfusion_core.yaml12 import load_yaml

SHIPPED = sorted((ROOT / "recipes").glob("*.yaml"))
QUICK = ("quickstart", "teacher_digits", "sit_small", "mar_small", "progressive_digits", "teacher_sit_digits")
"""Shipped recipes that need nothing, and so go on after the plan: they are planned only."""


def prepare(base: Path) -> None:
    """Import what recipes need."""
    importlib.import_module("urllib3.util.connection")  # it opens a socket, to see which kinds there are
    for name in ("quickstart", "sit_small", "mar_small"):
        warm_up(base, ["validate", str(ROOT / "recipes" / f"{name}.yaml")])


def make(rng: random.Random, base: Path, folder: Path) -> Case:
    """A plan of a damaged recipe, or of a sound one with a damaged flag."""
    source = rng.choice(SHIPPED)
    content, path = _small(load_yaml(source.read_text())), folder / source.name
    argv = ["validate", str(path)] if source.stem in QUICK else ["run", str(path), "--run-dir", str(folder / "run")]
    way, told = rng.random(), [path.name]
    if way < 0.15:
        made, what = damaged(rng, source.read_bytes())
        path.write_bytes(made)
        told += KEYS
    elif way < 0.85:
        made, place, what = altered(rng, content)
        for _ in range(rng.choice((0, 0, 0, 1, 2))):
            made, place, more = altered(rng, made)
            what = f"{what}, {more}"
        path.write_bytes(written(json.dumps(made)))
        told += _words(place)
    else:
        path.write_text(yaml.safe_dump(content))
        _, place, _ = altered(rng, content)
        value = another(rng, 1)
        flag = ".".join(str(part) for part in place if part != "init_args")
        argv += [f"--{flag}={written(json.dumps(value)).decode(errors='replace')}"]
        what = f"{argv[-1]:.100}"
        told += _words(place)
    return Case(argv, folder, told, f"{source.name}: {what}", owned=(folder / "run",))


def _words(place: tuple[Any, ...]) -> list[str]:
    """Words one of which a message about a recipe holds: its keys."""
    return [*KEYS, *(str(part) for part in place if isinstance(part, str) and len(part) > 2), spelled(place)]


def _small(recipe: Any) -> Any:
    """A recipe with as many blocks, but of small ones: planning takes time for every one of them."""
    backbone = recipe["backbone"]
    sizes = backbone.get("init_args", {}) if isinstance(backbone, dict) else {}
    if (network := sizes.get("network")) is not None:
        network.update(hidden_size=2 * network["num_attention_heads"], intermediate_size=64, vocab_size=97)
    return recipe
