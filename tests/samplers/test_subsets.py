"""The subset distribution against enumeration, and every rule against a plain reading of it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rule_cases import CASES, TWO_LISTS
from tinyfusion_core.errors import UserError
from tinyfusion_core.samplers.conditional_poisson import Subsets
from tinyfusion_core.samplers.constraints import Rules, build

pytestmark = pytest.mark.numerics


def obeys(mask: tuple[int, ...], rules: Rules, lists: dict[str, int]) -> bool:
    """The rules as a reader understands them, list by list."""
    parts, start = [], 0
    for depth in lists.values():
        parts.append(mask[start : start + depth])
        start += depth
    if isinstance(rules.keep, dict) and any(sum(p) != rules.keep[n] for p, n in zip(parts, lists, strict=True)):
        return False
    if isinstance(rules.keep, int) and sum(mask) != rules.keep:
        return False
    used = sum(c for c, m in zip(rules.costs or mask, mask, strict=True) if m)
    if rules.costs is not None and not 0 < used <= rules.budget:
        return False
    if not all(mask[i] for i in rules.protect) or any(mask[i] for i in rules.remove):
        return False
    if any(len({mask[i] for i in group}) > 1 for group in rules.together):
        return False
    runs = [[len(list(g)) for bit, g in itertools.groupby(part) if not bit] for part in parts]
    if rules.max_run is not None and any(run > rules.max_run for part in runs for run in part):
        return False
    return not (rules.contiguous and any(len(part) > 1 for part in runs))


def enumerate_masks(rules: Rules, lists: dict[str, int]) -> Tensor:
    masks = [m for m in itertools.product((0, 1), repeat=sum(lists.values())) if obeys(m, rules, lists)]
    if rules.costs is not None and masks:  # only those that use the budget, to within the cheapest block that may stay
        used = [sum(c for c, m in zip(rules.costs, mask, strict=True) if m) for mask in masks]
        sets = {frozenset(next((g for g in rules.together if i in g), [i])) for i in range(len(rules.costs))}
        free = [s for s in sets if not s & {*rules.protect, *rules.remove}]
        least = max(used) - min([c for s in free if (c := sum(rules.costs[i] for i in s))], default=1)
        masks = [mask for mask, cost in zip(masks, used, strict=True) if cost > least]
    return torch.tensor(masks, dtype=torch.float64)


@pytest.mark.parametrize("rules", CASES, ids=lambda r: ",".join(r.given()))
def test_everything_equals_enumeration(rules: Rules) -> None:
    masks = enumerate_masks(rules, TWO_LISTS)
    assert len(masks) > 1
    automaton = build(rules, TWO_LISTS)
    assert automaton.num_masks == len(masks)
    allowed = {tuple(mask.nonzero().flatten().tolist()) for mask in masks}
    for bits in itertools.product((0, 1), repeat=8):
        kept = tuple(i for i, bit in enumerate(bits) if bit)
        assert automaton.accepts(kept) == (kept in allowed)
    theta = torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).mul(2).requires_grad_()
    subsets = Subsets(automaton, theta)
    scores = masks @ theta
    p = scores.softmax(0)
    assert torch.allclose(subsets.log_partition(), scores.logsumexp(0), atol=1e-12)
    assert torch.allclose(subsets.marginals(), p @ masks, atol=1e-12)
    assert torch.allclose(subsets.log_prob(masks), scores.log_softmax(0), atol=1e-12)
    entropy = torch.special.entr(p).sum()
    assert torch.allclose(subsets.entropy(), entropy, atol=1e-12)
    # The gradients too, also those of what is itself a gradient.
    weights = torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for ours, theirs in ((subsets.entropy(), entropy), (subsets.marginals() @ weights, (p @ masks) @ weights)):
        (a,), (b,) = (torch.autograd.grad(total, theta, retain_graph=True) for total in (ours, theirs))
        assert torch.allclose(a, b, atol=1e-11)
    centred = masks - p @ masks
    covariance = (centred * p[:, None]).T @ centred @ weights
    for same in (subsets, Subsets(automaton, theta.detach())):
        assert torch.allclose(same.covariance(weights), covariance, atol=1e-11)
    other = Subsets(automaton, theta.detach().roll(1))
    q = (masks @ other.theta).log_softmax(0)
    assert torch.allclose(subsets.divergence(other), (p * (scores.log_softmax(0) - q)).sum(), atol=1e-11)
    order = scores.argsort(descending=True)
    assert torch.equal(subsets.mode(), masks[order[0]])
    best = subsets.best(5)
    for (log_prob, kept), i in zip(best, order, strict=False):
        assert kept == tuple(masks[i].nonzero().flatten().tolist())
        assert math.isclose(log_prob, float(scores.detach().log_softmax(0)[i]), abs_tol=1e-9)
    assert len(best) == min(5, len(masks))


@pytest.mark.parametrize("rules", CASES, ids=lambda r: ",".join(r.given()))
def test_samples_follow_the_distribution(rules: Rules) -> None:
    masks = enumerate_masks(rules, TWO_LISTS)
    rng = torch.Generator().manual_seed(0)
    theta = torch.randn(8, dtype=torch.float64, generator=rng)
    subsets = Subsets(build(rules, TWO_LISTS), theta)
    drawn = subsets.sample(torch.rand(20_000, 8, dtype=torch.float64, generator=rng))
    index = {tuple(m.tolist()): i for i, m in enumerate(masks)}
    counts = torch.zeros(len(masks))
    for row in drawn.tolist():
        counts[index[tuple(row)]] += 1
    expected = 20_000 * (masks @ theta).softmax(0)
    common = expected > 5
    chi_square = ((counts - expected).square() / expected)[common].sum()
    freedom = int(common.sum()) - 1
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5 + 5


def test_the_gradient_of_the_partition_is_the_marginals_by_finite_differences() -> None:
    automaton = build(Rules(keep=3, max_run=2), {"blocks": 8})
    theta = torch.linspace(-2, 2, 8, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: Subsets(automaton, t).log_partition(), theta)
    assert torch.autograd.gradgradcheck(lambda t: Subsets(automaton, t).log_partition(), theta)


@pytest.mark.parametrize("scale", [0.0, 1.0, 50.0])
def test_stable_for_a_hundred_and_more_blocks_and_any_logits(scale: float) -> None:
    automaton = build(Rules(keep=64), {"blocks": 128})
    assert automaton.num_masks == math.comb(128, 64)
    rng = torch.Generator().manual_seed(0)
    # What a float32 parameter can hold, at both ends.
    logits = ((torch.rand(128, generator=rng) > 0.5).float() * 2 - 1).mul(scale).requires_grad_()
    subsets = Subsets(automaton, logits.double())
    marginals = subsets.marginals()
    assert torch.isfinite(subsets.log_partition())
    assert abs(marginals.sum() - 64) < 1e-9
    assert ((marginals >= 0) & (marginals <= 1 + 1e-12)).all()
    entropy = subsets.entropy()
    assert -1e-6 < entropy <= math.log(automaton.num_masks) + 1e-6
    (grad,) = torch.autograd.grad(entropy + marginals[3], logits)
    assert torch.isfinite(grad).all()
    assert (subsets.sample(torch.rand(50, 128, generator=rng)).sum(1) == 64).all()
    assert subsets.mode().sum() == 64


@st.composite
def rules_and_lists(draw):
    lists = {f"list{i}": draw(st.integers(1, 5)) for i in range(draw(st.integers(1, 2)))}
    n = sum(lists.values())
    some = st.lists(st.integers(0, n - 1), unique=True, max_size=3)
    kind = draw(st.sampled_from(["keep", "quota", "cost"]))
    budget: dict = {}
    if kind == "keep":
        budget["keep"] = draw(st.integers(1, n))
    elif kind == "quota":
        budget["keep"] = {name: draw(st.integers(0, depth)) for name, depth in lists.items()}
        assume(any(budget["keep"].values()))
    else:
        budget["costs"] = draw(st.lists(st.integers(1, 4), min_size=n, max_size=n))
        budget["budget"] = draw(st.integers(1, sum(budget["costs"])))
    group = draw(some)
    return lists, Rules(
        **budget,
        protect=draw(some),
        remove=draw(some),
        together=[group] if len(group) > 1 else [],
        max_run=draw(st.none() | st.integers(0, 3)),
        contiguous=draw(st.booleans()),
    )


@settings(max_examples=150)
@given(rules_and_lists(), st.integers(0, 1000))
def test_every_sample_obeys_every_rule(case, seed: int) -> None:
    lists, rules = case
    masks = enumerate_masks(rules, lists)
    if not len(masks):
        with pytest.raises(UserError, match=r"no mask of \d+ blocks obeys|expected enough for one block"):
            build(rules, lists)
        return
    automaton = build(rules, lists)
    assert automaton.num_masks == len(masks)
    rng = torch.Generator().manual_seed(seed)
    theta = 3 * torch.randn(sum(lists.values()), dtype=torch.float64, generator=rng)
    subsets = Subsets(automaton, theta)
    drawn = subsets.sample(torch.rand(16, len(theta), generator=rng))
    for row in [*drawn, subsets.mode()]:
        assert obeys(tuple(int(x) for x in row), rules, lists)
    assert torch.allclose(subsets.marginals(), (masks @ theta).softmax(0) @ masks, atol=1e-10)


@pytest.mark.parametrize(
    ("rules", "kept"),
    [
        (Rules(costs=[100, 100, 100, 1], budget=150), {(0, 3), (1, 3), (2, 3)}),
        (Rules(costs=[1, 10, 10, 10], budget=25, remove=[0]), {(1, 2), (1, 3), (2, 3)}),
        (Rules(costs=[1, 10, 10, 10], budget=100), {(0, 1, 2, 3)}),
        (Rules(costs=[5, 5, 0, 0], budget=5, together=[[2, 3]]), {(0,), (1,), (0, 2, 3), (1, 2, 3)}),
        (Rules(costs=[1, 7, 8, 9], budget=18, protect=[0]), {(0, 1, 2), (0, 1, 3), (0, 2, 3)}),
        (Rules(costs=[2, 2, 8, 9], budget=13, together=[[0, 1]]), {(0, 1, 2), (0, 1, 3)}),
        (Rules(costs=[4, 4, 4, 4], budget=20, protect=[0, 1, 2, 3]), {(0, 1, 2, 3)}),
    ],
)
def test_a_budget_is_used_as_far_as_it_can_be(rules: Rules, kept: set[tuple[int, ...]]) -> None:
    automaton = build(rules, {"blocks": 4})
    subsets = Subsets(automaton, torch.zeros(4, dtype=torch.float64))
    assert {mask for _, mask in subsets.best(10)} == kept
    assert subsets.best(1)[0][1] == tuple(subsets.mode().nonzero().flatten().tolist())


def test_a_row_is_drawn_from_its_own_numbers() -> None:
    subsets = Subsets(build(Rules(keep=3), {"blocks": 8}), torch.randn(8, dtype=torch.float64))
    uniform = torch.rand(10, 8)
    assert torch.equal(subsets.sample(uniform)[4:], subsets.sample(uniform[4:]))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (Rules(), "expected keep, or costs with budget"),
        (Rules(keep=3, costs=[1] * 8, budget=4), "expected keep, or costs with budget"),
        (Rules(keep=3, budget=4), "expected keep, or costs with budget"),
        (Rules(keep=3, costs=[1] * 8), "expected keep, or costs with budget"),
        (Rules(keep=9), r"^sampler\.rules\.keep is 9; expected 1 to 8 blocks"),
        (Rules(keep={"first": 0, "second": 0}), r"keep is .*; expected at least one block in all"),
        (Rules(keep={"first": 2}), "says nothing of the block list.s. second"),
        (Rules(keep={"first": 2, "secnd": 1}), "no block list 'secnd'; did you mean 'second'"),
        (Rules(keep={"first": 6, "second": 1}), r"^sampler\.rules\.keep\.first is 6; expected 0 to 5"),
        (Rules(costs=[1, 2], budget=4), "expected 8 whole numbers"),
        (
            Rules(keep=3, protect=[8]),
            r"rules\.protect is \[8\]; expected different indices from 0 to 7",
        ),
        (Rules(keep=3, together=[[0, 1], [1, 2]]), "expected different indices"),
        (Rules(keep=3, max_run=-1), r"^sampler\.rules\.max_run is -1"),
        (
            Rules(keep=2, protect=[0, 1, 2]),
            r"no mask of 8 blocks obeys keep 2, protect \[0, 1, 2\]; in the way: protect \[0, 1, 2\] \(without it 28",
        ),
        (Rules(keep=2, max_run=1), r"in the way: max_run 1 \(without it 28 masks would do\)"),
        (Rules(keep=3, protect=[0], remove=[0]), r"in the way: protect \[0\] .*; remove \[0\]"),
        (Rules(costs=[5] * 8, budget=3), r"^sampler\.rules\.budget is 3; expected enough for one block"),
        (
            Rules(costs=[1] * 8, budget=4, protect=[0, 1, 2, 3, 4], remove=[]),
            r"no mask of 8 blocks obeys costs .*, budget 4, protect \[0, 1, 2, 3, 4\]; in the .*without it 70 masks",
        ),
    ],
)
def test_rules_that_make_no_sense_or_no_mask(rules: Rules, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(rules, TWO_LISTS)


def test_rules_of_another_type_are_refused_when_they_are_made() -> None:
    with pytest.raises(
        UserError,
        match=r"keep \(of Rules\) is '3'; expected a whole number or a mapping of names",
    ):
        Rules(keep="3")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"budget \(of Rules\) is {'first': 3}; expected a whole number or None"):
        Rules(costs=[1] * 8, budget={"first": 3})  # type: ignore[arg-type]
