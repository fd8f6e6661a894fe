"""Masks that share what they begin with give what plain passes give, bit for bit, and run fewer blocks."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from criteria_tasks import TRAINER, Linear, scalars
from marks import slow_but
from prefix_nets import NETS, ROWS, TOKENS, WIDTH, Stack, gates_of, inputs_of, masks_of, runs
from tinyfusion_core.pruning.gating import Gates
from tinyfusion_core.pruning.prefixes import Prefixes
from tinyfusion_core.selection.criteria.calibration import Calibration
from tinyfusion_core.selection.criteria.sensitivity import Greedy, LeaveOneOut

pytestmark = pytest.mark.numerics


def plainly(net: nn.Module, gates: Gates, masks: Tensor, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    found = []
    with torch.no_grad(), gates:
        for mask in [torch.ones(len(gates.blocks)), *masks]:
            gates.mask = mask.expand(ROWS, -1)
            found.append(net(*inputs))
    return found[1:]


def shared(prefixes: Prefixes, net: nn.Module, masks: Tensor, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    with torch.no_grad(), prefixes.gates:
        found = dict(prefixes.evaluate(masks, ROWS, lambda: net(*inputs)))
    return [found[i] for i in range(len(masks))]


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("autocast", slow_but([False, True], False))
def test_what_masks_share_changes_no_bit(name: str, autocast: bool) -> None:
    net = NETS[name]().eval()
    out = "x" if "mappings" in name else 0
    masks = masks_of(net, gates_of(net, out))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        prefixes = Prefixes(gates_of(net, out))
        for _ in range(2):  # batches
            inputs = inputs_of(net)
            expected = plainly(net, gates_of(net, out), masks, inputs)
            assert len({float(t.double().sum()) for t in expected}) > len(expected) / 3
            assert all(map(torch.equal, shared(prefixes, net, masks, inputs), expected))


@pytest.mark.parametrize(
    ("name", "again"),
    [
        ("plain", 0),
        ("tuples", 0),
        ("lists that take turns", 0),
        ("in place after one block", 16 - 4),  # block 2, in each of the masks that keep it
        ("in place after every block", 80 - 31),
    ],
)
def test_every_beginning_is_run_once(name: str, again: int) -> None:
    net = NETS[name]().eval()
    prefixes, masks = Prefixes(gates_of(net)), masks_of(net, gates_of(net))
    inputs = inputs_of(net)
    shared(prefixes, net, masks, inputs)  # the first time a pass is run again
    # The beginnings of 32 masks that end with a kept block: 1 + 2 + 4 + 8 + 16.
    assert runs(lambda: shared(prefixes, net, masks, inputs)) == 31 + again


def test_what_does_not_fit_is_computed_again_and_said_once() -> None:
    net = NETS["plain"]().eval()
    masks, inputs, size = masks_of(net, gates_of(net)), inputs_of(net), ROWS * TOKENS * WIDTH * 4
    expected = plainly(net, gates_of(net), masks, inputs)
    counted = []
    for room in (5, 2, 0):
        prefixes = Prefixes(gates_of(net), most_bytes=room * size + size // 2)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for _ in range(2):
                counted.append(runs(lambda: shared(prefixes, net, masks, inputs)))  # noqa: B023
        assert [str(w.message)[:31] for w in said] == ["the outputs of 5 blocks do not "] * (room < 5)
        assert all(map(torch.equal, shared(prefixes, net, masks, inputs), expected))
    whole, two, none = counted[1::2]
    assert (whole, none) == (31, 80)
    # With room for two: the first two kept blocks of a beginning are there, later ones run in every mask.
    kept = [(tuple(mask[: j + 1]), sum(mask[:j])) for mask in masks.tolist() for j in range(5) if mask[j]]
    assert two == len({beginning for beginning, others in kept if others < 2}) + sum(others >= 2 for _, others in kept)


class Whispers(Stack):
    """Blocks that a block hands something on to, or the network, where nobody sees it."""

    def __init__(self, writer: int, reader: int | None) -> None:
        super().__init__(lambda i, x: x)
        self.heard: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            block.make = self.write if i == writer else self.read if i == reader else block.make

    def write(self, y: Tensor) -> Tensor:
        self.heard.append(y.mean())
        return y

    def read(self, y: Tensor) -> Tensor:
        return y + sum(self.heard)

    def forward(self, x: Tensor) -> Tensor:
        self.heard.clear()
        return super().forward(x) + len(self.heard)


@pytest.mark.parametrize(("writer", "reader"), [(0, None), (3, None), (0, 1), (1, 2), (1, 4), (3, 4)])
def test_blocks_that_tell_each_other_something_unseen_share_nothing(writer: int, reader: int | None) -> None:
    net = Whispers(writer, reader).eval()
    masks, inputs = masks_of(net, gates_of(net)), inputs_of(net)
    expected, prefixes = plainly(net, gates_of(net), masks, inputs), Prefixes(gates_of(net))
    with pytest.warns(UserWarning, match="masks share no computation"):
        assert all(map(torch.equal, shared(prefixes, net, masks, inputs), expected))
    assert runs(lambda: shared(prefixes, net, masks, inputs)) == 80  # and says nothing again
    assert all(map(torch.equal, shared(prefixes, net, masks, inputs), expected))


def test_a_result_that_is_no_number_is_like_itself() -> None:
    net = NETS["plain"]().eval()
    masks, inputs = masks_of(net, gates_of(net)), (torch.full((ROWS, TOKENS, WIDTH), torch.nan),)
    prefixes = Prefixes(gates_of(net))
    shared(prefixes, net, masks, inputs)
    assert runs(lambda: shared(prefixes, net, masks, inputs)) == 31


def test_gradients_are_not_shared_and_no_output_is_held_afterwards() -> None:
    net = NETS["plain"]().eval()
    prefixes, inputs = Prefixes(gates_of(net)), inputs_of(net)
    shared(prefixes, net, torch.ones(2, 5), inputs)
    assert not prefixes._calls
    with prefixes.gates:
        for _, out in prefixes.evaluate(torch.ones(3, 5), ROWS, lambda: net(*inputs)):
            net.zero_grad()
            out.sum().backward()
            assert all(p.grad is not None and p.grad.any() for p in net.parameters())


def count_of(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each call of a block of `scalars` ran."""
    ran: list[int] = []
    plain = Linear.forward

    def counted(self: Linear, x: Tensor) -> Tensor:
        ran.append(len(x))
        return plain(self, x)

    monkeypatch.setattr(Linear, "forward", counted)
    return ran


@pytest.mark.slow
def test_greedy_and_leave_one_out_run_half_of_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    task = scalars(*(1 + 0.1 * torch.randn(28)).tolist(), x=(0.5, 1, 2, 3), target=1.0)
    ran = count_of(monkeypatch)
    assert LeaveOneOut(keep=14)(task, TRAINER).provenance["evaluations"] == 4 * 29
    # All blocks twice: in the first pass, and half by half when it is tried again. Plainly 28 + 28 * 27.
    assert ran.count(4) == 28 + 28 * 27 // 2 + 28
    ran.clear()
    assert Greedy(keep=14)(task, TRAINER).provenance["evaluations"] == 4 * sum(range(15, 29))
    # In every round of m blocks: the beginnings of m - 1 blocks, and after each the rest. Plainly m * (m - 1): 6,398.
    assert ran.count(4) == sum(m - 1 + m * (m - 1) // 2 for m in range(15, 29)) + 27 == 3513
    assert ran.count(1) == 1  # the last block, which the first mask drops: the form of its output


def test_batches_and_calls_share_what_was_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    task = scalars(*torch.linspace(0.5, 1.5, 8).tolist(), x=(0.5, 1, 2, 3), target=1.0)
    calibration, masks = Calibration(task, TRAINER, 4, 2), 1 - torch.eye(8)
    expected = [Calibration(task, TRAINER, 4, 2).losses(mask[None])[0] for mask in masks]
    ran = count_of(monkeypatch)
    assert calibration.losses(masks) == expected
    assert calibration.losses(masks[:1]) == expected[:1]
    first = len(ran)
    assert calibration.losses(masks.flip(0)) == expected[::-1]
    assert len(ran) - first == 2 * (7 + 28)
