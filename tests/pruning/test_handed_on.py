"""What blocks take and return beside their streams: entries for each head of a sample, things handed on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tinyfusion_core.errors import UserError
from tinyfusion_core.protocols.blocks.batch import probed_batch_dims
from tinyfusion_core.pruning.gating import Gates
from tinyfusion_core.pruning.weight_update import LoRA

HEADS, WIDTH = 2, 4
MASK = torch.tensor([[1.0, 0, 1, 0], [1, 1, 0, 1], [1, 1, 1, 1], [1, 0, 0, 0], [1, 0, 0, 1]])


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.route = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, bias: Tensor, routes: Tensor | None = None) -> tuple[Tensor, Tensor]:
        routes = self.route(x) if routes is None else self.route(x) + routes
        by_head = x.reshape(-1, WIDTH // HEADS) * bias  # (B * heads, width of a head)
        return x + torch.tanh(self.inner(by_head.view(-1, WIDTH)) + routes), routes


class Net(nn.Module):
    def __init__(self, by_head: bool = False) -> None:
        super().__init__()
        self.blocks, self.by_head = nn.ModuleList(Block() for _ in range(4)), by_head

    def forward(self, x: Tensor, bias: Tensor, alone: Tensor | None = None) -> Tensor:
        """(B, width) samples with a number for each head, (B, heads)."""
        routes, flat = None, (bias.T if self.by_head else bias).reshape(-1, 1)
        for block, kept in zip(self.blocks, [True] * 4 if alone is None else alone.bool().tolist(), strict=True):
            if kept:
                x, routes = block(x, flat, routes)
        return x


def example(num_rows: int) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    rows = torch.randn(8, WIDTH + HEADS, generator=rng)[:num_rows]
    return rows[:, :WIDTH], rows[:, WIDTH:]


PATHS = [f"blocks.{i}" for i in range(4)]


def test_a_skipped_block_hands_on_what_it_was_given() -> None:
    net = Net().double()
    x, bias = (t.double() for t in example(len(MASK)))
    dims = probed_batch_dims(net, PATHS, lambda n: net(*(t.double() for t in example(n))))
    expected = torch.cat([net(x[i : i + 1], bias[i : i + 1], MASK[i]) for i in range(len(MASK))])
    weights = torch.autograd.grad(expected.square().sum(), list(net.parameters()))
    mask = MASK.double().requires_grad_()
    for some in (MASK.double(), mask):
        with Gates(net, PATHS, dims, unneeded={1: ("elsewhere", "routes")}) as gates:
            gates.mask = some
            found = net(x, bias)
            assert torch.allclose(found, expected)
            grads = torch.autograd.grad(found.square().sum(), [*net.parameters(), *([mask] if some is mask else [])])
        assert all(map(torch.allclose, grads, weights))
    few = torch.tensor([1.0, 0, 0, 1], dtype=torch.float64)
    expected = net(x, bias, few)
    with torch.no_grad(), Gates(net, PATHS, dims, unneeded={1: ("elsewhere", "routes")}) as gates:
        gates.mask = few.repeat(len(MASK), 1)
        assert torch.allclose(net(x, bias), expected)


def test_without_its_argument_it_is_nobodys() -> None:
    net = Net()
    dims = probed_batch_dims(net, PATHS, lambda n: net(*example(n)))
    with torch.no_grad(), Gates(net, PATHS, dims, unneeded={1: ("elsewhere",)}) as gates:
        gates.mask = MASK
        assert net(*example(len(MASK))).shape == (5, WIDTH)


def test_entries_of_a_sample_that_do_not_stand_together_are_refused() -> None:
    net = Net(by_head=True)
    with pytest.raises(UserError, match=r"'bias': \[4, 1\] for a batch of 2 and \[6, 1\] for 3 is not one entry per"):
        probed_batch_dims(net, PATHS, lambda n: net(*example(n)))


class Router(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x).topk(2)


class Reading(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.called, self.read, self.router = nn.Linear(4, 4), nn.Linear(4, 4), Router(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        values, _ = self.router(x)
        return self.called(x.to(self.called.weight.dtype)) @ self.read.weight + values.sum()


def test_lora_adapts_the_layers_that_are_called_and_plain() -> None:
    net = nn.Sequential(nn.ModuleList([Reading()]))
    with LoRA().applied(net, ["0.0"]):
        adapted = {name.rpartition(".lora_A")[0] for name, _ in net.named_parameters() if ".lora_A" in name}
        assert adapted == {"0.0.called"}
        net[0][0](torch.ones(2, 4)).sum().backward()


class Biased(nn.Module):
    """The first block makes a bias for all samples, which the others are given and hand on."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.inner, self.make = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH) if first else None

    def forward(self, x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if bias is None:
            bias = x.new_zeros(1, WIDTH) if self.make is None else self.make(x.new_ones(1, WIDTH))
        return x + torch.tanh(self.inner(x) + bias), bias


class BiasedNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Biased(i == 0) for i in range(4))

    def forward(self, x: Tensor, alone: Tensor | None = None) -> Tensor:
        """(B, width) samples, and the blocks that run; without the first there is no bias."""
        bias = None
        for block, kept in zip(self.blocks, [True] * 4 if alone is None else alone.bool().tolist(), strict=True):
            if kept:
                x, bias = block(x, bias)
        return x


def test_what_all_samples_share_is_handed_on_as_it_is() -> None:
    net = BiasedNet().double()
    x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0)).double()
    dims = probed_batch_dims(net, PATHS, lambda n: net(x[:n]))
    assert dims("blocks.1", "bias") is None
    masks = torch.tensor([[1.0, 0, 1, 0], [1, 1, 0, 1], [1, 1, 1, 1], [1, 0, 0, 0], [1, 0, 0, 1]]).double()
    expected = torch.cat([net(x[i : i + 1], masks[i]) for i in range(5)])
    weights = torch.autograd.grad(expected.square().sum(), list(net.parameters()))
    mask = masks.clone().requires_grad_()
    with Gates(net, PATHS, dims, unneeded={1: ("bias",), 2: ("bias",)}) as gates:  # nothing is returned at 2
        for some in (masks, mask):
            gates.mask = some
            found = net(x)
            assert torch.allclose(found, expected)
            grads = torch.autograd.grad(found.square().sum(), [*net.parameters(), *([mask] if some is mask else [])])
            assert all(map(torch.allclose, grads, weights))
        with torch.no_grad():
            for row in masks:
                gates.mask = row.repeat(5, 1)
                assert torch.allclose(net(x), net(x, row))
            gates.mask = torch.tensor([[0.0, 1, 1, 0]]).double().repeat(5, 1)
            for _ in range(2):  # the second time nothing of the first block is run
                bias = net.blocks[0].make(x.new_ones(1, WIDTH))
                assert torch.allclose(net(x), net.blocks[2](net.blocks[1](x, bias)[0], bias)[0])
