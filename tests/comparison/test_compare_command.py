"""`tinyfusion compare` and `audit`, from a recipe to tables, figures and a page."""

from __future__ import annotations

import csv
import json
import re
import shlex
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

import tinyfusion_core as tiny
from small_run import RECIPE
from tinyfusion_core.cli import main
from tinyfusion_core.comparison.results import ComparisonResults
from tinyfusion_core.pipeline.planning.plan import make_comparison_plan, make_plan
from tinyfusion_core.pipeline.tasks import make_task
from tinyfusion_core.selection.criteria.positions import FirstN
from tinyfusion_images.features import shipped


@pytest.fixture
def comparing(recipe: Path) -> Path:
    settings = {
        **RECIPE,
        "search": {"pattern": [4, 8], "steps": 3},
        "recover": {"steps": 2},
        "evaluate": [*RECIPE["evaluate"], {"class_path": "Frechet", "init_args": {"num_samples": 10}}],
        "compare": {
            "candidates": {
                "learned": {"pattern": [4, 8], "steps": 3, "lr_gates": 1e-2},
                "<first>": {"class_path": "FirstN", "init_args": {"keep": 4}},
            },
            "seeds": 2,
            "random": 2,
        },
        "audit": {"candidates": {"last": {"class_path": "LastN", "init_args": {"keep": 4}}}, "masks": 3, "steps": 1},
    }
    recipe.write_text(yaml.safe_dump(settings))
    return recipe


def test_one_command_makes_table_page_and_figures(comparing: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("runs/small-compare")
    assert main(["compare", str(comparing)]) == 0
    out = capsys.readouterr().out
    assert "8 → 4 blocks, 2 recovery steps, 2 seeds" in out
    assert f"report: {folder / 'report.html'}" in out
    names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.parent.name != "cells"}
    assert names == {
        ".lock", "findings.json", "recipe.yaml", "report.html", "table.csv", "trials.csv", "figures/kept.svg",
        "figures/scatter.svg", "figures/choices.svg",
    }  # fmt: skip
    found = ComparisonResults.load(folder / "findings.json")
    assert all("Fréchet distance" in e.metrics for e in found.entries)
    assert found.teacher < min(t.calibration for t in found.entries)
    with (folder / "table.csv").open() as file:
        table = {line["candidate"]: line for line in csv.DictReader(file)}
    assert set(table) == {"learned", "<first>", "random subsets"}
    assert table["<first>"]["kept"] == "0 1 2 3"
    recovered = [e.recovered for e in found.entries if e.method == "<first>"]
    assert float(table["<first>"]["healed"]) == pytest.approx(sum(recovered) / 2)
    with (folder / "trials.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 2 * 2 + 2
    page = re.sub(r">\s+<", "><", (folder / "report.html").read_text())
    assert not re.search(r"(src|href)=['\"](?!data:|#)", page)
    assert page.count("<svg") == 3
    assert "small-compare: 8 → 4 blocks: 2 ways to choose beside 2 random subsets" in page
    assert "&lt;first&gt;" in page and "<first>" not in page
    assert shlex.join(["tinyfusion", "compare", str(comparing)]) in page


@pytest.mark.slow
def test_what_is_known_is_not_computed_again(
    comparing: Path, tmp_path: Path, worked: Counter[str], capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    """The sampling decides the distance alone, and an audit shares the decisions."""
    monkeypatch.chdir(tmp_path)
    folder = Path("runs/small-compare")
    assert main(["compare", str(comparing)]) == 0
    found = ComparisonResults.load(folder / "findings.json")
    with (folder / "table.csv").open() as file:
        table = {line["candidate"]: line for line in csv.DictReader(file)}
    worked.clear()
    capsys.readouterr()
    assert main(["compare", str(comparing), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert {c["candidate"]: c["kept"] for c in said["candidates"]} == {name: c["kept"] for name, c in table.items()}
    assert Path(said["report"]).samefile(folder / "report.html")
    assert -1 <= said["scores"]["calibration loss"]["mean"] <= 1
    assert worked == {}
    recipe = tiny.load_recipe(comparing)
    again = recipe.compare(make_task(recipe), recipe.recover, recipe.trainer, folder, evaluate=recipe.evaluate)
    assert again == found
    assert worked == {}
    quick = replace(recipe.evaluate[1], batch_size=7)
    fewer = replace(recipe.compare, seeds=1, random=0)
    features = shipped("digits")
    for recovered in (0, 2):
        worked.clear()
        given = replace(make_task(recipe), feature_space=features)
        fewer(given, recipe.recover, recipe.trainer, folder, evaluate=[recipe.evaluate[0], quick])
        assert worked["recovered"] == recovered
        with torch.no_grad():
            features.head.bias += 1
    worked.clear()
    assert main(["compare", str(comparing), "--loss.sampling_steps=3", "--compare.seeds=1"]) == 0
    assert worked == {"recovered": 2}
    assert main(["audit", str(comparing), "--audit.seeds", "1"]) == 0
    assert "Which cheap score foretells" in capsys.readouterr().out


@pytest.mark.slow
def test_a_recipe_that_cannot_be_compared_is_told_why(comparing: Path, tmp_path: Path, capsys) -> None:
    def error(*flags: str) -> str:
        assert main(["compare", str(comparing), "--run-dir", str(tmp_path / "run"), *flags]) == 2
        return capsys.readouterr().err

    assert "compare: needs recover, to train what was pruned" in error("--search=null", "--recover=null")
    assert "compare: give candidates, or a search" in error("--search=null", "--compare.candidates=null")
    rounds = "--rounds={a: {search: {pattern: [4, 8], steps: 2}}}"
    assert "takes one search and one recovery" in error("--search=null", "--recover=null", rounds)
    assert "--train null --backbone.checkpoint RUN_DIR/teacher" in error(
        "--train={steps: 2}", "--backbone.checkpoint=null", "--backbone.variant=null"
    )
    assert "compare.seeds is 0" in error("--compare.seeds=0")
    assert "compare.candidates.learned.stepz: unknown key" in error("--compare.candidates.learned.stepz=3")
    assert "did you mean 'Greedy'" in error("--compare.candidates.learned={class_path: Gready}")
    assert "<first> keeps 3; learned keeps 4" in error("--compare.candidates.<first>.keep=3")
    assert "compare.candidates: the name 1 is no text; put it in quotes" in error(
        "--compare.candidates={1: {class_path: FirstN, init_args: {keep: 4}}}"
    )
    message = error(
        "--compare.candidates={a: {keep: 4, steps: -1}, b: {class_path: Greedy, init_args: {keep: 4, swaps: -1}}}"
    )
    assert (
        "compare.candidates.a.steps is -1; expected" in message
        and "compare.candidates.b: Greedy.swaps is -1" in message
    )
    assert "candidates is {}" not in message
    message = error("--compare.candidates={a: FirstN}")
    assert "FirstN: give keep or pattern or budget, one of the three" in message and "search" not in message
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_does_not_mind_what_its_comparisons_say_and_validate_shows_it(comparing: Path) -> None:
    def problems(*flags: str) -> list[str]:
        recipe = tiny.load_recipe(comparing, flags)
        run, everything = make_plan(recipe), make_plan(recipe, comparisons=True)
        assert everything.rows[: len(run.rows)] == run.rows
        assert everything.problems[: len(run.problems)] == run.problems
        return everything.problems[len(run.problems) :]

    assert problems() == []
    (problem,) = problems("--audit.candidates.first={class_path: FirstN, init_args: {keep: 3}}")
    assert "audit.candidates: not the same budget" in problem
    first, second = (
        problems("--compare.candidates.<first>.keep=9", "--recover=null", "--audit=null"),
        problems("--search=null", "--recover=null", "--rounds={a: {search: {pattern: [4, 8], steps: 2}}}"),
    )
    assert first == ["compare: needs recover, to train what was pruned"]
    assert [problem.partition(":")[0] for problem in second] == ["compare", "audit"]
    assert "compare: give candidates" in problems("--search=null", "--compare.candidates=null", "--audit=null")[0]
    # With candidates of its own a comparison needs no search.
    recipe = tiny.load_recipe(comparing, ["--search=null"])
    assert make_comparison_plan(recipe, recipe.compare).problems == []
    plan = make_comparison_plan(recipe, replace(recipe.compare, candidates={"a": FirstN(keep=9)}))
    assert plan.problems == ["compare.candidates.a: FirstN.keep is 9; expected 1 to 8 blocks"]
    unbuilt = make_plan(tiny.load_recipe(comparing, ["--backbone.checkpoint=null"]), comparisons=True)
    assert sum("hidden_size, depth" in problem for problem in unbuilt.problems) == 1


PLUGIN = """
from dataclasses import dataclass

import tinyfusion_core as tiny

@dataclass(frozen=True)
class Weight(tiny.Metric):
    times: float = 1.0

    def __call__(self, task, models, trainer):
        sums = {name: self.times * sum(float(p.detach().abs().sum()) for p in m.parameters())
                for name, m in models.items()}
        return [tiny.Measurement("sum of weights", sums), tiny.Measurement("unread", dict.fromkeys(models))]

@tiny.hookimpl
def tinyfusion_register_metrics():
    return [Weight]
"""


@pytest.mark.slow
def test_a_comparison_takes_the_metric_of_a_plugin_file(comparing: Path, tmp_path: Path, worked: Counter[str]) -> None:
    (tmp_path / "weight.py").write_text(PLUGIN)
    settings = yaml.safe_load(comparing.read_text())
    settings["evaluate"] += ["Weight", {"class_path": "Weight", "init_args": {"times": 2.0}}, "Latency"]
    settings["compare"] |= {"seeds": 1, "random": 1}
    comparing.write_text(yaml.safe_dump({"plugins": ["weight.py"], **settings}))
    folder = tmp_path / "run"

    def compare(*flags: str) -> list[dict[str, float]]:
        worked.clear()
        assert main(["compare", str(comparing), "--run-dir", str(folder), *flags]) == 0
        return [dict(e.metrics) for e in ComparisonResults.load(folder / "findings.json").entries]

    found = compare()
    assert all(set(metrics) == {"Fréchet distance", "Weight", "Weight (2)"} for metrics in found)
    assert all(metrics["Weight (2)"] == pytest.approx(2 * metrics["Weight"]) for metrics in found)
    assert len({metrics["Weight"] for metrics in found}) == 2, "each network has its own"
    with (folder / "table.csv").open() as file:
        assert [float(line["Weight"]) for line in csv.DictReader(file) if line["Weight"]]
    page = re.sub(r">\s+<", "><", (folder / "report.html").read_text())
    assert "<th>Weight</th><th>Weight (2)</th>" in page and "<th>latency" not in page
    assert (compare(), worked) == (found, {})
    # Another column is measured of what is recovered again, the random subset is not; a column less costs nothing.
    more = "--evaluate=[HeldOutLoss, {class_path: Weight, init_args: {times: 3.0}}]"
    assert [metrics["Weight"] for metrics in compare(more)] == pytest.approx([3 * m["Weight"] for m in found])
    assert worked == {"recovered": 2}
    assert all(set(metrics) == {"Weight"} for metrics in compare(more))
