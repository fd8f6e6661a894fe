"""Distributions over masks: the right law, the exact budget, the right gradient."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tinyfusion_core.dataloading.order import Order
from tinyfusion_core.errors import UserError
from tinyfusion_core.runtime.seeding import Rng
from tinyfusion_core.samplers.grouped import GroupedSampler
from tinyfusion_core.samplers.patterns import parse_pattern, split_groups

pytestmark = pytest.mark.numerics


def with_logits(lists: dict[str, int], pattern, *logits: list[float], **options) -> GroupedSampler:
    sampler = GroupedSampler(lists, pattern, **{"scaling": (100.0, 100.0), **options})
    for parameter, values in zip(sampler.logits, logits, strict=True):
        parameter.data = torch.tensor(values)
    return sampler


def test_option_frequencies_follow_the_softmax_whatever_tau_is() -> None:
    for tau in (4.0, 0.1):
        logits = [0.02, 0.01, 0.0, -0.01, 0.005, 0.015]
        sampler = with_logits({"blocks": 4}, (2, 4), logits, tau=(tau, tau))
        masks = sampler.sample(20_000, Rng(0, "test")).mask
        options = [[1.0 if i in kept else 0.0 for i in range(4)] for kept in itertools.combinations(range(4), 2)]
        found = torch.stack([(masks == torch.tensor(o)).all(1).float().mean() for o in options])
        expected = (100 * torch.tensor(logits)).softmax(0)
        # Five standard deviations of a frequency among 20,000.
        assert ((found - expected).abs() < 5 * (expected * (1 - expected) / 20_000).sqrt()).all()


@st.composite
def patterns(draw: st.DrawFn) -> tuple[dict[str, int], dict[str, list[tuple[int, int]]]]:
    lists, by_list = {}, {}
    for name in ("encoder", "decoder")[: draw(st.integers(1, 2))]:
        groups = draw(
            st.lists(
                st.integers(1, 6).flatmap(lambda m: st.tuples(st.integers(0, m), st.just(m))), min_size=1, max_size=4
            )
        )
        lists[name], by_list[name] = sum(m for _, m in groups), groups
    return lists, by_list


@settings(max_examples=60)
@given(patterns(), st.integers(0, 2**31))
def test_every_sample_obeys_the_budget_of_every_group(case, seed: int) -> None:
    lists, by_list = case
    sampler = GroupedSampler(lists, by_list)
    for logits in sampler.logits:
        logits.data.normal_()
    mask = sampler.sample(7, Rng(seed, "test")).mask
    assert mask.shape == (7, sum(lists.values()))
    start = 0
    for keep, of in itertools.chain.from_iterable(by_list.values()):
        part = mask[:, start : start + of]
        assert ((part == 0) | (part == 1)).all()
        assert (part.sum(1) == keep).all()
        start += of
    assert len(sampler.mode()) == int(mask[0].sum())
    assert math.isclose(float(sampler.marginals().sum()), len(sampler.mode()), rel_tol=1e-4, abs_tol=1e-4)
    assert sampler.num_masks == math.prod(math.comb(m, n) for n, m in itertools.chain.from_iterable(by_list.values()))


def test_gradient_is_that_of_the_formula() -> None:
    # dL/dl_k = (scaling / tau) * sum_n p_nk (h_nk - sum_i p_ni h_ni), h = delta @ options^T.
    sampler = with_logits({"blocks": 3}, (1, 3), [0.3, -0.2, 0.1], tau=(2.0, 2.0), scaling=(5.0, 5.0))
    gumbel, delta = Rng(3, "t").gumbel("g", 4, 3), torch.randn(4, 3)
    draw = sampler.relax(gumbel)
    (draw.mask * delta).sum().backward()
    p = ((5.0 * torch.tensor([0.3, -0.2, 0.1]) + gumbel) / 2.0).softmax(1)
    h = delta @ torch.eye(3)
    expected = (5.0 / 2.0) * (p * (h - (p * h).sum(1, keepdim=True))).sum(0)
    grad = sampler.logits[0].grad
    assert grad is not None
    assert torch.allclose(grad, expected, atol=1e-5)


def test_log_prob_is_that_of_the_drawn_options() -> None:
    sampler = with_logits({"a": 2, "b": 3}, {"a": (1, 2), "b": (2, 3)}, [0.01, 0.0], [0.02, 0.0, -0.01])
    draw = sampler.sample(50, Rng(0, "test"))
    first, second = ((100 * logits.detach()).log_softmax(0) for logits in sampler.logits)
    for mask, log_prob in zip(draw.mask.tolist(), draw.log_prob.tolist(), strict=True):
        kept = [i for i, m in enumerate(mask[2:]) if m]
        expected = first[mask.index(1.0)] + second[list(itertools.combinations(range(3), 2)).index(tuple(kept))]
        assert log_prob == pytest.approx(float(expected), abs=1e-6)


def test_what_is_reported_of_the_distribution() -> None:
    sampler = with_logits({"blocks": 4}, (1, 2), [0.02, 0.02], [0.0, 0.03])
    p = float(torch.tensor([0.0, 3.0]).softmax(0)[1])
    assert sampler.mode() == [0, 3]
    assert sampler.confidence() == pytest.approx([0.5, p])
    assert sampler.choices() == [[0, 1], [2, 3]]
    assert sampler.marginals().tolist() == pytest.approx([0.5, 0.5, 1 - p, p])
    assert sampler.entropy() == pytest.approx(math.log(2) - p * math.log(p) - (1 - p) * math.log(1 - p), rel=1e-5)


def test_the_best_masks_of_a_law_that_is_all_but_certain() -> None:
    sampler = GroupedSampler({"blocks": 4}, (2, 4), scaling=(100.0, 100.0))
    with torch.no_grad():
        sampler.logits[0].copy_(torch.tensor([3.0, 1.0, 0.0, 1.5, 0.5, 1.2]))
    # The options are 01, 02, 03, 12, 13, 23.
    assert sampler.best(4) == [(0, 1), (1, 2), (2, 3), (0, 2)]


def test_schedules_are_linear_and_reach_their_ends() -> None:
    sampler = GroupedSampler({"blocks": 4}, (2, 4), tau=(4.0, 0.1), scaling=(1.0, 101.0))
    assert sampler.anneal(0.0) == {"tau": 4.0, "scaling": 1.0}
    assert sampler.anneal(0.5) == pytest.approx({"tau": 2.05, "scaling": 51.0})
    assert sampler.anneal(1.0) == pytest.approx({"tau": 0.1, "scaling": 101.0})


def test_rows_have_their_own_streams() -> None:
    sampler = GroupedSampler({"blocks": 6}, (3, 6))
    whole = sampler.sample(8, Rng(0, "search", step=5)).mask
    parts = [sampler.sample(4, Rng(0, "search", step=5, first=first)).mask for first in (0, 4)]
    assert torch.equal(whole, torch.cat(parts))
    assert not torch.equal(whole, sampler.sample(8, Rng(0, "search", step=6)).mask)
    x = torch.zeros(8, 3, 2)
    noise = Rng(1, "s").normal("noise", x)
    assert torch.equal(noise[5:], Rng(1, "s", first=5).normal("noise", x[5:]))
    assert not torch.equal(noise, Rng(1, "s").normal("other", x))


def test_stratified_draws_cover_every_interval_once() -> None:
    draws = Rng(0, "held out", strata=40).uniform("time", 40)
    assert sorted((draws * 40).long().tolist()) == list(range(40))
    other = Rng(0, "held out", strata=40).uniform("label", 40)
    assert not torch.equal((draws * 40).long(), (other * 40).long())
    later = Rng(0, "held out", step=1, strata=40).uniform("time", 40)
    assert not torch.equal((draws * 40).long(), (later * 40).long()), "every pass of an evaluation has its own order"


def test_order_visits_every_sample_once_in_an_epoch() -> None:
    order = Order(0, "train", num_samples=10, batch_size=4)
    steps = list(order.steps(0, 5, 0, 4))
    assert sorted(itertools.chain.from_iterable([*steps[:2], steps[2][:2]])) == list(range(10))
    resumed = list(order.steps(3, 5, 0, 4))
    assert resumed == steps[3:]
    halves = zip(order.steps(0, 5, 0, 2), order.steps(0, 5, 2, 2), strict=True)
    assert [a + b for a, b in halves] == steps
    epochs = [[order[10 * epoch + i] for i in range(10)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3, "every epoch has an order of its own"


@pytest.mark.parametrize(
    ("pattern", "lists", "message"),
    [
        (124, {"blocks": 8}, r"124 is no pattern\. Give \[keep, of\]"),
        ((2, 4), {"blocks": 10}, r"\[2, 4\] does not fit 'blocks' with 10 blocks: group 3 .* blocks 8 to 11"),
        ([(2, 4), (1, 2)], {"blocks": 8}, "2 groups cover 6 of the 8 blocks of 'blocks'"),
        ([(2, 4), (3, 6)], {"blocks": 8}, "group 2 of 2 ends at block 9, but 'blocks' has 8"),
        ((5, 4), {"blocks": 8}, r"cannot keep 5 of 4"),
        ((14, 28), {"blocks": 28}, "40,116,600 options"),
        ({"blocks": (1, 2)}, {"first": 2, "second": 2}, "the backbone has first, second"),
        ("two of four", {"blocks": 8}, "is no pattern"),
        ([], {"blocks": 8}, "is no pattern"),
        (2.5, {"blocks": 8}, "is no pattern"),
    ],
)
def test_wrong_patterns(pattern, lists: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        split_groups(pattern, lists)


def test_patterns_as_yaml_gives_them() -> None:
    assert parse_pattern([2, 4]) == parse_pattern("2:4") == (2, 4)
    assert parse_pattern([[3, 4], "2:4"]) == [(3, 4), (2, 4)]
    assert parse_pattern({"encoder": [1, 2]}) == {"encoder": (1, 2)}
    assert split_groups({"a": (1, 2), "b": [(2, 3)]}, {"a": 4, "b": 3}) == [(1, 2), (1, 2), (2, 3)]


def test_sampling_is_exact_under_autocast() -> None:
    sampler = with_logits({"blocks": 4}, (2, 4), [0.02, 0.01, 0.0, -0.01, 0.005, 0.015])
    gumbel, delta = Rng(3, "t").gumbel("g", 16, 6), torch.randn(16, 4)

    def gradient(enabled: bool) -> Tensor:
        sampler.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            draw = sampler.relax(gumbel)
        (draw.mask * delta).sum().backward()
        assert sampler.logits[0].grad is not None
        return sampler.logits[0].grad.clone()

    assert torch.equal(gradient(True), gradient(False))
