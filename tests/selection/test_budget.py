"""Budgets of costs, `0.5x` and `{latency_ms: 20}`: read, measured, obeyed by every selector, kept in the run folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

import tinyfusion_core as tiny
from marks import slow_but
from planted_search import TRAINER
from small_run import RECIPE, run
from tinyfusion_core.cli import main
from tinyfusion_core.comparison.results import ComparisonResults
from tinyfusion_core.comparison.study import Compare
from tinyfusion_core.errors import UserError
from tinyfusion_core.samplers.constraints import Rules
from tinyfusion_core.samplers.demands import Spending
from tinyfusion_core.selection.base import Selector, prepared
from tinyfusion_core.selection.budget import FILE, CostBudget, measure, parse_budget
from tinyfusion_core.selection.costs import NetworkCosts, network_costs

WIDTHS = (8, 8, 16, 16, 32, 32)
"""Of the hidden layers; a block has 2 x 8 x width parameters and takes twice as many operations."""
BLOCKS = tuple(2 * 8 * width for width in WIDTHS)
OUTSIDE = 8 * 8 + 8 * 4


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, width, bias=False), nn.Tanh(), nn.Linear(width, 8, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Uneven(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(8, 8, bias=False), nn.Linear(8, 4, bias=False)
        self.blocks = nn.ModuleList(Residual(width) for width in WIDTHS)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.fixture
def task() -> tiny.Task:
    torch.manual_seed(0)
    data = {"x": torch.randn(64, 8), "y": torch.randn(64, 4)}
    loss = lambda model, batch: (model(batch["x"]) - batch["y"]).square().mean(1)  # noqa: E731
    return tiny.wrap(Uneven(), blocks="blocks.*", loss_fn=loss, data=data)


def test_what_lies_outside_of_the_blocks_counts(task: tiny.Task) -> None:
    assert network_costs("parameters", task, TRAINER) == NetworkCosts(BLOCKS, OUTSIDE)
    assert network_costs("flops", task, TRAINER) == NetworkCosts(tuple(2 * cost for cost in BLOCKS), 2 * OUTSIDE)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("0.5x", CostBudget("parameters", 0.5, relative=True)),
        ({"parameters": "400M"}, CostBudget("parameters", 4e8, relative=False)),
        ({"parameters": 4e8}, CostBudget("parameters", 4e8, relative=False)),
        ({"flops": "0.25x"}, CostBudget("flops", 0.25, relative=True)),
        ({"flops": "1.5T"}, CostBudget("flops", 1.5e12, relative=False)),
        ({"latency_ms": 20}, CostBudget("latency_ms", 20.0, relative=False)),
        ({"latency_ms": "0.5x", "batch_size": 8}, CostBudget("latency_ms", 0.5, relative=True, batch_size=8)),
    ],
)
def test_a_budget_is_read_and_written(said: Any, expected: CostBudget) -> None:
    assert parse_budget(said, "search") == expected
    assert parse_budget(yaml.safe_load(str(expected)), "search") == expected


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (0.5, r"^budget is 0\.5; give 0\.5x, \{parameters: 400M\}"),
        ("half", r"^budget\.parameters is 'half'; expected a number above 0"),
        ("1.5x", r"^budget\.parameters is '1\.5x'; expected .* a share below 1x"),
        ({"parameters": -3}, r"^budget\.parameters is -3"),
        ({"latency": 20}, r"^budget\.latency: unknown key; did you mean 'latency_ms'"),
        ({"flops": "0.5x", "parameters": "0.5x"}, r"^budget is .*; give one of"),
        ({"flops": "0.5x", "batch_size": 8}, "batch_size goes with latency_ms"),
        ({"latency_ms": 20, "batch_size": 0}, r"^budget\.batch_size is 0; expected a whole number from 1 to"),
        ({}, r"^budget is \{\}; give one of"),
    ],
)
def test_what_is_no_budget_is_refused_with_its_key(said: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny.Search(budget=said)
    with pytest.raises(UserError, match=message.replace("^budget", r"^Greedy\.budget")):
        tiny.Greedy(budget=said)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("0.05x", r"94\.4 parameters are too few: 96 lie outside .* it is 224; give \{parameters: 0\.119x\}"),
        ({"parameters": 200}, r"200 parameters are too few: .* give \{parameters: 224\}"),
        ({"parameters": "2K"}, r"2K parameters pay for the whole network, which has 1\.888K"),
        ({"flops": 400}, r"400 FLOPs of a sample are too few"),
    ],
)
def test_a_budget_that_fits_no_mask_or_every_mask_names_the_nearest(task: tiny.Task, said: Any, message: str) -> None:
    with pytest.raises(UserError, match=rf"Uniform\.budget: {message}"):
        tiny.Uniform(budget=said)(task, TRAINER)


def test_a_budget_counts_protected_blocks(task: tiny.Task) -> None:
    decision = tiny.Uniform(budget={"parameters": 1000}, protect=[5])(task, TRAINER)
    assert 5 in decision.kept and OUTSIDE + sum(BLOCKS[i] for i in decision.kept) <= 1000
    with pytest.raises(UserError, match=r"with those that must stay it is 1\.12K; give \{parameters: 1\.12K\}"):
        tiny.Uniform(budget={"parameters": 1000}, protect=[4, 5])(task, TRAINER)


SELECTORS: Mapping[str, Callable[..., Selector]] = {
    "Uniform": tiny.Uniform,
    "Random": tiny.Random,
    "Taylor": tiny.Taylor,
    "Greedy": tiny.Greedy,
    "Search": lambda **how: tiny.Search(steps=4, update=tiny.Frozen(), **how),
    "Finals": lambda **how: tiny.Finals(
        search=tiny.Search(steps=4, **how), others=[tiny.Taylor(**how)], masks=2, steps=2
    ),
    "Race": lambda **how: tiny.Race(steps=40, samples=16, **how),
}


@pytest.mark.parametrize("name", SELECTORS)
@pytest.mark.parametrize("said", slow_but(["0.5x", {"flops": "0.5x"}, {"latency_ms": "0.9x"}], "0.5x"))
def test_every_selector_keeps_to_a_budget(name: str, said: Any, task: tiny.Task) -> None:
    decision = SELECTORS[name](budget=said)(task, TRAINER)
    (found,) = decision.provenance["costs"].values()
    kept = found["outside"] + sum(found["blocks"][i] for i in decision.kept)
    total = found["outside"] + sum(found["blocks"])
    share = 0.9 if isinstance(said, dict) and "latency_ms" in said else 0.5
    assert 0 < kept <= share * total
    # A block that still fits would not have been left out.
    cheapest = min(cost for i, cost in enumerate(found["blocks"]) if i not in decision.kept)
    assert kept + cheapest > share * total
    (sentence,) = decision.provenance["budget"]
    assert f"({share:g}x)" in sentence and "lie outside of the blocks" in sentence


def test_masks_within_a_budget_are_all_alike_to_the_random_criterion(task: tiny.Task) -> None:
    how, _ = prepared(tiny.Random(budget="0.5x", draws=1), task, TRAINER, None)
    allowed = how.compiled(task.blocks)
    drawn = allowed.distinct(allowed.num_masks, torch.Generator().manual_seed(0))
    assert len(drawn) == len({tuple(kept) for kept in drawn}) == allowed.num_masks
    room = (sum(BLOCKS) + OUTSIDE) // 2 - OUTSIDE
    fitting = [
        mask
        for mask in range(2 ** len(BLOCKS))
        if (cost := sum(c for i, c in enumerate(BLOCKS) if mask >> i & 1)) <= room
        and all(cost + c > room for i, c in enumerate(BLOCKS) if not mask >> i & 1)
    ]
    assert allowed.num_masks == len(fitting)


def test_an_unbound_budget_does_not_guess() -> None:
    for selector in (tiny.Search(budget="0.5x"), tiny.Greedy(budget="0.5x")):
        with pytest.raises(UserError, match=r"budget: depends on what the network costs"):
            selector.preview([f"blocks.{i}" for i in range(6)])


def test_many_unlike_blocks_are_rounded_to_the_safe_side() -> None:
    costs = NetworkCosts(tuple(10**9 + 7919 * i * i for i in range(40)), 10**8)
    budget = CostBudget("parameters", 0.5, relative=True)
    rules = budget.rules(costs, Rules(), "search")
    assert rules.costs is not None and rules.budget is not None and max(rules.costs) <= 100
    cheapest_first = sorted(range(40), key=lambda i: costs.blocks[i])
    most = max(n for n in range(41) if sum(rules.costs[i] for i in cheapest_first[:n]) <= rules.budget)
    assert costs.outside + sum(costs.blocks[i] for i in cheapest_first[:most]) <= 0.5 * costs.total


def test_what_was_measured_is_kept_and_measured_again_for_another_network(task: tiny.Task, tmp_path: Path) -> None:
    budget = parse_budget({"latency_ms": "0.9x"}, "search")
    first = tiny.Uniform(budget={"latency_ms": "0.9x"})(task, TRAINER, tiny.RunFolder(tmp_path))
    kept = json.loads((tmp_path / FILE).read_text())
    assert measure([budget], task, TRAINER, tmp_path) == measure([budget], task, TRAINER, tmp_path)
    again = tiny.Uniform(budget={"latency_ms": "0.9x"})(task, TRAINER, tiny.RunFolder(tmp_path))
    assert again.provenance["costs"] == first.provenance["costs"]
    assert json.loads(json.dumps(first.provenance["costs"])) == kept["costs"]
    (tmp_path / FILE).write_text(json.dumps({**kept, "network": "another"}))
    assert asdict(measure([budget], task, TRAINER, tmp_path)[budget.name]) != kept["costs"][budget.name]


@pytest.mark.slow
def test_a_recipe_with_a_budget_runs_plans_and_goes_on(recipe: Path, tmp_path: Path, capsys) -> None:
    flags = ["--search.pattern=null", "--search.lr_gates=null", "--search.budget={flops: 0.8x}"]
    assert main(["validate", str(recipe), *flags]) == 0
    out = capsys.readouterr().out
    assert "(0.8x)" in out and "as many of 8 blocks as the budget pays for" in out
    folder = tmp_path / "run"
    assert run(recipe, folder, *flags) == 0
    measured = json.loads((folder / FILE).read_text())
    # As after a kill between measuring and deciding: what was measured decides, and is not measured again.
    stopped = tmp_path / "stopped"
    stopped.mkdir()
    for name in ("run.json", "recipe.yaml"):
        shutil.copy(folder / name, stopped)
    other = json.loads(json.dumps(measured))
    other["costs"]["flops"]["outside"] += 1
    (stopped / FILE).write_text(json.dumps(other))
    assert run(recipe, stopped, *flags) == 0
    decision = json.loads((stopped / "decision.json").read_text())
    assert decision["provenance"]["costs"] == json.loads((stopped / FILE).read_text())["costs"] == other["costs"]
    assert run(recipe, stopped, "--restart-from=search", *flags) == 0
    assert json.loads((stopped / FILE).read_text()) == measured, "a search from its beginning measures"


@pytest.mark.slow
def test_candidates_with_a_budget_are_compared(recipe: Path, tmp_path: Path, capsys) -> None:
    candidates = {
        "learned": {"class_path": "Search", "init_args": {"budget": "0.5x", "steps": 2}},
        "taylor": {"class_path": "Taylor", "init_args": {"budget": "0.5x"}},
    }
    content = {
        **RECIPE,
        "search": {"pattern": [4, 8], "steps": 3},
        "recover": {"steps": 2},
        "compare": {"candidates": candidates, "seeds": 1, "random": 3},
    }
    recipe.write_text(yaml.safe_dump(content))
    folder = tmp_path / "compare"
    assert main(["compare", str(recipe), "--run-dir", str(folder)]) == 0
    assert "parameters (0.5x)" in capsys.readouterr().out
    results = ComparisonResults.load(folder / "findings.json")
    assert isinstance(results.budget, str) and "lie outside of the blocks" in results.budget
    found = json.loads((folder / FILE).read_text())["costs"]["parameters"]
    for entry in results.entries:
        kept = found["outside"] + sum(found["blocks"][i] for i in entry.kept)
        assert kept <= 0.5 * (found["outside"] + sum(found["blocks"]))
    assert main(["compare", str(recipe), "--run-dir", str(folder)]) == 0  # goes on: nothing is left to do


def test_every_criterion_is_compared_with_a_search_of_a_budget(task: tiny.Task) -> None:
    comparison = Compare()
    search = tiny.Search(budget="0.5x", steps=2)
    costs = measure(comparison.cost_budgets(search), task, TRAINER)
    found = comparison.candidates_for(search, task.blocks, costs)
    assert isinstance(found.budget, Spending) and {"search", "Greedy", "Taylor", "Uniform"} <= set(found.selectors)
    both = replace(comparison, candidates={"a": search, "b": tiny.Greedy(budget={"flops": "0.4x"})})
    costs = measure(both.cost_budgets(None), task, TRAINER)
    with pytest.raises(UserError, match="not the same budget"):
        both.candidates_for(None, task.blocks, costs)
