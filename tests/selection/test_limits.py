"""What a network cannot be without is part of every selector's constraints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from torch import nn

import tinyfusion_core as tiny
from criteria_tasks import TRAINER
from tinyfusion_core.samplers.constraints import Rules
from tinyfusion_core.selection.base import within
from toys import Match, Planted, planted_data


@dataclass(frozen=True)
class Limited(Planted):
    demanded: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def limits(self, model: nn.Module) -> Mapping[str, Sequence[Any]]:
        return self.demanded


def limited(**limits: Sequence[Any]) -> tiny.Task:
    data = planted_data()
    return tiny.Task(backbone=Limited(demanded=limits), loss=Match(), train=data, held_out=data)


FIRST = {"protect": [0, 2]}  # which do nothing
PAIRS = {"period": ["a", "b"]}
SELECTORS: list[Any] = [
    tiny.FirstN(keep=4),
    tiny.LastN(keep=4),
    tiny.LeaveOneOut(keep=4, samples=32),
    tiny.Search(keep=4, steps=3),
    tiny.Race(keep=4, steps=40, samples=16, proposers=[tiny.LastN(keep=4), tiny.FirstN(keep=4)]),
    pytest.param(tiny.Race(keep=4, steps=40, samples=16), marks=pytest.mark.slow),
    tiny.Finals(search=tiny.Search(keep=4, steps=3), others=[tiny.LastN(keep=4)], steps=4, masks=2, samples=16),
    pytest.param(tiny.Shallowest(loss=1.0, steps=60, samples=16), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("selector", SELECTORS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("limits", [FIRST, PAIRS], ids=["protect", "period"])
def test_every_selector_obeys(selector: tiny.Selector, limits: Mapping[str, Sequence[Any]]) -> None:
    kept = selector(limited(**limits), TRAINER).kept
    if limits == FIRST:
        assert {0, 2} <= set(kept)
    else:
        assert [i % 2 for i in kept] == [j % 2 for j in range(len(kept))]


def test_patterns_have_room_for_what_must_stay_alone() -> None:
    search = tiny.Search(pattern=(1, 2), steps=2)
    assert {0, 2} <= set(search(limited(**FIRST), TRAINER).kept)
    with pytest.raises(tiny.UserError, match=r"only masks of the constraints period \['a', 'b'\]; .*use keep"):
        search(limited(**PAIRS), TRAINER)


@pytest.mark.parametrize("kind", [tiny.Search, tiny.FirstN])
def test_budgets_of_costs_have_no_room_for_a_period(kind: type[tiny.Selector]) -> None:
    selector = kind(budget="0.6x")
    if kind is tiny.FirstN:
        assert {0, 2} <= set(selector(limited(**FIRST), TRAINER).kept)
    with pytest.raises(tiny.UserError, match=r"only masks of the constraints period .*budget of costs .*give keep"):
        selector(limited(**PAIRS), TRAINER)


def test_a_choice_that_is_given_is_not_constrained() -> None:
    keep = tiny.Keep([1, 3])
    assert keep(limited(**FIRST), TRAINER).kept == (1, 3)
    for search in (tiny.Search(keep=4), tiny.Search(sampler=lambda lists: tiny.ScoreFunction(lists, Rules(keep=4)))):
        assert (within(search, FIRST) is search) == (search.sampler is not None)
        assert within(search, {}) is search


def test_limits_add_to_rules() -> None:
    rules = Rules(keep=4, protect=[7], period=["s", "f", "f"])
    both = rules.with_limits({"protect": [0], "period": ["a", "b"]})
    assert both.protect == (0, 7)
    assert both.period == ("s a", "f b", "f a", "s b", "f a", "f b")
    assert rules.with_limits({"period": ["s", "f", "f"]}).period == ("s", "f", "f")
    assert Rules(keep=4).with_limits({}) == Rules(keep=4)
