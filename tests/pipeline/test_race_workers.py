"""A run whose race is recovered by workers finds what one process finds."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

import tinyfusion_core as tiny
from small_run import RECIPE, run
from tinyfusion_core.errors import Interrupted
from tinyfusion_core.pipeline.run import run_recipe
from tinyfusion_core.pipeline.tasks import searched_task
from tinyfusion_core.registry import registry as plugins
from tinyfusion_core.runtime.workers.base import P, Workers
from tinyfusion_core.runtime.workers.ray_tasks import RayWorkers
from tinyfusion_core.selection.judging.recoveries import Entrant

KEEP = [{"class_path": "Keep", "init_args": {"blocks": blocks}} for blocks in ([0, 1, 3, 6], [0, 2, 4, 6])]
HOW = {"steps": 60, "samples": 16, "batch_size": 8, "updates_per_batch": 1}
RACE = {"class_path": "Race", "init_args": {"keep": 4, "proposers": KEEP, **HOW}}
SIZES = {"input_size": 8, "patch_size": 2, "in_channels": 1, "hidden_size": 16, "num_heads": 2, "depth": 8}
SMALL = {"class_path": "DiT", "init_args": {**SIZES, "num_classes": 10, "learn_sigma": False}}
TRAINED = {"backbone": SMALL, "train": {"steps": 2}, "evaluate": []}
FIRST = {keep: [{"class_path": "FirstN", "init_args": {"keep": keep}}] for keep in (6, 4)}
QUALITY = {"metric": "HeldOutLoss", "within": "9x", "protect": [0, 1, 2, 3, 4, 5], "steps": 48, "samples": 16}
SHIFTED = '''
from dataclasses import dataclass

from tinyfusion_core import Start, hookimpl


@dataclass(frozen=True, kw_only=True)
class Shifted(Start):
    """All biases a little off."""

    by: float = 0.01

    def __call__(self, task, student, decision, trainer, stage, run=None):
        for name, weight in student.named_parameters():
            if name.endswith("bias"):
                weight.data += self.by


@hookimpl
def tinyfusion_register_starts():
    return [Shifted]
'''


@dataclass
class Reversed(Workers):
    """This process, from the last piece to the first, until it is asked to stop."""

    most: int = 1000
    done: list[Entrant] = field(default_factory=list)

    def run(self, work: Callable[[P], object], pieces: Sequence[P], logs: Path) -> Iterator[P]:
        assert pieces, "nobody is asked to do nothing"
        for piece in reversed(pieces):
            if len(self.done) == self.most:
                raise Interrupted("stopped", 2)
            work(piece)
            assert isinstance(piece, Entrant)
            self.done.append(piece)
            yield piece


@pytest.fixture(autouse=True)
def fresh() -> None:
    searched_task.cache_clear()


def written(recipe: Path, settings: Mapping[str, Any]) -> tiny.Recipe:
    recipe.write_text(yaml.safe_dump({**RECIPE, "recover": None, **settings}))
    return tiny.load_recipe(recipe)


def decided(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "decision.json").read_text())
    found["provenance"].pop("date", None)
    return found


@pytest.mark.slow
def test_a_race_by_workers_is_that_of_one_process_and_goes_on_with_or_without_them(
    recipe: Path, tmp_path: Path
) -> None:
    made = written(recipe, {**TRAINED, "search": RACE})
    run_recipe(made, tmp_path / "one")
    entries = [entry for number in decided(tmp_path / "one")["provenance"]["race"] for entry in number]
    with pytest.raises(Interrupted):
        run_recipe(made, tmp_path / "stopped", workers=Reversed(most=3))
    workers = Reversed()
    run_recipe(made, tmp_path / "stopped", workers=workers)
    assert len(workers.done) == len(entries) - 3 > 0
    assert decided(tmp_path / "stopped") == decided(tmp_path / "one")


@pytest.mark.slow
def test_workers_are_given_the_network_of_their_round(recipe: Path, tmp_path: Path) -> None:
    first, last = ({"class_path": "Race", "init_args": {**HOW, "keep": k, "proposers": FIRST[k]}} for k in (6, 4))
    rounds = {"a": {"search": first, "recover": {"steps": 4}}, "b": {"search": last}}
    made = written(recipe, {**TRAINED, "search": None, "rounds": rounds})
    run_recipe(made, tmp_path / "one")
    run_recipe(made, tmp_path / "several", workers=Reversed())
    for name in rounds:
        assert decided(tmp_path / "several" / name) == decided(tmp_path / "one" / name)


@pytest.mark.slow
def test_a_quality_that_a_metric_judges_by_workers(recipe: Path, tmp_path: Path) -> None:
    made = written(recipe, {"search": QUALITY})
    run_recipe(made, tmp_path / "one")
    workers = Reversed()
    run_recipe(made, tmp_path / "several", workers=workers)
    assert decided(tmp_path / "several") == decided(tmp_path / "one")
    assert any(entrant.stage.startswith("measured") for entrant in workers.done)


def test_workers_need_a_race(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    written(recipe, {"search": KEEP[0]})
    assert run(recipe, tmp_path / "out", "--workers", "2") == 2
    assert "--workers: this run has nothing for them" in capsys.readouterr().err
    written(recipe, {"search": RACE})
    monkeypatch.setattr("tinyfusion_core.runtime.workers.base.rank_and_world_size", lambda: (0, 2))
    assert run(recipe, tmp_path / "out", "--workers", "2") == 2
    assert "--workers starts processes of its own" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_processes_of_ray_recover_entrants_with_a_start_of_a_plugin_file(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugins, "_files", {})
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (recipe.parent / "shifted.py").write_text(SHIFTED)
    race = {**RACE, "init_args": {**RACE["init_args"], "start": "Shifted"}}
    made = written(recipe, {"plugins": ["shifted.py"], "search": race})
    run_recipe(made, tmp_path / "one")
    run_recipe(made, tmp_path / "several", workers=RayWorkers(2))
    assert decided(tmp_path / "several") == decided(tmp_path / "one")
