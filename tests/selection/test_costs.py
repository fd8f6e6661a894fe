"""What blocks cost, and budgets of it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

import tinyfusion_core as tiny
from planted_search import TRAINER, task
from tinyfusion_core.cli import main
from tinyfusion_core.comparison.study import Compare
from tinyfusion_core.samplers.constraints import Rules
from tinyfusion_core.samplers.demands import Spending
from tinyfusion_core.samplers.subset import GumbelTopK, ScoreFunction
from tinyfusion_core.selection.costs import NetworkCosts, network_costs


def test_costs_of_blocks() -> None:
    planted = task()
    assert network_costs("parameters", planted, TRAINER) == NetworkCosts((72,) * 8, 0)
    assert network_costs("flops", planted, TRAINER) == NetworkCosts((2 * 8 * 8,) * 8, 0)
    latency = network_costs("latency_ns", planted, TRAINER, batch_size=4)
    assert len(latency.blocks) == 8
    assert len(set(latency.blocks)) == 1, "what differs between blocks that are alike is noise"
    assert min(latency.blocks) > 0 and latency.outside >= 0


def test_blocks_without_an_operation_that_counts_have_costs_too() -> None:
    class Scale(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = torch.nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.factor * x

    class Stack(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(Scale() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    wrapped = tiny.wrap(
        Stack(),
        blocks="layers.*",
        loss_fn=lambda model, batch: model(batch["x"]).square().mean(1),
        data={"x": torch.randn(32, 4)},
    )
    assert network_costs("parameters", wrapped, TRAINER).blocks == (4,) * 3
    assert network_costs("flops", wrapped, TRAINER).blocks == (0,) * 3
    assert min(network_costs("latency_ns", wrapped, TRAINER, batch_size=4).blocks) > 0


@pytest.mark.slow
def test_rules_and_samplers_in_a_recipe(recipe, capsys) -> None:
    rules = "{costs: [2, 2, 2, 2, 2, 2, 2, 4], budget: 8, protect: [0], max_run: 3}"
    sampler = f"{{class_path: ScoreFunction, init_args: {{rules: {rules}, masks: 2}}}}"
    flags = ["--search.pattern=null", "--search.lr_gates=null", f"--search.sampler={sampler}", "--search.steps=6"]
    assert main(["validate", str(recipe), *flags]) == 0
    assert "any within the budget" in capsys.readouterr().out
    assert main(["run", str(recipe), "--run-dir", str(recipe.parent / "run"), *flags]) == 0
    kept = tiny.Decision.load(recipe.parent / "run" / "decision.json").kept
    assert 0 in kept
    assert sum(4 if i == 7 else 2 for i in kept) in (7, 8)
    sizes = "{input_size: 8, in_channels: 1, patch_size: 2, hidden_size: 16, num_heads: 2, depth: 8, checkpoint: no.pt}"
    absent = "{class_path: Latents, init_args: {folder: nowhere}}"  # neither weights nor data are needed
    missing = [f"--backbone={{class_path: DiT, init_args: {sizes}}}", f"--data={absent}"]
    assert main(["costs", str(recipe), *missing]) == 0
    printed = capsys.readouterr().out
    for said in ("{parameters: 0.5x}", "{flops: 0.5x}", "{latency_ms: 0.5x}"):
        assert f"search: {{budget: {said}}}" in printed
    assert "outside of the blocks" in printed
    others = "[{class_path: Uniform, init_args: {keep: 4}}, {class_path: FirstN, init_args: {keep: 4}}]"
    short = "{keep: 4, steps: 6}"
    final = f"{{class_path: Finals, init_args: {{search: {short}, masks: 2, steps: 2, others: {others}}}}}"
    assert main(["run", str(recipe), "--run-dir", str(recipe.parent / "final"), f"--search={final}"]) == 0
    impossible = sampler.replace("max_run: 3", "max_run: 0")
    assert main(["validate", str(recipe), *flags[:2], "--search.sampler", impossible]) == 2
    assert "no mask of 8 blocks obeys costs" in capsys.readouterr().err


def test_candidates_without_groups_are_compared_by_what_they_keep() -> None:
    blocks = [f"encoder_blocks.{i}" for i in range(6)] + [f"decoder_blocks.{i}" for i in range(6)]
    by_list = {"encoder_blocks": 2, "decoder_blocks": 4}
    assert tiny.Search(keep=6).keeps(blocks) == 6
    assert tiny.Finals(search=tiny.Search(keep=6)).keeps(blocks) == 6
    assert tiny.Search(keep=by_list).keeps(blocks) == by_list
    assert tiny.Search(sampler=partial(GumbelTopK, keep=6)).keeps(blocks) == 6
    costs = partial(ScoreFunction, rules=Rules(costs=[1] * 12, budget=5))
    found = Compare(candidates={"costs": tiny.Search(sampler=costs)}).candidates_for(None, blocks)
    assert found.budget == Spending((1,) * 12, 5)
    with pytest.raises(tiny.UserError, match="not the same budget: costs keeps what 5 of 12 in costs pays for; number"):
        both = {"costs": tiny.Search(sampler=costs), "number": tiny.Search(keep=5)}
        Compare(candidates=both).candidates_for(None, blocks)
