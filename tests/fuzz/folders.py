"""Folders of runs and comparisons, finished and stopped, with one file damaged."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import accelerate.utils  # noqa: F401  # imported once, for all cases
import peft  # noqa: F401

from fuzz.mutations import harm_file
from fuzz.runner import Case, warm_up
from places import TESTS

BEFORE = TESTS / "before_rooms"
COMMANDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "finished": (
        ("run",), ("run", "--restart-from", "evaluate"), ("show",), ("watch", "--once"), ("budgets", "--keep", "3"),
        ("export", "--to", "indices"), ("export", "--to", "mergekit", "--out", "OWN"), ("sample", "--num", "1"),
        ("sample", "--num", "1", "--to", "OWN"),
    ),
    "search_stopped": (("run",), ("watch", "--once"), ("show",)),
    "recover_stopped": (("run",), ("watch", "--once"), ("show",), ("budgets", "--keep", "3"),
                        ("run", "--restart-from", "recover")),
    "rounds_stopped": (("run",), ("watch", "--once"), ("run", "--restart-from", "d2.search")),
    "compare": (("compare",), ("watch", "--once"), ("show",), ("audit",)),
    "audit": (("audit",), ("watch", "--once")),
    "compare_stopped": (("compare",), ("watch", "--once")),
}  # fmt: skip
"""What can be done with a folder: `run` and its like get the recipe that made it."""
QUICK = ("show", "watch", "export")
"""Commands that only read."""
TAKES_RECIPE = ("run", "compare", "audit")
WEIGHTS = {"finished": 4, "recover_stopped": 3, "rounds_stopped": 1, "compare": 2, "compare_stopped": 1}


def prepare(base: Path) -> None:
    """Make the folders to damage in `base`."""
    for name in ("teacher", *COMMANDS):
        if name != "finished":
            shutil.copytree(BEFORE / name, base / name)
    shutil.copytree(BEFORE / "recover_stopped", base / "finished")
    child = os.fork()  # where it trains, autograd has threads afterwards, and no case could be forked
    if child == 0:
        warm_up(base, _argv(base, "finished", ("run",)))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    for command in (("sample", "--num", "1"), ("budgets", "--keep", "3")):
        warm_up(base, _argv(base, "finished", command))
    for name in COMMANDS:
        shutil.copy(base / name / "recipe.yaml", base / f"{name}.yaml")


def _argv(folder: Path, name: str, command: tuple[str, ...]) -> list[str]:
    word, *options = (str(folder / "own" / "made") if part == "OWN" else part for part in command)
    run_dir = str(folder / name)
    if word not in TAKES_RECIPE:
        return [word, run_dir, *options]
    recipe = folder / f"{name}.yaml"
    recipe = recipe if recipe.exists() else folder / name / "recipe.yaml"
    return [word, str(recipe), "--run-dir", run_dir, *options]


def make(rng: random.Random, base: Path, folder: Path, quick: bool) -> Case:
    """A command on a folder with one damaged file."""
    (name,) = rng.choices(list(COMMANDS), [WEIGHTS.get(name, 1) for name in COMMANDS])
    command = rng.choice([command for command in COMMANDS[name] if (command[0] in QUICK) == quick])
    for part in ("teacher", name):
        shutil.copytree(base / part, folder / part)
    shutil.copy(base / f"{name}.yaml", folder)
    files = sorted(p for p in (folder / name).rglob("*") if p.is_file() and p.suffix not in (".html", ".png"))
    path = rng.choice(files)
    what = f"{name}/{path.relative_to(folder / name)}: {harm_file(rng, path)}"
    told = [path.name, f"{path.stem}.", name] if path.suffix != ".lock" else [name]
    encoding = "cp1252" if rng.random() < 0.1 else "utf-8"
    own = (folder / name, folder / "own")
    return Case(_argv(folder, name, command), folder, told, what, owned=own, encoding=encoding)
