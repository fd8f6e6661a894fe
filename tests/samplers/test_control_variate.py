"""The score function's model of the loss: it leaves the gradient's mean as it is, and takes noise away."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

import tinyfusion_core as tiny
from planted_search import TRAINER, search, task
from rule_cases import CASES, TWO_LISTS
from tinyfusion_core.errors import Interrupted
from tinyfusion_core.samplers.base import Draw
from tinyfusion_core.samplers.constraints import Rules
from tinyfusion_core.samplers.control_variate import ControlVariate
from tinyfusion_core.samplers.subset import ScoreFunction
from toys import Match

pytestmark = pytest.mark.numerics

CONTROLLED = partial(ScoreFunction, rules=Rules(keep=4), control=True)


def every(sampler: ScoreFunction) -> Tensor:
    """All masks that a sampler may draw, (masks, 8)."""
    return torch.tensor([[float(i in mask) for i in range(8)] for mask in sampler.automaton.masks()])


def a_loss(masks: Tensor) -> Tensor:
    """Not linear in the masks."""
    pair, three = masks[:, [0, 5]].prod(1), masks[:, [1, 4, 6]].prod(1)
    return masks @ torch.linspace(-1, 1, 8) + 3 * pair - 2 * three


def made(rules: Rules) -> tuple[ScoreFunction, ControlVariate]:
    """A sampler between two choices, with two masks for each sample, and its model."""
    sampler = ScoreFunction(TWO_LISTS, rules, masks=2, entropy=(0.0, 0.0), control=True)
    with torch.no_grad():
        sampler.logits.copy_(torch.tensor([0.5, -0.3, 0.2, 0.0, -1.0, 0.4, 0.1, -0.2]))
    assert sampler.control is not None
    return sampler, sampler.control


@pytest.mark.parametrize("rules", CASES, ids=lambda r: ",".join(r.given()))
def test_the_mean_of_the_gradient_stays_by_enumeration(rules: Rules) -> None:
    """Whatever the model believes: every pair of masks that a sample may have, weighted by its probability."""
    sampler, control = made(rules)
    masks = every(sampler)
    law = (masks @ sampler.logits).softmax(0)
    (exact,) = torch.autograd.grad(law @ a_loss(masks), sampler.logits, retain_graph=True)
    first, second = (i.flatten() for i in torch.meshgrid(*2 * [torch.arange(len(masks))], indexing="ij"))
    rows = masks[torch.stack([first, second], 1).flatten()]
    # Each pair counts as often as it is drawn.
    weights = (law[first] * law[second] * len(first)).detach().repeat_interleave(2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        noise = torch.randn(len(rows), generator=generator)
        sampler.observe(rows, a_loss(rows) + noise)
        log_prob = law.log()[torch.stack([first, second], 1).flatten()]
        total = sampler.surrogate(Draw(rows, weights * log_prob), a_loss(rows))
        (found,) = torch.autograd.grad(total, sampler.logits, retain_graph=True)
        assert torch.allclose(found, exact, atol=2e-5)
    assert control(masks).std() > 0.1  # it does believe something


def test_what_it_explains_is_no_noise() -> None:
    """What each block does is learned from a few steps, whatever level each sample has; then one step is exact."""
    sampler, control = made(Rules(keep=4))
    masks, does = every(sampler), torch.linspace(-1, 1, 8)

    plain, better = [], []
    twin = ScoreFunction(TWO_LISTS, Rules(keep=4), masks=2, entropy=(0.0, 0.0))
    twin.load_state_dict(sampler.state_dict(), strict=False)
    for step in range(60):
        draw = sampler.sample(32, tiny.Rng(0, "test", step))
        levels = torch.randn(16, generator=torch.Generator().manual_seed(step)).repeat_interleave(2) * 5
        loss = draw.mask @ does + levels
        better.append(torch.autograd.grad(sampler.surrogate(draw, loss), sampler.logits)[0])
        draw = twin.sample(32, tiny.Rng(0, "test", step))
        plain.append(torch.autograd.grad(twin.surrogate(draw, loss), twin.logits)[0])
        sampler.observe(draw.mask, loss)
    predicted, real = control(masks), (masks @ does).double()
    assert torch.allclose(predicted - predicted.mean(), real - real.mean(), atol=0.02)
    noise, left = (torch.stack(some[20:]).std(0).norm() for some in (plain, better))
    assert left < 0.1 * noise


def test_the_past_is_forgotten() -> None:
    control = ControlVariate(3, memory=2.0)
    masks = torch.tensor([[[1.0, 0, 0], [0, 1.0, 0]]]).expand(8, -1, -1)
    for sign in (1.0, -1.0):
        for _ in range(20):
            control.observe(masks, sign * torch.tensor([[1.0, 0.0]]).expand(8, -1))
        first, second = control(masks[0])
        assert float(first - second) == pytest.approx(sign, abs=0.1)


def test_a_stopped_search_goes_on_with_what_it_knew(tmp_path: Path) -> None:
    class Stops(Match):
        def prepare(self, batch, rng):
            if rng.stage == "search" and rng.step == 7 and not (tmp_path / "stopped").exists():
                (tmp_path / "stopped").touch()
                raise Interrupted("here", 2)
            return super().prepare(batch, rng)

    whole = search(CONTROLLED, steps=12)(task(), TRAINER)
    trainer, stopping = tiny.Trainer(batch_size=16, seed=0, checkpoint_every=3), task()
    stopping = tiny.Task(backbone=stopping.backbone, loss=Stops(), train=stopping.train, held_out=stopping.held_out)
    run = tiny.RunFolder(tmp_path / "run")
    with pytest.raises(Interrupted):
        search(CONTROLLED, steps=12)(stopping, trainer, run)
    again = search(CONTROLLED, steps=12)(stopping, trainer, run)
    assert [entry["step"] for entry in run.metrics("search")][-1] == 12
    assert again.marginals == whole.marginals
    plain = search(partial(ScoreFunction, rules=Rules(keep=4)), steps=12)(task(), TRAINER)
    assert plain.marginals != whole.marginals


def test_nothing_is_learned_from_a_step_that_is_not_finite() -> None:
    class Infinite(Match):
        def loss(self, prediction, inputs):
            return super().loss(prediction, inputs) / 0

    seen: list[Tensor] = []

    class Watched(ScoreFunction):
        def observe(self, masks: Tensor, losses: Tensor) -> None:
            seen.append(losses)

    planted = task()
    broken = tiny.Task(backbone=planted.backbone, loss=Infinite(), train=planted.train, held_out=planted.held_out)
    make = partial(Watched, rules=Rules(keep=4), control=True)
    with pytest.raises(tiny.UserError, match="not finite"):
        search(make, steps=4)(broken, TRAINER)
    assert not seen
    search(make, steps=4)(planted, TRAINER)
    assert [tuple(losses.shape) for losses in seen] == [(64,)] * 4  # the warm-up's too
