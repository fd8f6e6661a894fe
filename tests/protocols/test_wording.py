"""Messages name keys where there is a recipe, and arguments where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

import tinyfusion_core as tiny
from interrupted import task
from places import ROOT
from tinyfusion_core.cli import main
from tinyfusion_core.errors import MissingFileError, about_a_recipe, worded
from tinyfusion_core.pipeline.planning.plan import make_plan

RECIPE = ROOT / "recipes" / "quickstart.yaml"


@pytest.mark.parametrize(
    ("in_a_recipe", "in_python"),
    [
        ("recover.kd.taps: [9, 1] is out of range", "Recover.kd.taps: [9, 1] is out of range"),
        ("steps (of recover or train) is 0; null leaves it out", "steps (of Recover) is 0; None leaves it out"),
        ("search.lr is -1; expected a rate, or null", "lr is -1; expected a rate, or None"),
        ("evaluate: HeldOutLoss.draws is 0", "HeldOutLoss.draws is 0"),
        ("set trainer.batch_size, or compare.seeds", "set Trainer.batch_size, or Compare.seeds"),
        ("data.folder: there is no data/search.lr", "folder: there is no data/search.lr"),
        ("search.yaml: not readable; 'search.lr' and /tmp/search.lr are files", None),
        ("'loss' is 'x'; expected a finite number or null", None),
        ("train.py, recover.pt and trainer.json are no arguments", None),
    ],
)
def test_one_message_two_readers(in_a_recipe: str, in_python: str | None) -> None:
    assert worded(in_a_recipe) == (in_python or in_a_recipe)
    assert str(MissingFileError(worded(in_a_recipe))) == worded(in_a_recipe)
    with about_a_recipe():
        assert str(tiny.UserError(in_a_recipe)) == in_a_recipe


def test_the_same_mistake_in_python_and_in_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(tiny.UserError, match=r"^lr_gates is -1\.0; expected a rate above 0"):
        tiny.Search(keep=4, lr_gates=-1.0)
    with pytest.raises(tiny.UserError, match=r"quickstart\.yaml: search\.lr_gates is -1\.0; expected a rate above 0"):
        tiny.load_recipe(RECIPE, ["--search=Search", "--search.keep=4", "--search.lr_gates=-1.0"])
    recipe = tiny.load_recipe(RECIPE, ["--search=Search", "--search.keep=99"])
    (problem,) = make_plan(recipe).problems
    assert problem.startswith("search.keep is 99; expected 1 to 8 blocks")
    with pytest.raises(tiny.UserError, match=r"^search\.keep is 99"):
        tiny.run_recipe(recipe, tmp_path / "run")
    with pytest.raises(tiny.UserError, match=r"^keep is 99"):
        tiny.Search(keep=99)(task(), tiny.Trainer(precision="fp32"))
    assert main(["validate", str(RECIPE), "--search=Search", "--search.keep=99"]) == 2
    assert "search.keep is 99; expected 1 to 8 blocks" in capsys.readouterr().err
