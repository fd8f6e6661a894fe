"""The lines to copy of a report do what is said beside them."""

from __future__ import annotations

import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

import tinyfusion_core as tiny
from tinyfusion_core.cli import main
from tinyfusion_core.reporting.next_steps import next_steps
from tinyfusion_core.reporting.page import Figures
from tinyfusion_images.pictures import Pictures


def test_lines_load_export_and_sample(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tiny.RunFolder(shutil.copytree(finished, tmp_path / "it's a run"))
    decision = tiny.Decision.load(run / "decision.json")
    steps = dict(next_steps(run, {"": decision}, Pictures().show(run)))
    assert next(iter(steps)) == "Load it in Python" and len(steps) == 3
    known: dict = {}
    exec("\n".join(steps.pop("Load it in Python")), known)
    assert len(known["student"].blocks) == 4
    for lines in steps.values():
        program, *arguments = shlex.split(lines[0])
        assert program == "tinyfusion"
        assert main(arguments) == 0
    assert (run / "figures" / "student.png").exists()
    assert "[0, 1, 6, 7]" in capsys.readouterr().out


def test_what_can_be_asked_next_depends_on_the_run(tmp_path: Path) -> None:
    run = tiny.RunFolder(tmp_path / "run")
    run.path.mkdir()
    found = tiny.Decision(blocks=("b.0", "b.1"), kept=(0,), method="Search", marginals=(0.9, 0.1))

    def lines(decisions: dict[str, tiny.Decision], **recipe: object) -> list[str]:
        (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        return [line for _, lines in next_steps(run, decisions, [Figures("a", "b", [])]) for line in lines][3:]

    budgets = f"tinyfusion budgets {run.path}"
    compare = f"tinyfusion compare {run.path}/recipe.yaml --run-dir {run.path}-compare"
    assert lines({"": found}, search={}, recover={}) == [budgets, compare]
    assert lines({"": found}, search={}) == [budgets]
    assert lines({"": replace(found, marginals=())}, search={}, recover={}) == [compare]
    trained = f"{compare} --train null --backbone.checkpoint {run.path}/teacher"
    assert lines({"": found}, train={}, search={}, recover={}) == [budgets, trained]
    to_a_quality = replace(found, marginals=(), provenance={"quality": []})
    assert lines({"": to_a_quality}, search={}, recover={}) == []
    assert lines({"a": found, "b": found}, rounds={}) == []
    assert next_steps(run, {}, []) == []
    assert f"{run.path}/b/student" in next_steps(run, {"a": found, "b": found}, [])[0][1][1]
