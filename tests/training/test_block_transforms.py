"""Blocks that are run in another way while a context is open: the same numbers, and no trace of it afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tinyfusion_core.pruning.gating import Gates
from tinyfusion_core.training.block_transforms import block_transforms
from toys import Chain


class Counted(nn.Module):
    """x + tanh(linear(x)), and how often it has run."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.runs = nn.Linear(8, 8), 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return x + torch.tanh(self.linear(x))


def chain() -> Chain:
    model = Chain(8, ())
    model.blocks.extend(Counted() for _ in range(3))
    return model


def test_recomputed_blocks_run_once_more_and_give_the_same_gradients() -> None:
    model, x = chain(), torch.randn(4, 8)
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    for recompute, runs in ((True, 2), (False, 1)):
        for block in model.blocks:
            block.runs = 0
        with (
            block_transforms(model.blocks, recompute=recompute, compiled=False),
            Gates(model, [f"blocks.{i}" for i in range(3)], lambda path, leaf: 0) as gates,
        ):
            gates.mask = torch.ones(4, 3)
            found = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
        assert [block.runs for block in model.blocks] == [runs] * 3
        assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("fail", [False, True])
def test_the_forward_of_before_comes_back(fail: bool) -> None:
    model = chain()
    taken = model.blocks[1].forward
    model.blocks[1].forward = taken  # somebody else had taken this one over already
    with pytest.raises(KeyError) if fail else torch.no_grad(), block_transforms(model.blocks, True, False):
        assert all(block.__dict__["forward"] is not taken for block in model.blocks)
        if fail:
            raise KeyError
    assert ["forward" in block.__dict__ for block in model.blocks] == [False, True, False]
    assert model.blocks[1].__dict__["forward"] is taken
