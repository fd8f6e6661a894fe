"""What was made before the core had rooms: runs go on, comparisons are read, nothing is computed twice."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tinyfusion_core as tiny
from marks import slow_but
from places import TESTS
from tinyfusion_core.cli import main
from tinyfusion_core.pipeline.compare import write_comparison

BEFORE = TESTS / "before_rooms"
KEYS = json.loads((BEFORE / "keys.json").read_text())


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """A copy of one of the folders, in a working directory that has the teacher."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(BEFORE / "teacher", "teacher")

    def copied(name: str) -> Path:
        return Path(shutil.copytree(BEFORE / name, name))

    return copied


def again(command: str, folder: Path) -> int:
    """The command that made the folder, with the recipe in it, which has the paths that classes had then."""
    return main([command, str(folder / "recipe.yaml"), "--run-dir", str(folder)])


def lines(folder: Path, stage: str) -> list[str]:
    return [line for line in (folder / "metrics.jsonl").read_text().splitlines() if json.loads(line)["stage"] == stage]


def steps(folder: Path, stage: str) -> list[int]:
    return [json.loads(line)["step"] for line in lines(folder, stage)]


def keys(folder: Path) -> dict[str, str]:
    """What each finished stage was known by; those of rounds are in folders of their own."""
    return {
        ".".join([*path.relative_to(folder).parts[:-1], name]): stage["key"]
        for path in folder.rglob("stages.json")
        for name, stage in json.loads(path.read_text()).items()
    }


def settings(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run.json").read_text())["settings"]
    return found


def forbid(monkeypatch: pytest.MonkeyPatch, *classes: type) -> None:
    """Calling an instance of these fails."""

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("computed again")

    for cls in classes:
        monkeypatch.setattr(cls, "__call__", fail)


def test_a_run_goes_on_in_the_middle_of_its_recovery(
    old: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = old("recover_stopped")
    decision, searched, first = (
        (folder / "decision.json").read_bytes(),
        lines(folder, "search"),
        lines(folder, "recover"),
    )
    before = settings(folder)
    forbid(monkeypatch, tiny.Search)
    assert again("run", folder) == 0
    assert (folder / "decision.json").read_bytes() == decision
    assert lines(folder, "search") == searched
    assert lines(folder, "recover")[: len(first)] == first  # not logged again
    assert steps(folder, "recover") == [2, 4, 6, 8, 10, 12]
    assert settings(folder) == before
    assert keys(folder) == KEYS["recover_stopped"]
    assert (
        tiny.Decision.load(folder / "student" / "decision.json").kept
        == tiny.Decision.load(folder / "decision.json").kept
    )
    assert (folder / "report.html").exists()
    measured = {m["name"]: m["values"] for m in json.loads((folder / "metrics.json").read_text())["measurements"]}
    assert measured["blocks"] == {"teacher": 6, "pruned": 3, "recovered": 3}
    assert measured["held-out loss"].keys() == {"teacher", "pruned", "recovered"}


def test_a_run_goes_on_in_the_middle_of_its_search(old: Callable[[str], Path]) -> None:
    folder = old("search_stopped")
    first = lines(folder, "search")
    assert again("run", folder) == 0
    assert lines(folder, "search")[: len(first)] == first
    assert steps(folder, "search") == steps(folder, "recover") == [2, 4, 6, 8, 10, 12]
    assert keys(folder) == KEYS["recover_stopped"]  # the same recipe
    assert (folder / "metrics.json").exists()


def test_rounds_go_on_in_the_middle_of_the_last_recovery(
    old: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = old("rounds_stopped")
    made = {p: p.read_bytes() for p in [*(folder / "d4").rglob("*"), folder / "d2" / "decision.json"] if p.is_file()}
    first = lines(folder / "d2", "recover")
    forbid(monkeypatch, tiny.Finals, tiny.Greedy)
    assert again("run", folder) == 0
    assert {p: p.read_bytes() for p in made} == made
    assert lines(folder / "d2", "recover")[: len(first)] == first
    assert steps(folder / "d2", "recover") == [2, 4, 6, 8]
    assert keys(folder) == KEYS["rounds_stopped"]
    assert (folder / "metrics.json").exists()


def findings(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "findings.json").read_text())
    return found


def figures(path: Path) -> list[list[str]]:
    with path.open() as file:
        return list(csv.reader(file))


@pytest.mark.parametrize("view", slow_but(["compare", "audit"], "compare"))
def test_a_finished_comparison_is_shown_without_computing_anything(
    old: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, view: str
) -> None:
    folder = old(view)
    cells = {p.name: p.read_bytes() for p in (folder / "cells").iterdir()}
    forbid(monkeypatch, tiny.Recover, tiny.HeldOutLoss, tiny.Frechet, tiny.Search, tiny.Finals, tiny.Criterion)
    assert again(view, folder) == 0
    assert {p.name: p.read_bytes() for p in (folder / "cells").iterdir()} == cells
    assert findings(folder) == findings(BEFORE / view)
    for name in ("table.csv", "trials.csv"):
        (folder / name).unlink()
    assert write_comparison(folder).exists()
    for name in ("table.csv", "trials.csv"):
        assert figures(folder / name) == figures(BEFORE / view / name)


def test_a_stopped_comparison_goes_on_from_its_checkpoint(
    old: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = old("compare_stopped")
    (stopped,) = [p for p in (folder / "cells").iterdir() if p.is_dir()]
    cells = {p: p.read_bytes() for p in (folder / "cells").glob("*-*.json")}
    seen: list[int] = []
    log = tiny.RunFolder.log

    def watched(self: tiny.RunFolder, stage: str, step: int, values: Any) -> None:
        seen.append(step)
        log(self, stage, step, values)

    monkeypatch.setattr(tiny.RunFolder, "log", watched)
    assert again("compare", folder) == 0
    assert seen == [8, 10, 12]
    assert {p: p.read_bytes() for p in cells} == cells
    assert not stopped.exists()
    assert len(findings(folder)["trials"]) == 1


def test_classes_are_found_by_their_paths_of_then() -> None:
    recipe = tiny.load_recipe(BEFORE / "resolved.yaml")
    assert recipe.compare is not None
    assert all(type(c).__name__ in (name, "Search") for name, c in (recipe.compare.candidates or {}).items())
    assert [type(m).__name__ for m in recipe.evaluate] == ["HeldOutLoss", "Frechet", "Latency", "Fidelity"]
    samplers = [c.make_sampler({"blocks": 8}) for c in recipe.compare.candidates.values() if isinstance(c, tiny.Search)]
    assert [type(s).__name__ for s in samplers] == ["ExactK", "GumbelTopK", "ScoreFunction"]
