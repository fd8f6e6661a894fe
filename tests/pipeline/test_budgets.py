"""Several budgets from one search."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

import tinyfusion_core as tiny
from small_run import run
from tinyfusion_core.cli import main
from tinyfusion_core.pipeline.budgets import _told_apart, budgets_of
from tinyfusion_core.runtime.run_folder import RunFolder
from tinyfusion_core.runtime.workers import base
from tinyfusion_core.runtime.workers.base import P, Workers
from tinyfusion_core.samplers.subset import ScoreFunction
from toys import Match, Planted, planted_data


@pytest.mark.slow
def test_budgets_are_nested_in_the_order_of_the_marginals(tmp_path: Path) -> None:
    data = planted_data()
    task = tiny.Task(backbone=Planted(), loss=Match(), train=data, held_out=data)
    trainer = tiny.Trainer(batch_size=32, precision="fp32")
    found = tiny.Search(keep=4, steps=120, update=tiny.Frozen())(task, trainer)
    path = tmp_path / "decision.json"
    found.save(path)
    kept = {k: tiny.Nested(keep=k, decision=str(path))(task, trainer).kept for k in range(1, 9)}
    assert kept[4] == found.kept
    assert all(set(kept[k]) < set(kept[k + 1]) for k in range(1, 8))
    assert found.marginals[kept[1][0]] == max(found.marginals)
    # Of groups as well, and the record says where it comes from.
    grouped = tiny.Nested(pattern=(1, 4), decision=str(path))(task, trainer)
    assert [sum(4 * g <= i < 4 * g + 4 for i in grouped.kept) for g in (0, 1)] == [1, 1]
    assert grouped.provenance["taken_from"] == str(path)


def test_an_all_but_certain_search_still_ranks_its_blocks() -> None:
    sampler = ScoreFunction({"blocks": 6}, tiny.Rules(keep=3))
    sampler.logits.data.copy_(sampler.logits.new_tensor([20.0, 18.0, 16.0, -16.0, -18.0, -20.0]))
    marginals = sampler.marginals().tolist()
    assert sorted(set(marginals), reverse=True) == marginals
    assert len(set(marginals)) == 6


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:recover.ema")  # which is what this is about
def test_the_command_prunes_a_runs_teacher_to_several_budgets(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    # An average over so many steps would give the first weights of a recovery of twenty.
    average = ["--recover.steps", "2", "--recover.ema", "0.9999"]
    assert run(recipe, folder, "--search={class_path: Search, init_args: {keep: 4, steps: 4}}", *average) == 0
    capsys.readouterr()
    assert main(["budgets", str(folder), "--keep", "8", "6", "3", "--recover-steps", "20"]) == 0
    assert "held-out loss" in capsys.readouterr().out
    rows = json.loads((folder / "budgets.json").read_text())["rows"]
    measured = {m["name"]: m["values"] for m in json.loads((folder / "metrics.json").read_text())["measurements"]}
    full, *_, small = rows
    assert [len(row["kept"]) for row in rows] == [8, 6, 3]
    assert set(small["kept"]) < set(rows[1]["kept"])
    assert full["parameters"] == measured["parameters"]["teacher"]
    assert full["pruned"] == pytest.approx(measured["held-out loss"]["teacher"], rel=1e-6)
    assert full["recovered"] is None
    assert small["recovered"] < 0.7 * small["pruned"]
    assert small["parameters"] < rows[1]["parameters"] < full["parameters"]
    assert main(["budgets", str(folder), "--keep", "9"]) == 2
    assert "9" in capsys.readouterr().err


@dataclass(frozen=True)
class Reversed(Workers):
    """Does the pieces here, from the last on."""

    done: list[object] = field(default_factory=list)

    def run(self, work: Callable[[P], object], pieces: Sequence[P], logs: Path) -> Iterator[P]:
        for piece in reversed(pieces):
            pickle.loads(pickle.dumps(work))(piece)
            self.done.append(piece)
            yield piece


def test_others_compute_what_one_process_computes_and_nothing_twice(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path / "run")
    assert (
        run(recipe, folder.path, "--search={class_path: Search, init_args: {keep: 4, steps: 4}}", "--recover=null") == 0
    )
    others = Reversed()
    rows = budgets_of(folder, [6, 3], workers=others)
    assert others.done == [3, 6]
    assert [len(row.kept) for row in rows] == [6, 3]
    kept = {path: path.read_bytes() for path in (folder / "budgets").glob("*.json")}
    assert budgets_of(folder, [3, 6], workers=others) == rows[::-1]
    assert others.done == [3, 6]
    shutil.rmtree(folder / "budgets")
    assert budgets_of(folder, [6, 3]) == rows
    assert {path: path.read_bytes() for path in kept} == kept
    assert len(budgets_of(folder, [6, 3, 8])) == 3
    monkeypatch.setattr(base, "rank_and_world_size", lambda: (0, 2))
    with pytest.raises(tiny.UserError, match="--workers starts processes of its own"):
        budgets_of(folder, [2], workers=others)


@pytest.mark.slow
def test_a_teacher_that_the_run_has_trained_is_pruned_too(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"input_size": 8, "patch_size": 2, "in_channels": 1, "hidden_size": 16, "depth": 4, "num_heads": 2}
    network = {"class_path": "DiT", "init_args": {**sizes, "num_classes": 10, "learn_sigma": False}}
    search = {"class_path": "Search", "init_args": {"keep": 2, "steps": 4}}
    changed = {"backbone": network, "train": {"steps": 4}, "search": search, "recover": None}
    recipe.write_text(yaml.safe_dump({**yaml.safe_load(recipe.read_text()), **changed}))
    folder = tmp_path / "run"
    assert run(recipe, folder) == 0
    capsys.readouterr()
    assert main(["budgets", str(folder), "--keep", "4", "1", "--json"]) == 0
    written = json.loads((folder / "budgets.json").read_text())
    full, small = written["rows"]
    assert json.loads(capsys.readouterr().out) == {"recover_steps": 0, "rows": [full, small]}
    measured = {m["name"]: m["values"] for m in json.loads((folder / "metrics.json").read_text())["measurements"]}
    assert full["pruned"] == pytest.approx(measured["held-out loss"]["teacher"], rel=1e-6)
    assert len(small["kept"]) == 1
    assert main(["compare", str(recipe), "--recover", "{steps: 2}"]) == 2
    assert "--train null --backbone.checkpoint RUN_DIR/teacher" in capsys.readouterr().err


def test_the_decision_comes_first_and_what_is_tied_is_not_ranked(tmp_path: Path) -> None:
    blocks = tuple(f"blocks.{i}" for i in range(6))
    path = tmp_path / "decision.json"
    marginals = (0.9, 0.8, 1.0, 0.1, 0.2, 0.0)
    # As after a final that another mask than the most probable one has won.
    tiny.Decision(blocks=blocks, kept=(0, 2, 4), method="Finals", marginals=marginals).save(path)
    kept = {k: tiny.Nested(keep=k, decision=str(path)).preview(blocks).kept for k in range(1, 7)}
    assert kept[2] == (0, 2)
    assert kept[3] == (0, 2, 4)
    assert kept[4] == (0, 1, 2, 4)
    certain = tiny.Decision(blocks=blocks, kept=(0, 1, 2), method="Search", marginals=(1.0, 1.0, 1.0, 0.0, 0.0, 0.0))
    certain.save(path)
    assert tiny.Nested(keep=3, decision=str(path)).preview(blocks).kept == (0, 1, 2)
    with pytest.raises(tiny.UserError, match="which of the blocks 0, 1, 2 to keep: their marginals are alike"):
        tiny.Nested(keep=2, decision=str(path)).preview(blocks)
    assert tiny.Nested(keep=1, protect=[1], decision=str(path)).preview(blocks).kept == (1,)
    assert _told_apart(certain) == [6, 3]


def test_a_decision_without_marginals_is_refused(tmp_path: Path) -> None:
    blocks = tuple(f"blocks.{i}" for i in range(4))
    path = tmp_path / "decision.json"
    tiny.Decision(blocks=blocks, kept=(0, 1), method="Keep").save(path)
    with pytest.raises(tiny.UserError, match=r"decision\.json: has marginals of 0 blocks, the network 4"):
        tiny.Nested(keep=2, decision=str(path)).preview(blocks)
    assert _told_apart(tiny.Decision.load(path)) == [4]  # of which the command gets the same message
    with pytest.raises(tiny.UserError, match="the decision is about 4 blocks"):
        tiny.Nested(keep=2, decision=str(path)).preview(blocks[:3])
