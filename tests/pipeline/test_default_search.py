"""What a search means that names no class, and what it takes from the recovery beside it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

import tinyfusion_core as tiny
from small_run import run
from tinyfusion_core.pipeline.planning.plan import make_plan
from tinyfusion_core.pipeline.recipe import flatten
from tinyfusion_core.reporting.report import write_report


@pytest.mark.parametrize(
    ("search", "kind"),
    [
        ("{keep: 4}", tiny.Race),
        ("{budget: 0.5x, steps: 60}", tiny.Race),
        ("{keep: 4, constraints: {max_run: 2}}", tiny.Race),
        ("{pattern: [2, 4]}", tiny.Search),
        ("{pattern: [2, 4], protect: [0]}", tiny.Search),
        ("{sampler: {class_path: ExactK, init_args: {rules: {keep: 4}}}, steps: 9}", tiny.Search),
        ("{loss: 1.05x}", tiny.Shallowest),
        ("{metric: Frechet, within: 2x}", tiny.Shallowest),
        ("{class_path: Search, init_args: {keep: 4}}", tiny.Search),
    ],
)
def test_which_selector_it_is(recipe: Path, search: str, kind: type[tiny.Selector]) -> None:
    assert type(tiny.load_recipe(recipe, [f"--search={search}"]).search) is kind


def test_candidates_and_rounds_mean_the_same(recipe: Path) -> None:
    read = tiny.load_recipe(recipe, ["--compare.candidates={race: {keep: 4}, groups: {pattern: [2, 4]}}"])
    assert {name: type(c).__name__ for name, c in read.compare.candidates.items()} == {
        "race": "Race",
        "groups": "Search",
    }
    sections = {k: v for k, v in yaml.safe_load(recipe.read_text()).items() if k not in ("search", "recover")}
    recipe.write_text(yaml.safe_dump({**sections, "rounds": {"d4": {"search": {"keep": 4}}}}))
    assert isinstance(tiny.load_recipe(recipe).rounds["d4"].search, tiny.Race)


def test_a_race_recovers_at_the_rate_of_its_recipe(recipe: Path, tmp_path: Path) -> None:
    def rate(*flags: str) -> float | None:
        search = tiny.load_recipe(recipe, ["--search={keep: 4}", *flags]).search
        assert isinstance(search, tiny.Race)
        return search.lr

    assert rate("--recover.lr=3e-3") == 3e-3
    assert rate() == tiny.Recover.lr
    assert rate("--recover.lr=3e-3", "--search.lr=2e-3") == 2e-3
    assert rate("--recover=null") is None
    candidates = "--compare.candidates={race: {keep: 4}, slow: {class_path: Race, init_args: {keep: 4, lr: 1e-6}}}"
    read = tiny.load_recipe(recipe, ["--search={loss: 1.05x}", "--recover={steps: 700, lr: 3e-3}", candidates])
    assert (read.search.lr, read.search.recover_steps) == (3e-3, 700)
    assert [c.lr for c in read.compare.candidates.values()] == [3e-3, 1e-6]
    read.save(tmp_path / "resolved")  # with the rate, so that it can be told what a run was
    assert flatten(tiny.load_recipe(tmp_path / "resolved" / "recipe.yaml").settings) == flatten(read.settings)


def test_a_key_of_another_selector_is_told_as_such(recipe: Path) -> None:
    with pytest.raises(tiny.UserError) as error:
        tiny.load_recipe(recipe, ["--search={keep: 4, lr_gates: 0.1, draws: 3, kepe: 1}"])
    told = str(error.value).replace(f"{recipe}: ", "").splitlines()
    assert told[0].startswith("search.lr_gates: a key of Search, and this is a Race; say which you mean as class_path")
    assert told[1].startswith("search.draws: a key of Random, and this is a Race")
    assert told[2].startswith("search.kepe: unknown key; did you mean 'keep'?")


def test_the_plan_says_what_choosing_costs(recipe: Path) -> None:
    plan = make_plan(tiny.load_recipe(recipe, ["--search={keep: 4, steps: 100}", "--recover.steps=50"]))
    assert not plan.problems
    # A search of 50 steps of 8 samples under 4 masks each, and 100 steps of 8; the recovery has 50 steps of 8.
    assert dict(plan.rows)["choosing"] == "2,400 rows through the pruned network; the recovery 400"
    plan = make_plan(tiny.load_recipe(recipe, ["--search={loss: 1.05x}"]))
    assert dict(plan.rows)["keeps"].startswith("as few of 8 blocks as it finds to be enough; planned for 7")


@pytest.mark.slow
def test_a_run_prunes_to_a_quality_and_draws_it(recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    how = "--search={loss: 9x, steps: 72, samples: 8, batch_size: 4}"
    assert run(recipe, folder, how, "--recover={steps: 4, ema: 0}") == 0
    decision = tiny.Decision.load(folder / "decision.json")
    assert len(decision.kept) == 1
    assert (folder / "figures" / "quality.svg").exists()
    page = write_report(tiny.RunFolder(folder)).read_text()
    assert "Depth against quality" in page and "The fewest blocks within the loss: 1" in page
