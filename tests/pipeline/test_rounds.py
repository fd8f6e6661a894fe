"""Progressive pruning: rounds in one run folder, each the teacher and the source of the next."""

from __future__ import annotations

import json
import shutil
import signal
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import tinyfusion_core as tiny
from forks import start, wait
from kills import die_at
from places import ROOT
from small_run import RECIPE, run
from tinyfusion_core.cli import main
from tinyfusion_core.pipeline.planning.plan import make_plan
from tinyfusion_core.pipeline.tasks import make_task
from tinyfusion_core.pruning.prune import WEIGHTS

pytestmark = pytest.mark.filterwarnings("ignore:recover.kd:UserWarning")  # of a term that hardly counts here

ROUNDS = {
    "d4": {"search": {"pattern": [1, 2], "steps": 6}, "recover": {"steps": 6, "kd": "MaskedKD"}},
    "d2": {"search": {"pattern": [1, 2], "steps": 6}, "recover": {"steps": 12, "kd": "OutputKD"}},
}

OUT_OF_RANGE = {"class_path": "MaskedKD", "init_args": {"taps": [[4, 7]]}}


def write(path: Path) -> Path:
    content = {k: v for k, v in RECIPE.items() if k not in ("search", "recover")} | {"rounds": ROUNDS}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.fixture
def rounds(tmp_path: Path) -> Path:
    return write(tmp_path / "rounds.yaml")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, to copy; what it printed is in `printed.txt` beside it."""
    folder = tmp_path_factory.mktemp("rounds")
    with (folder / "printed.txt").open("w") as printed, redirect_stdout(printed):
        assert run(write(folder / "rounds.yaml"), folder / "run") == 0
    return folder / "run"


def students(folder: Path) -> list[dict[str, torch.Tensor]]:
    return [load_file(folder / name / "student" / "model.safetensors") for name in ROUNDS]


def assert_same(a: Path, b: Path) -> None:
    for ours, theirs in zip(students(a), students(b), strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(v, theirs[k]) for k, v in ours.items())


def test_each_student_is_the_next_rounds_teacher_and_source(rounds: Path, made: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(made, tmp_path / "run")
    assert "8 → 4 → 2 blocks" in (made.parent / "printed.txt").read_text()
    first, second = (tiny.Decision.load(folder / name / "decision.json") for name in ROUNDS)
    assert (len(first.blocks), len(first.kept), len(second.blocks), len(second.kept)) == (8, 4, 4, 2)
    made = json.loads((folder / "d4" / "student" / "config.json").read_text())
    assert second.provenance["source"]["sha256"] == made["sha256"][WEIGHTS]
    assert second.provenance["source"]["licence"] == "apache-2.0"
    measured = {m["name"]: m["values"] for m in json.loads((folder / "metrics.json").read_text())["measurements"]}
    assert measured["blocks"] == {"teacher": 8, "d4 pruned": 4, "d4": 4, "d2 pruned": 2, "d2": 2}
    # What the second round began with is what the first one made, without two of its blocks.
    task = make_task(tiny.load_recipe(rounds), tiny.load_pretrained(folder / "d4" / "student"))
    (loss,) = tiny.HeldOutLoss(draws=1)(task, {"x": tiny.prune(task, second)}, tiny.Trainer(precision="fp32"))
    assert loss.values["x"] == pytest.approx(measured["held-out loss"]["d2 pruned"], rel=1e-5)
    page = (folder / "report.html").read_text()
    assert "<h3>d4</h3>" in page and "How the decision came about: d4" in page
    assert "<h3>d2</h3>" in page and "How the decision came about: d2" in page
    assert main(["sample", str(folder), "--num", "4", "--out", str(tmp_path / "grid.png")]) == 0
    assert len(tiny.load_pretrained(folder / "d2" / "student").blocks) == 2
    before = [p.stat().st_mtime_ns for p in sorted(folder.glob("*/student/*"))]
    assert run(rounds, folder) == 0
    assert before == [p.stat().st_mtime_ns for p in sorted(folder.glob("*/student/*"))]


@pytest.mark.slow
def test_a_killed_run_goes_on_in_its_round(rounds: Path, tmp_path: Path) -> None:
    places = ["d4.recover", "d2.search", "d2.recover"]
    flags = [*(f"--rounds.{place}.steps=16" for place in places), "--trainer.checkpoint_every=3"]
    killed = tmp_path / "killed"
    for place in places:
        words = ["run", str(rounds), "--run-dir", str(killed), *flags]
        process = start(partial(die_at, place, 8, *words), tmp_path / place)
        assert wait(process) == [-signal.SIGKILL], (tmp_path / place).read_text()
        round_, stage = place.split(".")
        assert (killed / round_ / "checkpoints" / stage).exists()
        assert (killed / "d2").exists() == (round_ == "d2")
    assert run(rounds, killed, *flags) == 0
    assert run(rounds, tmp_path / "whole", *flags) == 0
    assert_same(killed, tmp_path / "whole")


@pytest.mark.slow
def test_a_changed_round_spoils_itself_and_the_later_ones(rounds: Path, made: Path, tmp_path: Path, capsys) -> None:
    folder = shutil.copytree(made, tmp_path / "run")
    first = students(folder)[0]
    assert run(rounds, folder, "--rounds.d2.recover.steps=8") == 2
    err = capsys.readouterr().err
    assert "rounds.d2.recover.steps: 12 -> 8" in err
    assert err.rstrip().endswith("--restart-from d2.recover")
    assert run(rounds, folder, "--rounds.d2.recover.steps=8", "--restart-from", "d2.recover") == 0
    assert all(torch.equal(v, first[k]) for k, v in students(folder)[0].items())
    assert run(rounds, tmp_path / "new", "--rounds.d2.recover.steps=8") == 0
    assert_same(folder, tmp_path / "new")
    assert run(rounds, folder, "--restart-from", "d3.recover") == 2
    assert "no stage 'd3.recover'; did you mean" in capsys.readouterr().err
    # A round that has gone leaves nothing.
    content = yaml.safe_load(rounds.read_text())
    content["rounds"] = {"d4": ROUNDS["d4"]}
    rounds.write_text(yaml.safe_dump(content, sort_keys=False))
    assert run(rounds, folder) == 2
    assert run(rounds, folder, "--restart-from", "evaluate") == 0
    assert not (folder / "d2").exists()
    assert (folder / "d4" / "student").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"search": {"pattern": [1, 2]}}, "search stands beside rounds"),
        ({"rounds": {"student": ROUNDS["d4"]}}, "'student' becomes a folder of the run"),
        ({"rounds": {"a/b": ROUNDS["d4"]}}, "'a/b' becomes a folder of the run"),
        ({"rounds": {4: ROUNDS["d4"]}}, "4 becomes a folder of the run"),
        ({"rounds": {"d4": {}}}, "rounds.d4.search: missing"),
        ({"rounds": {}}, "expected a mapping of round names"),
        ({"rounds": {"d4": {"recover": None}}}, "search"),
        pytest.param(
            {"rounds": {"d4": ROUNDS["d4"], "d2": {"search": {"pattern": [3, 8], "steps": 1}}}},
            "rounds.d2: search.pattern: [3, 8] does not fit 'blocks' with 4",
            marks=pytest.mark.slow,
        ),
        ({"rounds": {"d4": ROUNDS["d4"] | {"recover": {"kd": OUT_OF_RANGE}}}}, "rounds.d4: recover.kd.taps: [4, 7]"),
    ],
)
def test_rounds_that_cannot_be_are_one_clear_error(rounds: Path, capsys, change: dict, message: str) -> None:
    rounds.write_text(yaml.safe_dump(yaml.safe_load(rounds.read_text()) | change, sort_keys=False))
    assert main(["validate", str(rounds)]) == 2
    assert message in capsys.readouterr().err


def test_what_classes_refuse_in_rounds_is_said_of_each(rounds: Path, capsys) -> None:
    wrong = {
        "d4": {"search": {"keep": 4, "steps": -1}, "recover": {"steps": -2}},
        "d2": {"search": {"keep": 2, "steps": -3}},
    }
    rounds.write_text(yaml.safe_dump(yaml.safe_load(rounds.read_text()) | {"rounds": wrong}, sort_keys=False))
    assert main(["validate", str(rounds)]) == 2
    search, recovery, later = capsys.readouterr().err.splitlines()
    assert "rounds.d4.search.steps is -1; expected" in search
    assert "rounds.d4.recover: steps (of recover or train) is -2" in recovery
    assert "rounds.d2.search.steps is -3" in later


@pytest.mark.slow
def test_the_published_layouts_are_planned_with_their_taps() -> None:
    def plan(name: str) -> dict[str, str]:
        return dict(make_plan(tiny.load_recipe(ROOT / "recipes" / f"{name}.yaml")).rows)

    d19 = plan("dit_xl_d19")
    assert d19["keeps"] == "19 of 28 blocks"
    assert d19["after pruning"].startswith("459,983,264 parameters")
    assert d19["taps"].endswith("2 ↔ 3, 5 ↔ 7, 7 ↔ 11, 10 ↔ 15, 12 ↔ 19, 15 ↔ 23, 18 ↔ 27")
    d7 = plan("dit_d14_d7")
    assert d7["after pruning"].startswith("173,121,440 parameters")
    assert d7["taps"].endswith("0 ↔ 1, 1 ↔ 3, 2 ↔ 5, 3 ↔ 7, 4 ↔ 9, 5 ↔ 11, 6 ↔ 13")
    chain = plan("dit_xl_d7_progressive")
    assert chain["d14: after pruning"].startswith("340,457,504 parameters")
    assert chain["d7: after pruning"] == d7["after pruning"]
    assert chain["d7: taps"] == d7["taps"]


@pytest.mark.slow
def test_the_small_progressive_recipe(tmp_path: Path) -> None:
    assert run(ROOT / "recipes" / "progressive_digits.yaml", tmp_path / "run") == 0
    measured = {
        m["name"]: m["values"] for m in json.loads((tmp_path / "run" / "metrics.json").read_text())["measurements"]
    }
    loss = measured["held-out loss"]
    assert loss["d4"] < loss["d4 pruned"]
    assert loss["d2"] < 0.5 * loss["d2 pruned"]


@pytest.mark.slow
def test_rounds_in_another_order_are_another_run(rounds: Path, tmp_path: Path, capsys) -> None:
    content = yaml.safe_load(rounds.read_text())
    content["rounds"] = {"a": ROUNDS["d4"], "b": {**ROUNDS["d4"], "recover": None}}
    rounds.write_text(yaml.safe_dump(content, sort_keys=False))
    assert run(rounds, tmp_path / "run") == 0
    content["rounds"] = dict(reversed(content["rounds"].items()))
    rounds.write_text(yaml.safe_dump(content, sort_keys=False))
    capsys.readouterr()
    assert run(rounds, tmp_path / "run") == 2
    err = capsys.readouterr().err
    assert "rounds.a.search (comes after): None -> b" in err
    assert "--restart-from b.search" in err


@pytest.mark.slow
def test_a_round_is_restarted_by_its_own_name(rounds: Path, made: Path, tmp_path: Path, capsys) -> None:
    folder = shutil.copytree(made, tmp_path / "run")
    path = folder / "d2" / "decision.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "kept": [0]}))
    assert run(rounds, folder) == 2
    assert "--restart-from d2.search, or d2.recover" in capsys.readouterr().err
    # Stages of other recipes are no stages of this one: nothing is forgotten.
    for stage in ("recover", "train"):
        assert run(rounds, folder, "--restart-from", stage) == 2
        assert f"no stage '{stage}'" in capsys.readouterr().err
    assert (folder / "d4" / "student" / "config.json").exists()
