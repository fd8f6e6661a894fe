"""Budgets are obeyed exactly, whatever the scores."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tinyfusion_core.errors import UserError
from tinyfusion_core.samplers.budget import Quota, make_quota

BLOCKS = [*(f"first.{i}" for i in range(4)), *(f"second.{i}" for i in range(2))]


def possible(quota: Quota) -> list[tuple[int, ...]]:
    """All decisions that obey a quota, by trying every subset."""
    subsets = itertools.chain.from_iterable(itertools.combinations(range(6), n) for n in range(7))
    return [
        kept
        for kept in subsets
        if quota.protected <= set(kept) and all(len(set(kept) & set(c.blocks)) == c.num_kept for c in quota.choices)
    ]


@st.composite
def quotas(draw: st.DrawFn) -> Quota:
    """By total, by list or by group; protected blocks that fit."""
    by_list = st.fixed_dictionaries({"first": st.integers(0, 4), "second": st.integers(0, 2)})
    keep: Any = draw(st.none() | st.integers(1, 6) | by_list.filter(lambda keep: any(keep.values())))
    pairs = st.sampled_from([(0, 2), (1, 2), (2, 2)])
    pattern: Any = {"first": draw(st.lists(pairs, min_size=2, max_size=2)), "second": draw(pairs)}
    assume(keep or any(num for num, _ in [*pattern["first"], pattern["second"]]))
    loose = make_quota(BLOCKS, keep, None if keep else pattern, [], "Greedy")
    protect: set[int] = set()
    for choice in loose.choices:
        protect |= draw(st.sets(st.sampled_from(choice.blocks), max_size=choice.num_kept))
    return make_quota(BLOCKS, keep, None if keep else pattern, sorted(protect), "Greedy")


@settings(max_examples=60, deadline=None)
@given(quotas(), st.lists(st.integers(-3, 3), min_size=6, max_size=6))
def test_top_is_the_best_of_all_that_obey(quota: Quota, scores: list[int]) -> None:
    kept = quota.top(scores)
    candidates = possible(quota)
    assert quota.num_masks == len(candidates)
    best = max(sum(scores[i] for i in c) for c in candidates)
    # Equal scores keep the lower indices, choice by choice: of the best, the first in lexicographic order.
    assert kept == min(c for c in candidates if sum(scores[i] for i in c) == best)


@settings(max_examples=60, deadline=None)
@given(quotas(), st.randoms(use_true_random=False))
def test_removing_one_by_one_ends_at_the_budget(quota: Quota, random: Any) -> None:
    kept = set(range(6))
    while candidates := quota.removable(kept):
        kept.remove(random.choice(candidates))
    assert tuple(sorted(kept)) in possible(quota)


@settings(max_examples=30, deadline=None)
@given(quotas(), st.integers(0, 9))
def test_draws_obey(quota: Quota, seed: int) -> None:
    assert quota.draw(torch.Generator().manual_seed(seed)) in possible(quota)


@settings(max_examples=40, deadline=None)
@given(quotas(), st.integers(1, 30))
def test_distinct_draws(quota: Quota, num: int) -> None:
    def draw(num: int) -> list[tuple[int, ...]]:
        return quota.distinct(num, torch.Generator().manual_seed(0))

    drawn = draw(num)
    assert len(drawn) == len(set(drawn)) == min(num, quota.num_masks)
    assert set(drawn) <= set(possible(quota))
    assert drawn[:-1] == draw(num - 1) or num >= quota.num_masks
    assert sorted(draw(100)) == sorted(possible(quota))


def test_draws_are_uniform() -> None:
    quota = make_quota(BLOCKS, {"first": 2, "second": 1}, None, [1], "Greedy")
    source = torch.Generator().manual_seed(0)
    counts = dict.fromkeys(possible(quota), 0)
    for _ in range(1200):
        counts[quota.draw(source)] += 1
    assert len(counts) == quota.num_masks == 6
    chi2 = sum((n - 200) ** 2 / 200 for n in counts.values())
    assert chi2 < 20.5  # 5 degrees of freedom, p = 0.001


def test_groups_follow_lists_that_take_turns() -> None:
    blocks = ["a.0", "b.0", "a.1", "b.1"]
    quota = make_quota(blocks, None, (1, 2), [], "Greedy")
    assert [choice.blocks for choice in quota.choices] == [(0, 2), (1, 3)]
    assert quota.top([0, 1, 2, 3]) == (2, 3)
    assert math.prod(len(choice.blocks) for choice in quota.choices) == quota.num_masks


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
        (None, (2, 3), [], r"search\.pattern: \[2, 3\] does not fit 'first' with 4 blocks"),
        (3, None, [6], r"Greedy\.protect is \[6\]; expected indices from 0 to 5"),
        (3, None, [-1], r"Greedy\.protect is \[-1\]"),
        (2, None, [0, 3, 5], r"the network keeps 2 of its 6 blocks, but 3 are protected \(0, 3, 5\)"),
        ({"first": 3, "second": 1}, None, [4, 5], r"list 'second' keeps 1 of its 2 blocks, but 2 are protected"),
        (None, (1, 2), [2, 3], r"group 2 \(blocks 2 to 3\) keeps 1 of its 2 blocks, but 2 are protected \(2, 3\)"),
    ],
)
def test_budgets_that_do_not_fit(keep: Any, pattern: Any, protect: list[int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_quota(BLOCKS, keep, pattern, protect, "Greedy")
