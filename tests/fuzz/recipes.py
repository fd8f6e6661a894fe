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
from tinyfusion_core.parsing.yaml12 import load_yaml
from tinyfusion_core.pipeline.schema import KEYS

SHIPPED = sorted((ROOT / "recipes").glob("*.yaml"))
WEIGHTS = [0.1 if p.stem in ("flux_dev", "sd35_large", "wan_1_3b", "dit_xl_diffusers") else 1.0 for p in SHIPPED]
"""Deep networks of diffusers take seconds to plan."""
SMALL = {"hidden_size": 16, "num_heads": 2, "patch_size": 2, "input_size": 8, "in_channels": 4, "depth": 4}


def prepare(base: Path) -> None:
    """Import what recipes need."""
    importlib.import_module("urllib3.util.connection")  # it opens a socket, to see which kinds there are
    for name in ("teacher_digits", "teacher_sit_digits", "teacher_mar_digits"):
        warm_up(base, ["validate", str(ROOT / "recipes" / f"{name}.yaml")])


def make(rng: random.Random, base: Path, folder: Path) -> Case:
    """A damaged recipe, or a sound one with a damaged flag; its run has no place where it could begin."""
    (source,) = rng.choices(SHIPPED, WEIGHTS)
    content, path = _small(load_yaml(source.read_text())), folder / source.name
    (folder / "file").touch()
    argv = ["run", str(path), "--run-dir", str(folder / "file" / "run")]
    way, told = rng.random(), [path.name, "file/run", "--section.key"]
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
    return Case(argv, folder, told, f"{source.name}: {what}", owned=(folder / "file" / "run",))


def _words(place: tuple[Any, ...]) -> list[str]:
    """Words one of which a message about a recipe holds: its keys."""
    return [*KEYS, *(str(part) for part in place if isinstance(part, str) and len(part) > 2), spelled(place)]


def _small(recipe: Any) -> Any:
    """A recipe with a few small blocks: planning takes time for every one of them."""
    backbone = recipe["backbone"]
    sizes = backbone.get("init_args", {}) if isinstance(backbone, dict) else {}
    if (network := sizes.get("network")) is not None:
        network.update(hidden_size=2 * network["num_attention_heads"], intermediate_size=64, vocab_size=97)
        network.update(num_hidden_layers=4)
    elif sizes.get("variant") == "XL/2":
        sizes.update(SMALL, variant=None)
    if isinstance(search := recipe.get("search"), dict) and search.get("keep", 0) > 4:
        search["keep"] = 3
    return recipe
