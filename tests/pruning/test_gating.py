"""The gated forward: exact, sparse, and gone without a trace."""

from __future__ import annotations

import copy
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from tinyfusion_core.errors import UserError
from tinyfusion_core.protocols.blocks.batch import named_batch_dims, probed_batch_dims
from tinyfusion_core.protocols.blocks.outputs import captured
from tinyfusion_core.protocols.blocks.paths import expand
from tinyfusion_core.protocols.blocks.streams import Stream
from tinyfusion_core.pruning.gating import Gates
from tinyfusion_core.testing.dense_formula import dense_formula
from toys import Block, DoubleNet, Net

pytestmark = pytest.mark.numerics

BATCH, TOKENS, WIDTH = 6, 5, 8
LISTS = ["first.*", "second.*"]


def make(batch: int = BATCH, tokens: int = TOKENS, **options):
    net = Net(WIDTH, **options)
    blocks = expand(net, LISTS)
    x, c = torch.randn(batch, tokens, WIDTH), torch.randn(batch, WIDTH)
    dims = probed_batch_dims(net, blocks, lambda n: net(torch.randn(n, tokens, WIDTH), torch.randn(n, WIDTH)))
    return net, blocks, dims, x, c


def dense(net: Net, blocks: list[str], mask: Tensor, x: Tensor, c: Tensor) -> Tensor:
    with dense_formula(net, blocks, mask):
        return net(x, c)


def some_masks(num_blocks: int) -> list[Tensor]:
    random = (torch.rand(BATCH, num_blocks) < 0.5).float()
    none_in_one, all_in_one, single = random.clone(), random.clone(), random.clone()
    none_in_one[:, 1], all_in_one[:, 3] = 0, 1
    single[:, 0], single[2, 0] = 0, 1
    return [random, none_in_one, all_in_one, single, torch.zeros(BATCH, num_blocks), torch.ones(BATCH, num_blocks)]


class TwoKinds(nn.Module):
    """A list of blocks with two streams, then one of blocks with a single stream of both."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = DoubleNet(WIDTH, depth=2)
        self.single = nn.ModuleList(Block(WIDTH) for _ in range(2))

    def forward(self, hidden: Tensor, encoder: Tensor) -> Tensor:
        x = self.pair(hidden, encoder)
        for block in self.single:
            x = block(x, encoder.mean(1))
        return x


def test_lists_may_have_streams_of_their_own() -> None:
    net = TwoKinds()
    blocks = expand(net, ["pair.blocks.*", "single.*"])
    streams = {"pair.blocks": (Stream("hidden", 1), Stream("encoder", 0)), "single": (Stream("x"),)}
    hidden, encoder = torch.randn(BATCH, TOKENS, WIDTH), torch.randn(BATCH, 3, WIDTH)
    dims = probed_batch_dims(net, blocks, lambda n: net(hidden[:n], encoder[:n]))
    plain = net(hidden, encoder)
    with Gates(net, blocks, dims, streams) as gates:
        gates.mask = torch.ones(BATCH, 4)
        assert torch.equal(net(hidden, encoder), plain)
        gates.mask = torch.tensor([1.0, 0, 1, 0]).repeat(BATCH, 1)
        gated = net(hidden, encoder)
    with captured(net, [blocks[0], blocks[3]], streams) as (first, last):
        net(hidden, encoder)
    assert [t.shape[1] for t in first] == [TOKENS, 3]
    assert [t.shape[1] for t in last] == [TOKENS + 3]
    del net.pair.blocks[1], net.single[1]
    assert torch.equal(net(hidden, encoder), gated)
    with pytest.raises(UserError, match="no streams are declared for the block list 'pair.blocks'"):
        Gates(net, blocks[:1], dims, {"single": (Stream("x"),)})


@pytest.mark.usefixtures("float64")
def test_in_inference_mode() -> None:
    net, blocks, dims, x, c = make()
    mask = some_masks(len(blocks))[0]
    with torch.inference_mode(), Gates(net, blocks, dims) as gates:
        gates.mask = mask
        out = net(x + 0, c + 0)
    assert torch.allclose(out, dense(net, blocks, mask, x, c), atol=1e-6)


@pytest.mark.parametrize("with_grad", [True, False])
def test_all_ones_is_the_plain_forward_bit_for_bit(with_grad: bool) -> None:
    net, blocks, dims, x, c = make()
    plain = net(x, c)
    with Gates(net, blocks, dims) as gates:
        gates.mask = torch.ones(BATCH, len(blocks), requires_grad=with_grad)
        assert torch.equal(net(x, c), plain)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("case", range(6))
@pytest.mark.parametrize("use_checkpoint", [False, True])
def test_gradients_equal_the_dense_formula(case: int, use_checkpoint: bool) -> None:
    net, blocks, dims, x, c = make(use_checkpoint=use_checkpoint)
    mask = some_masks(len(blocks))[case].requires_grad_()
    x.requires_grad_(), c.requires_grad_()
    inputs = [x, c, mask, *net.parameters()]
    weight = torch.randn(BATCH, TOKENS, WIDTH)
    plain = copy.deepcopy(net)
    plain.use_checkpoint = False
    expected_out = dense(plain, blocks, mask, x, c)
    expected = torch.autograd.grad((expected_out * weight).sum(), [x, c, mask, *plain.parameters()])
    with Gates(net, blocks, dims) as gates:
        gates.mask = mask
        out = net(x, c)
        grads = torch.autograd.grad((out * weight).sum(), inputs)
    assert torch.allclose(out, expected_out, atol=1e-6)
    for g, e in zip(grads, expected, strict=True):
        assert (g - e).abs().max() <= 1e-5 * max(1.0, float(e.abs().max()))


@pytest.mark.usefixtures("float64")
def test_without_mask_gradient_dropped_samples_are_not_run() -> None:
    net, blocks, dims, x, c = make()
    mask = some_masks(len(blocks))[0]
    mask[:, 1] = 0
    seen: dict[str, int] = {}
    originals = {path: net.get_submodule(path).forward for path in blocks}
    for path in blocks:

        def counting(*args, path=path, **kwargs):
            seen[path] = len(kwargs.get("x", args[0] if args else None))
            return originals[path](*args, **kwargs)

        counting.__signature__ = __import__("inspect").signature(originals[path])
        net.get_submodule(path).forward = counting
    with Gates(net, blocks, dims) as gates:
        gates.mask = mask
        out = net(x, c)
    for path in blocks:
        del net.get_submodule(path).__dict__["forward"]
    assert torch.allclose(out, dense(net, blocks, mask, x, c), atol=1e-6)
    assert seen == {path: max(1, int(mask[:, j].sum())) for j, path in enumerate(blocks)}


def test_a_block_that_nobody_keeps_has_zero_gradients_not_none() -> None:
    net, blocks, dims, x, c = make()
    for learning in (True, False):
        mask = torch.ones(BATCH, len(blocks))
        mask[:, 1] = 0
        net.zero_grad(set_to_none=True)
        with Gates(net, blocks, dims) as gates:
            gates.mask = mask.requires_grad_(learning)
            net(x, c).sum().backward()
        for p in net.first[1].parameters():
            assert p.grad is not None and not p.grad.any()
        assert all(p.grad is not None and p.grad.any() for p in net.first[0].parameters())


def test_hard_gated_equals_pruned() -> None:
    net, blocks, dims, x, c = make()
    mask = torch.tensor([1.0, 0, 1, 0, 1]).repeat(BATCH, 1)
    with Gates(net, blocks, dims) as gates:
        gates.mask = mask
        gated = net(x, c)
    del net.first[1], net.second[0]
    assert torch.equal(gated, net(x, c))


@pytest.mark.usefixtures("float64")
def test_two_streams_move_together() -> None:
    net = DoubleNet(WIDTH)
    blocks = expand(net, ["blocks.*"])
    image, text = torch.randn(BATCH, TOKENS, WIDTH), torch.randn(BATCH, 3, WIDTH)
    dims = probed_batch_dims(net, blocks, lambda n: net(torch.randn(n, TOKENS, WIDTH), torch.randn(n, 3, WIDTH)))
    streams = [Stream("hidden", 1), Stream("encoder", 0)]
    weight = torch.randn(BATCH, TOKENS + 3, WIDTH)
    mask = (torch.rand(BATCH, 3) < 0.5).float().requires_grad_()

    def formula() -> Tensor:
        h, e = image, text
        for j, block in enumerate(net.blocks):
            new_e, new_h = block(h, e)
            m = mask[:, j, None, None]
            h, e = h + m * (new_h - h), e + m * (new_e - e)
        return torch.cat([h, e], dim=1)

    expected = torch.autograd.grad((formula() * weight).sum(), [mask, *net.parameters()])
    with Gates(net, blocks, dims, streams) as gates:
        gates.mask = mask
        grads = torch.autograd.grad((net(image, text) * weight).sum(), [mask, *net.parameters()])
    for g, e in zip(grads, expected, strict=True):
        assert torch.allclose(g, e, atol=1e-5)


def test_undeclared_stream_is_refused() -> None:
    net = DoubleNet(WIDTH)
    blocks = expand(net, ["blocks.*"])
    image, text = torch.randn(2, TOKENS, WIDTH), torch.randn(2, 3, WIDTH)
    with Gates(net, blocks, named_batch_dims({"hidden": 0, "encoder": 0}), [Stream("hidden", 1)]) as gates:
        gates.mask = torch.tensor([[1.0, 1, 1], [0, 1, 1]])
        with pytest.raises(UserError, match="blocks.0.*tensor at 0.*'streams'"):
            net(image, text)


@pytest.mark.usefixtures("float64")
def test_batch_as_large_as_the_number_of_tokens() -> None:
    # A table of (tokens, width) looks batched when there are as many samples as tokens.
    net, blocks, dims, x, c = make(batch=TOKENS)
    mask = (torch.rand(TOKENS, len(blocks)) < 0.5).float()
    with Gates(net, blocks, dims) as gates:
        gates.mask = mask
        out = net(x, c)
    assert torch.allclose(out, dense(net, blocks, mask, x, c), atol=1e-6)


@pytest.mark.usefixtures("float64")
def test_named_batch_arguments() -> None:
    net, blocks, _, x, c = make()
    mask = torch.ones(BATCH, len(blocks))
    mask[::2, :3] = 0  # `rotary` of the second list holds a shared tensor, so only the first list is gated
    with Gates(net, blocks, named_batch_dims({"x": 0, "c": 0})) as gates:
        gates.mask = mask
        out = net(x, c)
    assert torch.allclose(out, dense(net, blocks, mask, x, c), atol=1e-6)
    mask[::2, 3:] = 0
    with Gates(net, blocks, named_batch_dims({"x": 0, "c": 0, "rotary.0": 0})) as gates:
        gates.mask = mask
        out = net(x, c)
    assert torch.allclose(out, dense(net, blocks, mask, x, c), atol=1e-6)


def test_an_argument_that_the_probe_has_not_seen_is_named() -> None:
    net, blocks, dims, x, c = make()
    with Gates(net, blocks, dims) as gates:
        gates.mask = torch.ones(BATCH, len(blocks))
        with pytest.raises(UserError, match=r"first\.0.*'rotary\.0'.*'batched'"):
            net.first[0](x, c, rotary=(c[:, None], c[:, None]))


def test_a_dimension_that_is_not_one_entry_per_sample_is_refused() -> None:
    net = Net(WIDTH)
    with pytest.raises(UserError, match="not one entry per sample"):
        probed_batch_dims(
            net, ["first.0"], lambda n: net.first[0](torch.randn(2 * n, TOKENS, WIDTH), torch.randn(2 * n, WIDTH))
        )


class Boom(RuntimeError):
    pass


@pytest.mark.parametrize("fail", [False, True])
def test_no_trace_on_exit(fail: bool) -> None:
    net, blocks, dims, x, c = make()
    marker = net.second[0].forward
    net.second[0].forward = marker  # somebody had taken this one over already
    before = {name: dict(m.__dict__) for name, m in net.named_modules()}
    keys = list(net.state_dict())
    try:
        with Gates(net, blocks, dims) as gates:
            gates.mask = torch.ones(BATCH, len(blocks))
            assert list(net.state_dict()) == keys
            net(x, c)
            if fail:
                raise Boom
    except Boom:
        pass
    assert {name: dict(m.__dict__) for name, m in net.named_modules()} == before
    assert net.second[0].__dict__["forward"] is marker
    assert type(net.first[0]) is Block


def test_under_autocast_gate_gradients_stay_close_to_float32() -> None:
    net, blocks, dims, x, c = make()
    mask = some_masks(len(blocks))[0]

    def gate_gradient(precision: torch.dtype | None) -> tuple[Tensor, Tensor]:
        leaf = mask.clone().requires_grad_()
        with Gates(net, blocks, dims) as gates:
            with torch.autocast("cpu", dtype=precision or torch.bfloat16, enabled=precision is not None):
                gates.mask = leaf
                out = net(x, c)
            out.float().square().sum().backward()
        assert leaf.grad is not None and leaf.grad.dtype == torch.float32
        return out.detach().float(), leaf.grad

    exact, low = gate_gradient(None), gate_gradient(torch.bfloat16)
    for a, b in zip(low, exact, strict=True):
        assert 0 < (a - b).abs().max() < 0.05 * b.abs().max()


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2, 3), r"\(B, 5\)"),
        (torch.full((BATCH, 5), 0.5), "zeros and ones"),
        (torch.ones(2, 5), "for 2 samples"),
    ],
)
def test_wrong_masks(mask: Tensor, message: str) -> None:
    net, blocks, dims, x, c = make()
    with Gates(net, blocks, dims) as gates, pytest.raises((ValueError, UserError), match=message):
        gates.mask = mask
        net(x, c)


def test_block_paths() -> None:
    net: nn.Module = Net()
    assert expand(net, LISTS) == ["first.0", "first.1", "first.2", "second.0", "second.1"]
    with pytest.raises(UserError, match="no module 'nowhere'"):
        expand(net, ["nowhere.*"])
    with pytest.raises(UserError, match=r"twice: first\.1"):
        expand(net, ["first.*", "first.1"])


class InPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.add_(1)


class Named(NamedTuple):
    hidden: Tensor
    extra: None


class Awkward(nn.Module):
    """Blocks with outputs that are easily got wrong."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([block])
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out = self.blocks[0](self.linear(x))
        if isinstance(out, tuple):
            out = out[0]
        out += 1  # a model may go on in place
        return out


class Returns(nn.Module):
    def __init__(self, make) -> None:
        super().__init__()
        self.inner, self.make = nn.Linear(WIDTH, WIDTH), make

    def forward(self, x: Tensor):
        return self.make(x + self.inner(x))


def run_awkward(block: nn.Module, mask: list[float]) -> Tensor:
    net = Awkward(block)
    with Gates(net, ["blocks.0"], named_batch_dims({"x": 0})) as gates:
        gates.mask = torch.tensor(mask)[:, None].requires_grad_()
        out = net(torch.randn(len(mask), TOKENS, WIDTH))
        out.square().sum().backward()
        assert gates.mask.grad is not None
    return out


@pytest.mark.parametrize("mask", [[1.0, 1.0], [1.0, 0.0], [0.0, 0.0], [0.0], [1.0]])
def test_tuples_named_or_not_and_models_that_go_on_in_place(mask: list[float]) -> None:
    for make in (lambda y: y, lambda y: (y, None), lambda y: Named(y, None)):
        torch.manual_seed(1)
        out = run_awkward(Returns(make), mask)
        torch.manual_seed(1)
        assert torch.equal(out, run_awkward(Returns(lambda y: y), mask))


def test_outputs_that_gating_cannot_split_are_refused() -> None:
    with pytest.raises(UserError, match="returns no tensor at 0; see 'streams'"):
        run_awkward(Returns(lambda y: {"hidden": y}), [1.0, 0.0])
    with pytest.raises(UserError, match="returns a set; gating takes a tensor, a tuple or a mapping"):
        run_awkward(Returns(lambda y: {y}), [1.0, 0.0])
    with pytest.raises(UserError, match="tensor at 1 that is no declared stream"):
        run_awkward(Returns(lambda y: (y, (y, y))), [1.0, 0.0])
    with pytest.raises(UserError, match="in place"):
        run_awkward(InPlace(), [0.0])


def test_weight_gradients_under_autocast_equal_the_dense_formula() -> None:
    net, blocks, dims, x, c = make()
    mask = some_masks(len(blocks))[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = torch.autograd.grad(dense(net, blocks, mask, x, c).float().square().sum(), list(net.parameters()))
    with Gates(net, blocks, dims) as gates, torch.autocast("cpu", dtype=torch.bfloat16):
        gates.mask = mask.clone().requires_grad_()
        grads = torch.autograd.grad(net(x, c).float().square().sum(), list(net.parameters()))
    for g, e in zip(grads, expected, strict=True):
        assert (g - e).abs().max() <= 0.05 * e.abs().max()
