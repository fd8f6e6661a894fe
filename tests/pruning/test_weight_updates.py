"""What is trained beside the gates: its size, and that it is gone afterwards."""

from __future__ import annotations

import pytest
import torch

import tinyfusion_core as tiny
from planted_search import TRAINER, search, task
from tinyfusion_core.samplers.grouped import GroupedSampler
from toys import Chain


@pytest.mark.numerics
@pytest.mark.parametrize(("rank", "alpha"), [(2, 6.0), (4, 4.0)])
def test_lora_adds_alpha_over_rank_times_its_product(rank: int, alpha: float) -> None:
    model, x = Chain(8, (1.0, 1.0)), torch.randn(5, 8)
    weight, bias = model.blocks[0].linear.weight.detach().clone(), model.blocks[0].linear.bias.detach().clone()
    with tiny.LoRA(rank=rank, alpha=alpha).applied(model, ["blocks.0", "blocks.1"]) as parameters, torch.no_grad():
        assert sorted(p.shape for p in parameters) == sorted([(rank, 8), (8, rank)] * 2)
        for p in parameters:
            p.normal_()
        down, up = parameters[:2]  # of the first block
        expected = x @ (weight + alpha / rank * up @ down).T + bias
        assert torch.allclose(model.blocks[0].linear(x), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(model.blocks[0].linear.weight, weight)


def test_the_weights_of_a_full_update_come_back_bit_for_bit() -> None:
    model = Chain(8, (1.0, 1.0))
    before = [p.detach().clone() for p in model.parameters()]
    with tiny.Full().applied(model, ["blocks.0", "blocks.1"]) as parameters, torch.no_grad():
        assert len(parameters) == len(before)
        for p in parameters:
            p.add_(1 / 3)
    assert all(map(torch.equal, model.parameters(), before))


def test_gates_do_not_decay() -> None:
    """Where no block does anything gates have no gradient, so that only decay could move them."""
    how = search(lambda lists: GroupedSampler(lists, (1, 2), initial=0.5), steps=3, update=tiny.Full())
    still = tiny.Search(**{**vars(how), "weight_decay": 0.5, "lr_gates": 0.1, "lr": 0.1, "warmup": 0.0})
    learned = still.learn(task((0.0,) * 8), TRAINER)
    assert all((logits == 0.5).all() for logits in learned.sampler.parameters())
