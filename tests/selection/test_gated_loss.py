"""The objective of a search: whose streams a mask is drawn from, when it is sure enough, where its schedules end."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

import tinyfusion_core as tiny
from planted_search import TRAINER, task
from tinyfusion_core.pruning.gating import Gates
from tinyfusion_core.samplers.base import BlockSampler, Draw
from tinyfusion_core.samplers.constraints import Rules
from tinyfusion_core.samplers.grouped import GroupedSampler
from tinyfusion_core.samplers.subset import ScoreFunction
from tinyfusion_core.selection.learning.gated_loss import GatedLoss
from toys import Chain, Match


@pytest.mark.parametrize("kind", [ScoreFunction, GroupedSampler])
def test_passes_over_parts_of_a_batch_draw_the_masks_of_the_whole(kind: type[BlockSampler]) -> None:
    def masks(micro: int | None) -> Tensor:
        seen: list[Tensor] = []

        class Watched(kind):
            def sample(self, num_rows: int, rng: tiny.Rng) -> Draw:
                draw = super().sample(num_rows, rng)
                seen.append(draw.mask.detach().clone())
                return draw

        made = {ScoreFunction: partial(Watched, rules=Rules(keep=4), masks=2), GroupedSampler: Watched}[kind]
        trainer = replace(TRAINER, micro_batch_size=micro)
        tiny.Search(sampler=made, steps=1, update=tiny.Frozen())(task(), trainer)
        assert len(seen) == 16 // (micro or 16)
        return torch.cat(seen)

    whole = masks(None)
    assert torch.equal(masks(4), whole)
    assert len(whole.unique(dim=0)) > 4


def test_the_averaged_sampler_decides_as_it_is_after_the_last_step() -> None:
    """Also where the first step is the last, whose schedules are at their begin."""
    how = tiny.Search(pattern=(2, 4), steps=1, tau=(3.0, 0.5), scaling=(1.0, 20.0), update=tiny.Frozen())
    learned = how.learn(task(), TRAINER)
    assert isinstance(learned.sampler, GroupedSampler)
    assert (learned.sampler.tau, learned.sampler.scaling) == (0.5, 20.0)
    started = tiny.Search(keep=4, steps=1, start=tiny.LastN(keep=4), prior=(2.0, 0.25), update=tiny.Frozen())
    assert started.learn(task(), TRAINER).sampler.prior == 0.25


def objective(averaged: BlockSampler, confident: float | None = None, warmup: float = 0.0) -> GatedLoss:
    model = Chain(8, (1.0, 1.0, 1.0, 1.0))
    gates = Gates(model, [f"blocks.{i}" for i in range(4)], lambda path, leaf: 0)
    samplers = GroupedSampler(averaged.lists, (1, 2)), averaged
    return GatedLoss(model, Match(), samplers, gates, steps=11, warmup=warmup, dropped_values=1.0, confident=confident)


def test_a_search_is_as_sure_as_its_least_certain_choice() -> None:
    averaged = GroupedSampler({"blocks": 4}, (1, 2), scaling=(1.0, 1.0))
    search = objective(averaged, confident=0.8, warmup=0.5)
    search.before_step(1.0)
    with torch.no_grad():
        averaged.logits[0].copy_(torch.tensor([5.0, 0.0]))
        assert not search.finished()  # of the second group nothing is known
        averaged.logits[1].copy_(torch.tensor([0.0, 1.3]))
        assert not search.finished()  # 0.79
        averaged.logits[1].copy_(torch.tensor([0.0, 1.5]))
    assert search.finished()  # 0.82
    search.before_step(0.4)
    assert not search.finished(), "during the warm-up nothing has been learned"


def test_schedules_begin_when_the_gates_do() -> None:
    averaged = GroupedSampler({"blocks": 4}, (1, 2), scaling=(1.0, 3.0))
    search = objective(averaged, warmup=0.5)
    found = []
    for step in (0, 4, 5, 10):
        search.before_step(step / 10)
        found.append((search.num_steps, search.learning, averaged.scaling, search.temperatures["scaling"]))
    own = search.sampler.scaling_schedule
    ends = [(1, False, 1.0, own[0]), (5, False, 1.0, own[0]), (6, True, 1.0, own[0]), (11, True, 3.0, own[1])]
    assert found == ends


def test_gates_that_wait_have_a_gradient_of_zero_not_none() -> None:
    """Else it would count in the norm by which the gradient of the weights is clipped; processes wait for one."""
    search = objective(GroupedSampler({"blocks": 4}, (1, 2)), warmup=0.5)
    inputs = Match().prepare({"x": torch.randn(6, 8)}, tiny.Rng(0, "search"))
    for progress, moves in ((0.0, False), (1.0, True)):
        search.zero_grad()
        with search.unregistered[2]:
            search.before_step(progress)
            loss, losses = search(inputs, tiny.Rng(0, "search"))
            loss.backward()
        assert [bool(gate.grad.any()) for gate in search.gates] == [moves] * 2
        assert all(p.grad is not None and p.grad.any() for p in search.model.parameters())
        assert loss.item() == pytest.approx(losses.mean().item())
