"""Constraints against enumeration: numbers, patterns, costs and rules are obeyed exactly, whatever the scores."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tinyfusion_core.errors import UserError
from tinyfusion_core.samplers.compiled import Constraints, compile_constraints
from tinyfusion_core.samplers.constraints import Rules

BLOCKS = [*(f"first.{i}" for i in range(4)), *(f"second.{i}" for i in range(2))]


SUBSETS = [kept for n in range(7) for kept in itertools.combinations(range(6), n)]
PAIRS = st.sampled_from([(0, 2), (1, 2), (2, 2)])


def obeys(kept: tuple[int, ...], budget: dict[str, Any], rules: Rules) -> bool:
    """The settings as a reader understands them; whether costs use the budget is not asked here."""
    first, second = [i in kept for i in range(4)], [i in kept for i in range(4, 6)]
    groups = [first[:2], first[2:], second]
    keep, pattern = budget.get("keep"), budget.get("pattern")
    numbers = {
        int: keep == len(kept),
        dict: keep == {"first": sum(first), "second": sum(second)},
        type(None): pattern is None
        or [sum(g) for g in groups] == [n for n, _ in (*pattern["first"], pattern["second"])],
    }
    runs = [[len(list(run)) for stays, run in itertools.groupby(part) if not stays] for part in (first, second)]
    return (
        numbers[type(keep)]
        and (rules.costs is None or 0 < cost(kept, rules) <= rules.budget)
        and set(rules.protect) <= set(kept)
        and set(rules.remove).isdisjoint(kept)
        and all(len({i in kept for i in group}) == 1 for group in rules.together)
        and all(rules.max_run is None or length <= rules.max_run for part in runs for length in part)
        and not (rules.contiguous and any(len(part) > 1 for part in runs))
        and all(kind(i, rules) == kind(position, rules) for position, i in enumerate(kept))
    )


def kind(position: int, rules: Rules) -> str:
    return rules.period[position % len(rules.period)] if rules.period else ""


def cost(kept: tuple[int, ...], rules: Rules) -> int:
    return sum(rules.costs[i] for i in kept)


def allowed(budget: dict[str, Any], rules: Rules) -> list[tuple[int, ...]]:
    """All masks that obey, by trying every subset; with costs those that use the budget as far as they can."""
    found = [kept for kept in SUBSETS if obeys(kept, budget, rules)]
    if rules.costs is None or not found:
        return found
    units = {tuple(next((group for group in rules.together if i in group), [i])) for i in range(6)}
    free = [unit for unit in units if not {*rules.protect, *rules.remove} & set(unit)]
    cheapest = min([c for unit in free if (c := cost(unit, rules))], default=1)
    least = max(cost(kept, rules) for kept in found) - cheapest
    return [kept for kept in found if cost(kept, rules) > least]


@dataclass(frozen=True)
class Case:
    """Constraints, and all the masks that obey them."""

    constraints: Constraints
    masks: list[tuple[int, ...]]


@st.composite
def cases(draw: st.DrawFn, ruled: bool = True) -> Case:
    """A number, a number for every list, a pattern or costs; with `ruled` further rules too."""
    by_list = st.fixed_dictionaries({"first": st.integers(0, 4), "second": st.integers(0, 2)})
    pattern = st.fixed_dictionaries({"first": st.lists(PAIRS, min_size=2, max_size=2), "second": PAIRS})
    way = draw(st.sampled_from(["keep", "list", "pattern", *["costs"] * ruled]))
    budget, said = {}, {}
    if way == "costs":
        said["costs"] = draw(st.lists(st.integers(0, 4), min_size=6, max_size=6))
        said["budget"] = draw(st.integers(4, 16))
    else:
        by = {"keep": st.integers(1, 6), "list": by_list, "pattern": pattern}[way]
        budget["pattern" if way == "pattern" else "keep"] = draw(by)
    protect = draw(st.sets(st.integers(0, 5), max_size=2))
    if ruled:
        said["remove"] = sorted(draw(st.sets(st.integers(0, 5), max_size=1)))
        said["together"] = draw(st.sampled_from([[], [[0, 3]], [[1, 4], [2, 5]]]))
        said["max_run"] = draw(st.sampled_from([None, None, 1, 2]))
        said["contiguous"] = draw(st.booleans())
        said["period"] = None if way == "costs" else draw(st.sampled_from([None, [*"ab"], [*"aab"], [*"abac"]]))
    masks = allowed(budget, Rules(**said, protect=sorted(protect)))
    assume(masks and masks != [()])
    rules = Rules(**said) if ruled else None
    return Case(compile_constraints(BLOCKS, "Greedy", **budget, protect=sorted(protect), constraints=rules), masks)


SCORES = st.lists(st.integers(-3, 3) | st.just(math.inf), min_size=6, max_size=6)


@settings(max_examples=150)
@given(cases() | cases(ruled=False), SCORES)
def test_the_best_of_all_that_obey(case: Case, scores: list[float]) -> None:
    def value(kept: tuple[int, ...]) -> tuple[int, float]:
        chosen = [scores[i] for i in kept]
        return chosen.count(math.inf), sum(score for score in chosen if score != math.inf)

    assert case.constraints.num_masks == len(case.masks)
    best = [kept for kept in case.masks if value(kept) == max(map(value, case.masks))]

    def bits(kept: tuple[int, ...]) -> list[bool]:
        return [i in kept for i in range(6)]

    # Of equal sums the one that keeps the earlier blocks.
    assert case.constraints.best(scores) == max(best, key=bits)
    assert case.constraints.best(scores, late=True) == min(best, key=bits)


@settings(max_examples=100)
@given(cases() | cases(ruled=False))
def test_what_obeys_is_accepted(case: Case) -> None:
    assert [kept for kept in SUBSETS if case.constraints.accepts(kept)] == case.masks


@settings(max_examples=100)
@given(cases() | cases(ruled=False), st.randoms(use_true_random=False))
def test_removing_one_by_one_ends_at_a_mask_that_obeys(case: Case, random: Any) -> None:
    kept, masks = set(range(6)), list(map(set, case.masks))
    while candidates := case.constraints.removable(kept):
        units = {tuple(next((g for g in case.constraints.rules.together if i in g), [i])) for i in kept}
        assert candidates == sorted(unit for unit in units if any(mask <= kept - set(unit) for mask in masks))
        kept -= set(random.choice(candidates))
    assert kept in masks


@settings(max_examples=100)
@given(cases() | cases(ruled=False), st.randoms(use_true_random=False))
def test_an_exchange_leads_to_a_mask_that_obeys(case: Case, random: Any) -> None:
    kept = set(random.choice(case.masks))
    units = {tuple(next((g for g in case.constraints.rules.together if i in g), [i])) for i in range(6)}
    pairs = [(out, back) for out in units for back in units if {*out} <= kept and not {*back} & kept]
    obeying = [pair for pair in pairs if tuple(sorted(kept.difference(pair[0]).union(pair[1]))) in case.masks]
    assert case.constraints.exchanges(tuple(kept)) == sorted(obeying)


@settings(max_examples=60)
@given(cases() | cases(ruled=False), st.integers(1, 30))
def test_distinct_draws(case: Case, num: int) -> None:
    def draw(num: int) -> list[tuple[int, ...]]:
        return case.constraints.distinct(num, torch.Generator().manual_seed(0))

    drawn = draw(num)
    assert len(drawn) == len(set(drawn)) == min(num, len(case.masks))
    assert set(drawn) <= set(case.masks)
    assert drawn[:-1] == draw(num - 1) or num >= len(case.masks)
    assert sorted(draw(100)) == sorted(case.masks)


@pytest.mark.parametrize(
    ("budget", "rules"),
    [
        ({"keep": {"first": 2, "second": 1}}, Rules(protect=[1])),
        ({"keep": 3}, Rules(max_run=1)),
        ({"pattern": {"first": [(1, 2), (1, 2)], "second": (1, 2)}}, Rules(together=[[0, 2]])),
        ({}, Rules(costs=[3, 1, 2, 2, 4, 1], budget=7)),
    ],
)
def test_draws_are_uniform(budget: dict[str, Any], rules: Rules) -> None:
    constraints, masks = compile_constraints(BLOCKS, "Random", **budget, constraints=rules), allowed(budget, rules)
    source = torch.Generator().manual_seed(0)
    counts = dict.fromkeys(masks, 0)
    for _ in range(200 * len(masks)):
        counts[constraints.draw(source)] += 1
    assert len(counts) == constraints.num_masks == len(masks) > 3
    freedom = len(masks) - 1
    chi2 = sum((n - 200) ** 2 / 200 for n in counts.values())
    assert chi2 < freedom + 3.5 * (2 * freedom) ** 0.5 + 4


def test_the_draws_of_numbers_and_patterns_are_what_they_were() -> None:
    """Finished comparisons are keyed by them: block by block the stream of `torch.randperm`."""
    source, expected = (torch.Generator().manual_seed(7) for _ in range(2))
    constraints = compile_constraints(BLOCKS, "Random", keep={"first": 2, "second": 1}, protect=[1])
    for _ in range(5):
        first, second = (torch.randperm(n, generator=expected).tolist()[:1] for n in (3, 2))
        kept = {1, *([0, 2, 3][i] for i in first), *([4, 5][i] for i in second)}
        assert constraints.draw(source) == tuple(sorted(kept))


def test_groups_follow_lists_that_take_turns() -> None:
    blocks = ["a.0", "b.0", "a.1", "b.1"]
    constraints = compile_constraints(blocks, "Greedy", pattern=(1, 2))
    assert [choice.blocks for choice in constraints.choices] == [(0, 2), (1, 3)]
    assert constraints.best([0, 1, 2, 3]) == (2, 3)
    assert constraints.best([1, 2, 0, 3]) == (0, 3)
    assert math.prod(len(choice.blocks) for choice in constraints.choices) == constraints.num_masks
    in_turns = compile_constraints(blocks, "Greedy", keep=2, constraints=Rules(max_run=1))
    assert in_turns.distinct(9, torch.Generator()) == [(0, 1), (0, 3), (1, 2), (2, 3)]
    assert in_turns.accepts([1, 2]) and not in_turns.accepts([0, 2])
    # Of each list one block must stay: 0 and 1 for 6 or 1 and 2 for 3, and the budget is used as far as it can be.
    costs = Rules(costs=[5, 1, 2, 8], budget=6, max_run=1)
    assert compile_constraints(blocks, "Greedy", constraints=costs).distinct(9, torch.Generator()) == [(0, 1)]
    tied = Rules(protect=[1], together=[[2, 3]], max_run=1)
    assert compile_constraints(blocks, "Greedy", keep=3, constraints=tied).distinct(9, torch.Generator()) == [(1, 2, 3)]


def test_rounding_decides_nothing() -> None:
    constraints = compile_constraints([f"b.{i}" for i in range(4)], "Greedy", keep=2)
    assert constraints.best([1e30, 0.1, 0.1 + 1e-17, 0.2]) == (0, 3)
    assert constraints.best([1e30, 0.1, 0.10000000000000002, 0.1]) == (0, 2)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (Rules(max_run=-1), r"Greedy\.constraints\.max_run is -1; expected 0 or more blocks"),
        (Rules(together=[[0, 6]]), r"Greedy\.constraints\.together is .*; expected different indices from 0 to 5"),
        (Rules(remove=[0, 1, 2, 3]), r"Greedy\.constraints: no mask of 6 blocks obeys keep 3.*in the way: remove"),
    ],
)
def test_rules_that_do_not_fit(rules: Rules, message: str) -> None:
    with pytest.raises(UserError, match=message):
        compile_constraints(BLOCKS, "Greedy", keep=3, constraints=rules)


@pytest.mark.parametrize(
    ("keep", "pattern", "protect", "message"),
    [
        (0, None, [], r"Greedy\.keep is 0; expected 1 to 6 blocks"),
        (7, None, [], r"Greedy\.keep is 7; expected 1 to 6 blocks"),
        ({"first": 5, "second": 1}, None, [], r"Greedy\.keep\.first is 5; expected 0 to 4 blocks"),
        ({"frist": 2, "second": 1}, None, [], r"no block list 'frist'; did you mean 'first'\?"),
        ({"first": 2}, None, [], r"says nothing of the block list\(s\) second"),
        ({"first": 0, "second": 0}, None, [], r"Greedy\.keep: keeps no block at all"),
        (None, {"first": (0, 4), "second": (0, 2)}, [], r"Greedy\.pattern: keeps no block at all"),
        (None, (2, 3), [], r"^pattern: \[2, 3\] does not fit 'first' with 4 blocks"),
        (3, None, [6], r"Greedy\.protect is \[6\]; expected indices from 0 to 5"),
        (3, None, [-1], r"Greedy\.protect is \[-1\]"),
        (2, None, [0, 3, 5], r"the network keeps 2 of its 6 blocks, but 3 are protected \(0, 3, 5\)"),
        ({"first": 3, "second": 1}, None, [4, 5], r"list 'second' keeps 1 of its 2 blocks, but 2 are protected"),
        (None, (1, 2), [2, 3], r"group 2 \(blocks 2 to 3\) keeps 1 of its 2 blocks, but 2 are protected \(2, 3\)"),
    ],
)
def test_budgets_that_do_not_fit(keep: Any, pattern: Any, protect: list[int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        compile_constraints(BLOCKS, "Greedy", keep=keep, pattern=pattern, protect=protect)


def test_a_period_goes_with_a_number_and_leaves_what_repeats_it() -> None:
    blocks = [f"layers.{i}" for i in range(8)]
    made = compile_constraints(blocks, "Greedy", keep=4, constraints=Rules(period=[*"ssf"]))
    found = made.distinct(1000, torch.Generator().manual_seed(0))
    assert found == [kept for kept in itertools.combinations(range(8), 4) if ["ssf"[i % 3] for i in kept] == [*"ssfs"]]
    with pytest.raises(UserError, match=r"constraints.period: goes with a number of blocks or a pattern"):
        compile_constraints(blocks, "Greedy", constraints=Rules(period=[*"ssf"], costs=[1] * 8, budget=4))
    with pytest.raises(UserError, match=r"in the way: .*period \['s', 'f', .*35 masks would do"):
        compile_constraints(blocks, "Greedy", keep=4, constraints=Rules(period=[*"sfffffff"], remove=[0]))
