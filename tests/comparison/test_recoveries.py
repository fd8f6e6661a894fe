"""Comparisons of recoveries: what one choice is worth in the hands of each."""

from __future__ import annotations

import csv
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import yaml

import tinyfusion_core as tiny
import walks
from comparisons import FIRST_AND_LAST, LOSS, RECOVER, TRAINER, task
from small_run import RECIPE
from tinyfusion_core.cli import main
from tinyfusion_core.comparison.results import ComparisonResults
from tinyfusion_core.comparison.statistics import summaries
from tinyfusion_core.comparison.tables import tables
from tinyfusion_core.comparison.verdict import comparison_title, comparison_verdict
from tinyfusion_core.errors import UserError
from tinyfusion_core.pipeline.compare import compare_recipe

BETTER = replace(RECOVER, lr=1e-2)
LONGER = replace(RECOVER, steps=24, batch_size=4)
FIRST = FIRST_AND_LAST["first"]


def compared(folder: Path, recover: tiny.Recover = RECOVER, **settings) -> ComparisonResults:
    return tiny.Compare(seeds=2, random=1, **settings)(task(), recover, TRAINER, folder, search=FIRST, evaluate=LOSS)


def test_each_is_what_it_would_be_as_the_recipes(tmp_path: Path, worked: Counter[str]) -> None:
    found = compared(tmp_path, recoveries={"better": BETTER, "longer": LONGER})
    assert worked == {"decided": 2, "recovered": 2 * 2 + 1}  # the search alone chooses, once for both
    by_name = {s.name: s for s in summaries(found)}
    assert set(by_name) == {"better", "longer", "random subsets"}
    assert by_name["better"].recovered.mean < by_name["better"].calibration.mean
    assert by_name["longer"].recovery_seconds.mean > 0
    worked.clear()
    for name, how in {"better": BETTER, "longer": LONGER}.items():
        alone = compared(tmp_path, how, candidates={name: FIRST})
        assert {s.name: s.recovered for s in summaries(alone)}[name] == by_name[name].recovered
    assert worked == {"recovered": 2}  # the random subset, by each


def test_every_choice_meets_every_recovery(tmp_path: Path) -> None:
    found = compared(tmp_path, candidates=FIRST_AND_LAST, recoveries={"as it is": RECOVER, "better": BETTER})
    names = ["first + as it is", "first + better", "last + as it is", "last + better"]
    assert sorted({e.method for e in found.entries}) == names
    assert {(e.method, e.recovery) for e in found.entries} == {(n, n.partition(" + ")[2]) for n in names}
    assert ComparisonResults.load(tmp_path / "findings.json") == found
    with (tiny.write_comparison(tmp_path).parent / "trials.csv").open() as file:
        assert [line["recovery"] for line in csv.DictReader(file)] == [e.recovery for e in found.entries] + [""]


def test_what_is_said_of_them(tmp_path: Path) -> None:
    found = compared(tmp_path, recoveries={"as it is": RECOVER, "better": BETTER, "longer": LONGER})
    assert comparison_title(found) == "8 → 4 blocks: 3 ways to choose and recover beside 1 random subset"
    (table,) = tables(found)
    assert table.title == "8 → 4 blocks, 12 to 24 recovery steps, 2 seeds"
    assert table.columns[-1] == "recovery seconds" and all(float(row[-1]) > 0 for row in table.rows[:3])
    assert "recovery steps: 12, but 24 of longer" in table.notes
    assert any("random subsets have the recipe's recovery" in note for note in table.notes)
    verdict = comparison_verdict(found)
    best, second, *_ = summaries(found)
    assert verdict["Best"].startswith(f"{best.name}: held-out loss {best.recovered.text()} after")
    assert f"{second.name} is next" in verdict["How clearly"]  # though it keeps the same blocks
    tiny.write_comparison(tmp_path)
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["choices.svg"]  # the others show nothing


@dataclass(frozen=True)
class Warm(walks.Walk):
    """Walks with an option that only matters to how they are made."""

    warmth: float = 1.0

    def sampling_options(self) -> frozenset[str]:
        return frozenset({"warmth"})


def test_options_of_sampling_decide_what_is_recovered_on_policy_alone(tmp_path: Path, worked: Counter[str]) -> None:
    own = replace(RECOVER, steps=2, kd=tiny.OutputKD(on_policy=1.0))
    compare = tiny.Compare(seeds=1, random=0, recoveries={"own": own, "plain": replace(RECOVER, steps=2)})
    for warmth, recovered in ((1.0, 2), (1.0, 0), (0.5, 1)):
        worked.clear()
        task = replace(walks.task(), loss=Warm(warmth=warmth))
        compare(task, RECOVER, TRAINER, tmp_path, search=FIRST, evaluate=LOSS)
        assert worked["recovered"] == recovered


@pytest.fixture
def comparing(recipe: Path) -> Path:
    recoveries = {"shorter": {"steps": 1}, "refitted": {"start": "Refit", "kd": "MaskedKD"}}
    search = {"class_path": "FirstN", "init_args": {"keep": 4}}
    compare = {"seeds": 1, "random": 0, "recoveries": recoveries}
    recover = {"steps": 2, "lr": 3e-3}
    recipe.write_text(yaml.safe_dump({**RECIPE, "search": search, "recover": recover, "compare": compare}))
    return recipe


@pytest.mark.slow
def test_a_recipe_says_what_differs(comparing: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recoveries = tiny.load_recipe(comparing).compare.recoveries
    assert {name: (how.steps, how.lr) for name, how in recoveries.items()} == {
        "shorter": (1, 3e-3),
        "refitted": (2, 3e-3),
    }
    assert main(["validate", str(comparing)]) == 0
    out = capsys.readouterr().out
    assert "compare, shorter: recover" in out and "Refit to 128 samples, then 2 steps" in out
    assert main(["compare", str(comparing), "--run-dir", str(tmp_path / "run")]) == 0
    assert "8 → 4 blocks, 1 to 2 recovery steps, 1 seed" in capsys.readouterr().out
    assert tiny.load_recipe(tmp_path / "run" / "recipe.yaml").compare.recoveries == recoveries


WRONG = {
    "none": ("={}", r"compare\.recoveries is \[\]; expected one or more"),
    "no mapping": ("=[]", r"compare\.recoveries is \[\]; expected a mapping of names to Recover"),
    "a reference": (".random subsets={}", r"compare\.recoveries is .*; expected one or more, none 'random subsets'"),
    "a number as a name": ("={1: {}}", r"compare\.recoveries: the name 1 is no text; put it in quotes"),
    "a refused value": (".shorter.steps=-1", r"compare\.recoveries\.shorter: steps \(of recover or train\) is -1"),
    "all": ("={a: null}", r"(?s)\A(?!.*is \[\]).*recoveries\.a: null is not allowed"),
    "two": ("={a: {steps: 0}, b: {lr: -1}}", r"(?s)\A(?!.*is \[\]).*recoveries\.a: steps .* is 0.*\.b: lr .* is -1"),
    "the same twice": ("={a: {steps: 1}, a: {steps: 2}}", r"the key 'a' is there twice"),
    "weights of a search": (
        ".shorter.start=Inherit",
        r"recoveries\.shorter: .*a comparison keeps nothing of what searches",
    ),
    "null": (".shorter=null", r"compare\.recoveries\.shorter: null is not allowed"),
    "a number": (".shorter=3", r"compare\.recoveries\.shorter: got 3; expected a mapping with keys among kd"),
    "a wrong value": (".shorter.steps=x", r"compare\.recoveries\.shorter\.steps is 'x'; expected a whole number"),
    "a wrong class": (".shorter.kd=Masked", r"compare\.recoveries\.shorter\.kd: unknown class 'Masked'; did you mean"),
    "depths": (".shorter.depths=[2]", r"compare\.recoveries\.shorter: depths is \[2\]; expected \[\]"),
    "no cache": (
        ".shorter.kd={class_path: OutputKD, init_args: {cache: {folder: nowhere}}}",
        r"compare\.recoveries\.shorter: .*nowhere",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_is_said_before_anything_is_spent(
    case: str, comparing: Path, tmp_path: Path, worked: Counter[str], capsys: pytest.CaptureFixture[str]
) -> None:
    change, message = WRONG[case]
    command = ["compare", str(comparing), "--run-dir", str(tmp_path / "run"), f"--compare.recoveries{change}"]
    assert main(command) == 2
    assert not worked
    assert re.search(message, capsys.readouterr().err)


def test_pairs_of_one_name_are_refused(tmp_path: Path) -> None:
    candidates = {"t": FIRST, "t + r": FIRST_AND_LAST["last"]}
    with pytest.raises(UserError, match="two pairs of a candidate and a recovery have the same name; leave '.' out"):
        compared(tmp_path, candidates=candidates, recoveries={"r + r": RECOVER, "r": BETTER})


@pytest.mark.slow
def test_the_caches_of_all_are_written(comparing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cached = "{{class_path: OutputKD, init_args: {{cache: {{folder: {}}}}}}}"
    flags = ["--recover.kd", cached.format("one"), "--compare.recoveries.shorter.kd", cached.format("two")]
    flags += ["--compare.recoveries.refitted.kd", "null"]
    assert main(["cache-teacher", str(comparing), *flags]) == 0
    assert main(["compare", str(comparing), "--run-dir", "run", *flags]) == 0


def test_depths_of_the_recipes_own_recovery_are_refused_too(comparing: Path) -> None:
    recipe = tiny.load_recipe(comparing, ["--compare.recoveries", "null", "--recover.depths", "[2]"])
    with pytest.raises(UserError, match=r"compare: depths is \[2\]"):
        compare_recipe(recipe, "compare", "nowhere")
