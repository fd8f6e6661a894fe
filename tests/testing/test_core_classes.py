"""Every selector, sampler, weight update, distillation loss and start of the core passes the conformance kit."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

import tinyfusion_core as tiny
from tinyfusion_core.samplers.constraints import Rules
from tinyfusion_core.samplers.grouped import BlockSampler
from tinyfusion_core.samplers.subset import GumbelTopK
from tinyfusion_core.selection.given import Nested
from tinyfusion_core.selection.search import Selector
from tinyfusion_core.testing import parametrize_with_checks, run_check
from tinyfusion_core.testing.checks import KINDS
from tinyfusion_core.testing.checks.distillation import check_matched_blocks
from tinyfusion_core.testing.small_network import LISTS, small_task, small_trainer

SEARCH = tiny.Search(keep=5, steps=3)
CRITERIA = [
    *(tiny.Uniform, tiny.FirstN, tiny.LastN, tiny.BKSDM, tiny.Random, tiny.LeaveOneOut, tiny.Greedy, tiny.Taylor),
    *(tiny.BlockInfluence, tiny.InputOutputMSE, tiny.SpanSimilarity),
]
SAMPLERS = [
    *(tiny.GroupedSampler, tiny.ExactK, tiny.ScoreFunction, GumbelTopK),
    tiny.GroupedSampler(LISTS, {"first": [1, 2], "second": [3, 4]}, estimator="reinmax"),
    tiny.ExactK(LISTS, Rules(keep={"first": 3, "second": 1}, max_run=2)),
    tiny.ScoreFunction(LISTS, Rules(costs=(1, 2, 3, 4, 4, 3, 2, 1), budget=10, together=((0, 7),))),
    tiny.ScoreFunction(LISTS, Rules(keep=4), control=True),
]
UPDATES = [tiny.Frozen, tiny.LoRA, tiny.Full, tiny.LastBlocks(blocks=2), tiny.Matching(".*weight")]
DISTILLATIONS = [tiny.OutputKD, tiny.MaskedKD, tiny.MaskedKD(sigma=1.0, mask="separate", taps=[(0, 1)])]
DISTILLATIONS += [tiny.OutputKD(alpha_kd=(0.9, 0.0)), tiny.RelationalKD, tiny.AttentionKD(beta=(0.1, 0.1))]
STARTS = [tiny.Refit, tiny.Refit(samples=5, batch_size=2, ridge=1.0), tiny.Fuse(rank=2, steps=3, lr=1e-2)]
SEARCHES = [
    *(tiny.Search(pattern=[2, 4], steps=3), tiny.Search(keep=5, steps=3, start=tiny.Uniform(keep=5))),
    tiny.Finals(search=SEARCH, masks=2, steps=1, samples=8),
    tiny.CoTrained(keep=5, steps=3, samples=8),
    tiny.Shallowest(loss=1e9, steps=48, samples=8),
]
RACE = tiny.Race(keep=2, steps=8, samples=8, rounds=1, proposers=[tiny.FirstN(keep=2), tiny.LastN(keep=2)])


@parametrize_with_checks([*CRITERIA, tiny.Keep([0, 2, 5]), SEARCH, RACE, *SAMPLERS, *UPDATES, *DISTILLATIONS, *STARTS])
def test_core(check) -> None:
    check()


@pytest.mark.slow
@parametrize_with_checks(SEARCHES)
def test_other_searches(check) -> None:
    check()


@pytest.mark.parametrize("check", KINDS["selector"].checks)
def test_a_decision_that_a_search_has_nested(check, tmp_path: Path) -> None:
    tiny.Search(keep=5, steps=3)(small_task(), small_trainer()).save(tmp_path / "decision.json")
    run_check(check, Nested(keep=5, decision=str(tmp_path / "decision.json")))


def test_attention_maps_have_taps() -> None:
    """Its student learns on a network with attention, which that of the checks has not."""
    run_check(check_matched_blocks, tiny.AttentionMapKD)


def test_every_class_of_the_core_is_checked() -> None:
    checked = {
        type(thing) if not inspect.isclass(thing) else thing
        for thing in [
            *CRITERIA,
            *SAMPLERS,
            *UPDATES,
            *DISTILLATIONS,
            tiny.AttentionMapKD,
            *STARTS,
            tiny.Inherit,  # not by the kit: it begins with what a search has left
            tiny.Keep([0]),
            SEARCH,
            tiny.Finals,
            tiny.Race,
            tiny.CoTrained,
            tiny.Shallowest,
            Nested,
        ]
    }
    bases = (Selector, BlockSampler, tiny.WeightUpdate, tiny.OutputKD, tiny.Start)
    assert {cls for base in bases for cls in _concrete(base)} <= checked


def _concrete(base: type) -> set[type]:
    own = set() if inspect.isabstract(base) or not base.__module__.startswith("tinyfusion_core") else {base}
    return own.union(*(_concrete(cls) for cls in base.__subclasses__()))
