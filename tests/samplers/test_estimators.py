"""Gradients and priors of samplers against their formulas, written out by hand or by enumeration."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tinyfusion_core.runtime.seeding import Rng
from tinyfusion_core.samplers.base import Draw
from tinyfusion_core.samplers.constraints import Rules
from tinyfusion_core.samplers.grouped import GroupedSampler
from tinyfusion_core.samplers.subset import ExactK, GumbelTopK, ScoreFunction

pytestmark = pytest.mark.numerics


def test_reinmax_is_its_formula() -> None:
    """2 J((D + p) / 2) - J(p) / 2, with J(q) = diag(q) - q q', D the drawn option and p the law (arXiv:2304.08612)."""
    sampler = GroupedSampler({"blocks": 3}, (1, 3), scaling=(2.0, 2.0), estimator="reinmax").double()
    with torch.no_grad():
        sampler.logits[0].copy_(torch.tensor([0.3, -0.2, 0.1]))
    slopes = torch.randn(5, 3, dtype=torch.float64)
    draw = sampler.relax(torch.randn(5, 3, dtype=torch.float64))
    (found,) = torch.autograd.grad((draw.mask * slopes).sum(), sampler.logits[0])

    def jacobian(q: Tensor) -> Tensor:
        return torch.diag(q) - torch.outer(q, q)

    law, options = (2 * sampler.logits[0].detach()).softmax(0), draw.mask.detach()  # option i keeps block i
    rows = [(2 * jacobian((d + law) / 2) - jacobian(law) / 2) @ s for d, s in zip(options, slopes, strict=True)]
    assert torch.allclose(found, 2 * torch.stack(rows).sum(0), rtol=1e-12, atol=1e-12)


def score_function(masks: int, weight: float) -> ScoreFunction:
    sampler = ScoreFunction({"blocks": 4}, Rules(keep=2), masks=masks, entropy=(weight, 0.0)).double()
    with torch.no_grad():
        sampler.logits.copy_(torch.tensor([0.9, -0.4, 0.3, 0.0]))
    return sampler


LOSSES = torch.tensor([1.0, 2.0, 6.0, 10.0, 10.0, 40.0], dtype=torch.float64)
ADVANTAGES = [1 - 4, 2 - 3.5, 6 - 1.5, 10 - 25, 10 - 25, 40 - 10]
"""Of two samples with three masks each: a loss less the mean of the two others of its sample."""


def test_a_mask_is_weighted_by_how_much_worse_it_is_than_the_others_of_its_sample() -> None:
    sampler, losses = score_function(3, 0.0), LOSSES.clone().requires_grad_()
    log_prob = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    total = sampler.surrogate(Draw(torch.ones(6, 4), log_prob), losses)
    by_log_prob, by_loss = torch.autograd.grad(total, (log_prob, losses))
    assert by_log_prob.tolist() == pytest.approx([a / 6 for a in ADVANTAGES])
    assert by_loss.tolist() == pytest.approx([1 / 6] * 6)  # the weights see the plain mean
    assert total.item() == pytest.approx(69 / 6)


def test_the_entropy_is_a_reward_in_units_of_the_differences() -> None:
    sampler = score_function(3, 0.7)
    draw = Draw(torch.ones(6, 4), torch.zeros(6, dtype=torch.float64))
    total = sampler.surrogate(draw, LOSSES)
    every = torch.tensor([m for m in itertools.product((0.0, 1.0), repeat=4) if sum(m) == 2], dtype=torch.float64)
    entropy = torch.special.entr((every @ sampler.logits).softmax(0)).sum()
    unit = sum(map(abs, ADVANTAGES)) / 6
    assert total.item() == pytest.approx(69 / 6 - 0.7 * unit * entropy.item(), rel=1e-6)
    (found,), (slope,) = (torch.autograd.grad(value, sampler.logits) for value in (total, entropy))
    assert torch.allclose(found, -0.7 * unit * slope, rtol=1e-6, atol=1e-9)
    sampler.anneal(1.0)
    assert sampler.surrogate(draw, LOSSES).item() == pytest.approx(69 / 6)


def test_the_gradient_is_not_rounded_under_autocast() -> None:
    sampler = ScoreFunction({"blocks": 6}, Rules(keep=3), masks=2)
    losses = torch.rand(8, generator=torch.Generator().manual_seed(0))
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            total = sampler.surrogate(sampler.sample(8, Rng(0, "search")), losses)
        found.append(torch.autograd.grad(total, sampler.logits)[0])
    assert torch.equal(*found) and found[0].abs().max() > 0


def test_a_draw_has_all_that_its_surrogate_needs_of_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading the logits while a device runs the network would wait for it."""
    sampler = ScoreFunction({"blocks": 4}, Rules(keep=2), masks=3, entropy=(0.7, 0.0), control=True)
    draw = sampler.sample(6, Rng(0, "search"))
    assert draw.host is not None
    assert torch.equal(draw.host.float(), draw.mask)
    (expected,) = torch.autograd.grad(
        sampler.surrogate(replace(draw, of=None), LOSSES.float()), sampler.logits, retain_graph=True
    )
    monkeypatch.setattr(ScoreFunction, "_subsets", None)
    (found,) = torch.autograd.grad(sampler.surrogate(draw, LOSSES.float()), sampler.logits)
    assert torch.equal(found, expected)


def test_the_relaxed_top_k_is_its_formula() -> None:
    """The sum of p_j = softmax(a_j / tau), a_(j + 1) = a_j + log(1 - p_j), from the scores (arXiv:1901.10517)."""
    sampler = GumbelTopK({"blocks": 5}, keep=3, tau=(0.7, 0.7)).double()
    with torch.no_grad():
        sampler.logits.copy_(torch.tensor([0.5, -0.3, 0.2, 0.0, -1.0]))
    slopes = torch.linspace(-1, 2, 5, dtype=torch.float64)
    draw = sampler.sample(4, Rng(0, "test"))
    (found,) = torch.autograd.grad((draw.mask * slopes).sum(), sampler.logits)
    scores = sampler.logits + Rng(0, "test").gumbel("mask", 4, 5).double()
    a, soft = scores, torch.zeros(4, 5, dtype=torch.float64)
    for _ in range(3):
        p = (a / 0.7).softmax(1)
        soft, a = soft + p, a + (1 - p).log()
    (expected,) = torch.autograd.grad((soft * slopes).sum(), sampler.logits)
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12)
    assert torch.equal(draw.mask.detach().sum(1), torch.full((4,), 3.0, dtype=torch.float64))


@pytest.mark.parametrize("strength", [0.5, 1.5])
def test_a_prior_is_log_odds_for_the_blocks_that_it_keeps_and_against_the_others(strength: float) -> None:
    """Of two blocks one is kept: the odds of the preferred one are exp(2 * strength), in every group."""
    p = torch.tensor(2 * strength).sigmoid().item()
    grouped = GroupedSampler({"first": 2, "second": 4}, (1, 2))
    grouped.set_prior([0, 3, 4], (strength, 0.0))
    assert grouped.marginals().tolist() == pytest.approx([p, 1 - p, 1 - p, p, p, 1 - p], abs=1e-6)
    assert grouped.mode() == [0, 3, 4]
    for sampler in (ExactK, ScoreFunction):
        subset = sampler({"blocks": 2}, Rules(keep=1))
        subset.set_prior([1], (strength, 0.0))
        assert subset.marginals().tolist() == pytest.approx([1 - p, p], abs=1e-6)


def test_gates_and_prior_add_up() -> None:
    grouped = GroupedSampler({"blocks": 4}, (1, 2), scaling=(10.0, 10.0))
    grouped.set_prior([1, 2], (0.5, 0.5))
    with torch.no_grad():
        nn.utils.vector_to_parameters(torch.tensor([0.3, 0.0, -0.1, 0.0]), grouped.parameters())
    p, q = torch.tensor([3.0 - 2 * 0.5, -1.0 + 2 * 0.5]).sigmoid().tolist()
    assert grouped.marginals().tolist() == pytest.approx([p, 1 - p, q, 1 - q], abs=1e-6)
