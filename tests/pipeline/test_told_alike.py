"""Whatever command tells of a run, it tells the same: the blocks that the student has, and one number by one name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import tinyfusion_core as tiny
from small_run import run
from tinyfusion_core.cli import main
from tinyfusion_core.pruning.record import decision_of

COMMANDS = {
    "show": ["show"],
    "watch": ["watch", "--once"],
    "budgets": ["budgets"],
    "indices": ["export", "--to", "indices"],
    "mergekit": ["export", "--to", "mergekit"],
    "diffusers": ["export", "--to", "diffusers"],
    "grid": ["sample", "--num", "2"],
    "samples": ["sample", "--num", "2", "--to"],
}


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("edited", [["decision.json"], ["decision.json", "student/decision.json"]])
@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_tells_of_blocks_that_the_student_lacks(
    name: str, edited: list[str], finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    for file in edited:
        edit(folder / file, kept=[0, 1, 2, 3])
    command, *rest = COMMANDS[name]
    where = [str(tmp_path / "pictures")] if name == "samples" else []
    assert main([command, str(folder), *rest, *where]) == 2
    said = capsys.readouterr()
    assert f"{folder / edited[-1]}: not the decision that student/ was made from" in said.err
    assert "--restart-from search" in said.err
    assert "0, 1, 2, 3" not in said.out
    assert not (tmp_path / "pictures").exists()


def test_the_decision_of_a_student_that_is_not_whole_is_the_runs(finished: Path, tmp_path: Path) -> None:
    run = tiny.RunFolder(shutil.copytree(finished, tmp_path / "run"))
    found = decision_of(run)
    assert found == tiny.Decision.load(run / "student" / "decision.json")
    (run / "student" / "config.json").unlink()  # which is written last
    assert decision_of(run) == found
    shutil.rmtree(run / "student")
    assert decision_of(run) == found


@pytest.mark.slow
@pytest.mark.parametrize("draws", [1, 3])
def test_the_held_out_loss_of_budgets_is_that_of_the_table(draws: int, recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    how = f"--evaluate=[{{class_path: HeldOutLoss, init_args: {{draws: {draws}, batch_size: 100}}}}]"
    assert (
        run(recipe, folder, "--search={class_path: Search, init_args: {keep: 4, steps: 4}}", "--recover.steps=2", how)
        == 0
    )
    assert main(["budgets", str(folder), "--keep", "8", "4", "--recover-steps", "2"]) == 0
    full, pruned = json.loads((folder / "budgets.json").read_text())["rows"]
    table = {m["name"]: m["values"] for m in json.loads((folder / "metrics.json").read_text())["measurements"]}
    told = table["held-out loss"]
    assert full["pruned"] == pytest.approx(told["teacher"], rel=1e-6)
    assert pruned["pruned"] == pytest.approx(told["pruned"], rel=1e-6)
    assert pruned["recovered"] == pytest.approx(told["recovered"], rel=1e-5)
