"""Streams whose samples are not first, and layers that share what is in a mapping."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tinyfusion_core as tiny
from tinyfusion_core.errors import UserError
from tinyfusion_core.protocols.blocks.batch import probed_batch_dims
from tinyfusion_core.pruning.gating import Gates
from tinyfusion_core.testing.dense_formula import dense_formula

pytestmark = pytest.mark.numerics

BATCH, TOKENS, WIDTH, COPIES = 5, 4, 8, 3
BLOCKS = [f"layers.{i}" for i in range(3)]
SECOND = (tiny.Stream(batch_dim=1),)


class TokensFirst(nn.Module):
    """A network of PyTorch's own layers, as they are by default: (tokens, batch, width)."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, **options) for _ in BLOCKS)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(0))


class SeveralCopies(nn.Module):
    """A stream of several copies, (copies, batch, tokens, width), each layer returns it in a tuple."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix, self.inside = nn.Linear(COPIES, COPIES), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> tuple[Tensor, None]:
            mixed = torch.einsum("cbtd,ck->kbtd", x, self.mix.weight)
            return mixed + self.inside(mixed[0]).tanh(), None

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.Layer() for _ in BLOCKS)

    def forward(self, x: Tensor) -> Tensor:
        stream = torch.stack([x * (i + 1) for i in range(COPIES)])
        for layer in self.layers:
            stream, _ = layer(stream)
        return stream.sum((0, 2))


NETWORKS = [TokensFirst, SeveralCopies]


@pytest.mark.parametrize("network", NETWORKS)
def test_the_samples_may_be_second(network: type[nn.Module]) -> None:
    net, x = network().eval(), torch.randn(BATCH, TOKENS, WIDTH)
    dims = probed_batch_dims(net, BLOCKS, lambda n: net(x[:n]))
    mask = torch.tensor([[1.0, 0, 1], [0, 1, 0], [1, 1, 1], [0, 0, 0], [1, 0, 1]], requires_grad=True)
    x.requires_grad_()
    inputs = [mask, x, *net.parameters()]
    with dense_formula(net, BLOCKS, mask, SECOND):
        expected = net(x)
        gradients = torch.autograd.grad(expected.square().sum(), inputs, allow_unused=True)
    with Gates(net, BLOCKS, dims, SECOND) as gates:
        gates.mask = mask
        found = net(x)
        ours = torch.autograd.grad(found.square().sum(), inputs, allow_unused=True)
        with torch.no_grad():
            gates.mask = torch.zeros(BATCH, 3).index_fill(1, torch.tensor([0, 2]), 1)
            gated = [net(x), net(x)]  # the second time the form of what is skipped is known
    assert torch.allclose(found, expected, atol=1e-5)
    for one, other in zip(ours, gradients, strict=True):
        assert (one is None and other is None) or torch.allclose(one, other, atol=1e-4)
    del net.layers[1]
    assert all(torch.allclose(net(x), again, atol=1e-6) for again in gated)


@pytest.mark.parametrize("network", NETWORKS)
def test_a_network_whose_samples_are_second_is_pruned_and_recovered(network: type[nn.Module]) -> None:
    data = {"x": torch.randn(32, TOKENS, WIDTH)}
    net = network()

    def losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(batch["x"]).square().mean(-1)

    trainer = tiny.Trainer(precision="fp32", batch_size=4)
    task = tiny.wrap(net, blocks="layers.*", loss_fn=losses, data=data, streams=SECOND)
    for selector in (tiny.Search(keep=2, steps=2, update=tiny.Full()), tiny.BlockInfluence(keep=2, samples=8)):
        decision = selector(task, trainer)
        student = tiny.prune(task, decision)
        assert len(student.layers) == 2
    tiny.Recover(steps=2, ema=0.0)(task, student, decision, trainer)


def test_a_message_says_how_to_name_the_dimension() -> None:
    net = TokensFirst()
    task = tiny.wrap(net, blocks="layers.*", loss_fn=lambda m, b: m(b["x"]).mean(-1), data={"x": torch.randn(8, 4, 8)})
    with pytest.raises(UserError, match=r"given 4 along .* for 2 samples; .* as in Stream\(batch_dim=1\)"):
        tiny.Search(keep=2, steps=1, update=tiny.Frozen())(task, tiny.Trainer(batch_size=2))


class Sharing(nn.Module):
    """Layers that write to a mapping, or read from it what an earlier one wrote, as layers that share keys do."""

    class Layer(nn.Module):
        def __init__(self, writes: bool) -> None:
            super().__init__()
            self.inside, self.writes = nn.Linear(WIDTH, WIDTH), writes

        def forward(self, x: Tensor, shared: Any) -> Tensor:
            if self.writes:
                shared["keys"] = (self.inside(x),)
            return x + shared["keys"][0].tanh() * self.inside(x)

    def __init__(self, kind: type[Any]) -> None:
        super().__init__()
        self.layers, self.kind = nn.ModuleList(self.Layer(i == 0) for i in range(3)), kind

    def forward(self, x: Tensor) -> Tensor:
        shared = self.kind()
        for layer in self.layers:
            x = layer(x, shared)
        return x


@pytest.mark.parametrize("kind", [dict, UserDict])
def test_layers_read_the_rows_of_what_is_shared(kind: type[Any]) -> None:
    net, x = Sharing(kind), torch.randn(BATCH, TOKENS, WIDTH)
    dims = probed_batch_dims(net, BLOCKS, lambda n: net(x[:n]))
    mask = torch.tensor([[1.0, 0, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 0, 1]], requires_grad=True)
    with dense_formula(net, BLOCKS, mask):
        expected = net(x)
        (gradient,) = torch.autograd.grad(expected.square().sum(), mask)
    with Gates(net, BLOCKS, dims) as gates:
        gates.mask = mask
        found = net(x)
        (ours,) = torch.autograd.grad(found.square().sum(), mask)
        assert torch.allclose(found, expected, atol=1e-6)
        assert torch.allclose(ours[:, 1:], gradient[:, 1:], atol=1e-5)
        gates.mask = torch.tensor([[1.0, 1, 1], [0, 1, 1], [1, 1, 1], [1, 1, 1], [1, 1, 1]])
        with pytest.raises(UserError, match=r"'layers.0' changes its input in place \(shared\)"):
            net(x)


def test_a_block_whose_samples_are_second_is_refitted() -> None:
    net, x = TokensFirst(norm_first=True), torch.randn(32, TOKENS, WIDTH)
    task = tiny.wrap(
        net, blocks="layers.*", loss_fn=lambda m, b: m(b["x"]).square().mean(-1), data={"x": x}, streams=SECOND
    )
    trainer = tiny.Trainer(precision="fp32", batch_size=4)
    decision = tiny.Keep([0, 2])(task, trainer)
    pruned, refitted = tiny.prune(task, decision), tiny.prune(task, decision)
    tiny.Recover(steps=0, ema=0.0, start=tiny.Refit(samples=16, batch_size=8))(task, refitted, decision, trainer)
    with torch.no_grad():
        error, before = ((student(x) - net(x)).square().mean() for student in (refitted, pruned))
    assert error < 0.5 * before
