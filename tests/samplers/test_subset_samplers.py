"""Samplers over all masks within the rules: planted truth, unbiased gradients, what a search does with them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import tinyfusion_core as tiny
from marks import slow_but
from planted_search import LISTS, SAMPLERS, TRAINER, WORKING, search, task
from tinyfusion_core.samplers.base import BlockSampler
from tinyfusion_core.samplers.constraints import Rules
from tinyfusion_core.samplers.grouped import GroupedSampler
from tinyfusion_core.samplers.subset import ExactK, GumbelTopK, ScoreFunction
from toys import Residual

pytestmark = pytest.mark.numerics


@pytest.mark.parametrize("name", slow_but(SAMPLERS, "score"))
def test_every_sampler_finds_the_blocks_that_work(name: str) -> None:
    rate = {"reinmax": 0.1}.get(name)
    decision = search(SAMPLERS[name], lr_gates=rate)(task(), TRAINER)
    assert list(decision.kept) == WORKING
    assert decision.confidence > 0.3
    assert len(decision.marginals) == 8


@pytest.mark.parametrize("name", slow_but(SAMPLERS, "straight-through"))
def test_no_sampler_finds_them_when_the_gradient_points_the_other_way(name: str) -> None:
    def flipped(lists: dict[str, int]) -> BlockSampler:
        sampler = SAMPLERS[name](lists)
        for logits in sampler.parameters():
            logits.register_hook(torch.neg)
        return sampler

    decision = search(flipped, lr_gates={"reinmax": 0.1}.get(name))(task(), TRAINER)
    assert len(set(decision.kept) & set(WORKING)) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("name", slow_but(["exact", "score", "top-k"], "score"))
def test_where_all_blocks_do_nothing_none_is_preferred(name: str) -> None:
    with pytest.warns(UserWarning, match="its choice means little"):
        decision = search(SAMPLERS[name])(task((0.0,) * 8), TRAINER)
    assert decision.confidence < 0.1
    assert all(0.3 < p < 0.7 for p in decision.marginals)


def a_loss(masks: Tensor) -> Tensor:
    """Of masks, with interactions: what no estimator can take for linear."""
    weights = torch.linspace(-1, 1, masks.shape[1])
    return masks @ weights + 6 * masks[:, 0] * masks[:, 3] - 4 * masks[:, 1] * masks[:, 2] + 0.5


@pytest.mark.parametrize("masks", slow_but([2, 4], 2))
def test_the_score_function_is_unbiased(masks: int) -> None:
    sampler = ScoreFunction({"blocks": 5}, Rules(keep=2), masks=masks, entropy=(0.0, 0.0))
    with torch.no_grad():
        sampler.logits.copy_(torch.tensor([0.5, -0.3, 0.2, 0.0, -1.0]))
    every = torch.tensor([m for m in itertools.product((0.0, 1.0), repeat=5) if sum(m) == 2])
    expected = ((every @ sampler.logits).softmax(0) * a_loss(every)).sum()
    (exact,) = torch.autograd.grad(expected, sampler.logits)
    rows = 40_000 * masks
    draw = sampler.sample(rows, tiny.Rng(0, "test"))
    losses = a_loss(draw.mask).requires_grad_()
    (estimate,) = torch.autograd.grad(sampler.surrogate(draw, losses), sampler.logits)
    assert torch.allclose(estimate, exact, atol=0.02)
    # The straight-through estimate on the exact marginals is not, where the loss is not linear in the gates.
    biased = ExactK({"blocks": 5}, Rules(keep=2))
    biased.load_state_dict(sampler.state_dict())
    draw = biased.sample(40_000, tiny.Rng(0, "test"))
    (simple,) = torch.autograd.grad(biased.surrogate(draw, a_loss(draw.mask)), biased.logits)
    assert (simple - exact).abs().max() > 0.05


def test_the_straight_through_marginals_are_exact_for_a_linear_loss() -> None:
    sampler = ExactK({"blocks": 5}, Rules(keep=2))
    with torch.no_grad():
        sampler.logits.copy_(torch.tensor([0.5, -0.3, 0.2, 0.0, -1.0]))
    weights = torch.linspace(-1, 1, 5)
    every = torch.tensor([m for m in itertools.product((0.0, 1.0), repeat=5) if sum(m) == 2])
    (exact,) = torch.autograd.grad(((every @ sampler.logits).softmax(0) * (every @ weights)).sum(), sampler.logits)
    draw = sampler.sample(16, tiny.Rng(0, "test"))
    assert ((draw.mask == 0) | (draw.mask == 1)).all()
    (estimate,) = torch.autograd.grad((draw.mask @ weights).mean(), sampler.logits)
    assert torch.allclose(estimate, exact, atol=1e-6)


def test_the_log_probability_of_an_order_is_that_of_drawing_block_after_block() -> None:
    sampler = GumbelTopK({"blocks": 4}, keep=2)
    with torch.no_grad():
        sampler.logits.copy_(torch.tensor([0.5, -0.3, 0.2, -1.0]))
    weights = sampler.logits.detach().exp()
    orders = torch.tensor(list(itertools.permutations(range(4), 2)))
    expected = [weights[a] / weights.sum() * weights[b] / (weights.sum() - weights[a]) for a, b in orders]
    assert torch.allclose(sampler._log_prob(orders).exp(), torch.stack(expected))
    assert sum(float(p) for p in expected) == pytest.approx(1)


def test_reinmax_is_exact_for_a_quadratic_loss_of_two_options() -> None:
    """A second-order rule integrates a quadratic without error; the straight-through rule does not."""
    logits = torch.tensor([0.7, -0.2])
    every = torch.eye(2)

    def loss(x: Tensor) -> Tensor:
        return 3 * x[:, 0].square() - x[:, 0] * x[:, 1] + x[:, 1]

    def gradient(estimator: str) -> Tensor:
        sampler = GroupedSampler({"blocks": 2}, (1, 2), tau=(1, 1), scaling=(1, 1), estimator=estimator)
        with torch.no_grad():
            sampler.logits[0].copy_(logits)
        draw = sampler.sample(100_000, tiny.Rng(0, "test"))
        # Options of 1:2 in lexicographic order keep the first or the second block.
        (out,) = torch.autograd.grad(loss(draw.mask).mean(), sampler.logits[0])
        return out

    theta = logits.clone().requires_grad_()
    (exact,) = torch.autograd.grad((theta.softmax(0) * loss(every)).sum(), theta)
    assert torch.allclose(gradient("reinmax"), exact, atol=0.02)
    assert (gradient("straight-through") - exact).abs().max() > 0.05


@pytest.mark.parametrize("name", SAMPLERS)
def test_rows_are_drawn_from_their_own_streams_and_the_best_begin_with_the_mode(name: str) -> None:
    sampler = SAMPLERS[name](LISTS)
    sampler.set_prior([0, 2, 4, 6], (1.5, 1.5))
    assert sampler.mode() == [0, 2, 4, 6]
    whole, half = (sampler.sample(n, tiny.Rng(0, "test", first=f)) for n, f in ((12, 0), (4, 8)))
    assert torch.equal(whole.mask[8:], half.mask)
    assert torch.allclose(whole.log_prob[8:], half.log_prob)
    best = sampler.best(6)
    assert list(best[0]) == [0, 2, 4, 6]
    assert len(set(best)) == 6
    assert all(len(kept) == 4 and sampler.allows(kept) for kept in best)
    assert not sampler.allows((0, 2, 4))
    strong, weak = sampler.marginals()[[0, 2, 4, 6]], sampler.marginals()[[1, 3, 5, 7]]
    assert strong.min() > weak.max()


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_prior_fades_along_its_schedule(name: str) -> None:
    sampler = SAMPLERS[name](LISTS)
    sampler.set_prior([0, 2, 4, 6], (1.5, 0.0))
    sure, half = (sampler.anneal(at) and float(sampler.marginals()[0]) for at in (0.0, 0.5))
    assert sampler.anneal(1.0)["prior"] == 0
    assert sure > half + 0.05 > 0.6
    assert sampler.marginals().numpy() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("name", ["exact", "score", "top-k"])
def test_samplers_are_stable_where_gates_are_all_but_certain(name: str) -> None:
    make = {"exact": ExactK, "score": ScoreFunction}.get(name)
    sampler = GumbelTopK({"blocks": 128}, keep=64) if make is None else make({"blocks": 128}, Rules(keep=64))
    with torch.no_grad():
        sampler.logits.copy_(50 * torch.where(torch.arange(128) % 3 == 0, 1.0, -1.0))
    draw = sampler.sample(16, tiny.Rng(0, "test"))
    assert sampler.logits.dtype == draw.mask.dtype == torch.float32
    assert (draw.mask.sum(1) == 64).all()
    assert torch.isfinite(draw.log_prob).all()
    loss = (draw.mask * torch.linspace(-1, 1, 128)).sum(1)
    (grad,) = torch.autograd.grad(sampler.surrogate(draw, loss), sampler.logits)
    assert torch.isfinite(grad).all()
    assert grad.abs().max() > 0
    assert sum(sampler.marginals().tolist()) == pytest.approx(64)


def test_the_best_masks_of_a_sampler_that_is_all_but_certain() -> None:
    sampler = GumbelTopK(LISTS, keep=4)
    with torch.no_grad():
        sampler.logits.copy_(torch.tensor([9.0, 9, 9, 8, -8, -9, -9, -9]))
    assert sampler.best(2) == [(0, 1, 2, 3), (0, 1, 2, 4)]
    assert len(set(sampler.best(100))) == len(sampler.best(100)) == 70


@pytest.mark.parametrize(("sampler", "agree"), [("score", True), ("exact", False)])
def test_masks_are_compared_without_dropout(sampler: str, agree: bool) -> None:
    """With one possible mask a sample's masks are all the same, and so are their losses."""
    seen: list[Tensor] = []

    class Noisy(Residual):
        """Draws in training mode without a module that says so, as many attentions do."""

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(functional.dropout(x, 0.5, self.training))

    backbone = torch.nn.Sequential(torch.nn.Sequential(Residual(8, 1.0), Noisy(8, 1.0)))

    def loss(model: torch.nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        found = model(batch["x"]).square().mean(1)
        if len(found) >= 16:  # a step, no probe before the search
            seen.append(found.detach())
        return found

    def make(lists: dict[str, int]) -> BlockSampler:
        return {"score": ScoreFunction, "exact": ExactK}[sampler](lists, Rules(keep=2))

    data = {"x": torch.ones(64, 8)}
    tiny.Search(sampler=make, steps=2, update=tiny.Frozen())(
        tiny.wrap(backbone, blocks="0.*", loss_fn=loss, data=data), TRAINER
    )
    assert len(seen) == 2
    assert all((losses == losses[0]).all() == agree for losses in seen)
    assert all(module.training for module in backbone.modules())
