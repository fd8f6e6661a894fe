"""Checks of a network under gates: masking a block equals removing it, and gradients are right."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ...protocols.blocks.paths import block_lists
from ..assertions import expect, expect_close, expect_same, largest, tensors_of
from ..dense_formula import dense_formula
from ..subject import NUM_ROWS, Subject, precisely, random_mask


def check_all_ones_is_plain(subject: Subject) -> None:
    """Gated with a mask of ones the network gives the same output as without gates, bit for bit."""
    model, inputs = subject.backbone.build(), subject.inputs()
    plain = subject.loss.losses(model, inputs)
    with subject.gates(model) as gates:
        for learning in (False, True):
            gates.mask = torch.ones(NUM_ROWS, len(gates.blocks)).requires_grad_(learning)
            gated = subject.loss.losses(model, inputs)
            expect(
                torch.equal(gated, plain), f"losses are {gated.tolist()} under a mask of ones, {plain.tolist()} without"
            )


def check_hard_gated_is_pruned(subject: Subject) -> None:
    """Masking blocks equals removing them with `after_prune`: each one alone, and every second one."""
    model, inputs = subject.backbone.build(), subject.inputs()
    lists = block_lists(subject.backbone.unit_paths(model)).values()
    alone = [[i] for members in lists if len(members) > 1 for i in members]
    for removed in [*alone, subject.every_other()]:
        with subject.gates(model) as gates, torch.no_grad():
            mask = torch.ones(NUM_ROWS, len(gates.blocks))
            mask[:, removed] = 0
            gates.mask = mask
            gated = subject.loss.predict(model, inputs)
        with torch.no_grad():
            pruned = subject.loss.predict(subject.pruned(removed), inputs)
        message = f"the network without blocks {removed} predicts otherwise than one that skips them"
        for a, b in zip(tensors_of(gated), tensors_of(pruned), strict=True):
            expect_close(a, b, 1e-5, message, size=largest(b))


def check_state_dict_untouched(subject: Subject) -> None:
    """Gates change no key and no value of the state dict, while they are open and after an exception."""
    model, inputs = subject.backbone.build(), subject.inputs()
    before = copy.deepcopy(model.state_dict())
    forwards = {name: m.__dict__.get("forward") for name, m in model.named_modules()}
    try:
        with subject.gates(model) as gates:
            gates.mask = torch.ones(NUM_ROWS, len(gates.blocks)).requires_grad_()
            subject.loss.losses(model, inputs).sum().backward()  # type: ignore[no-untyped-call]
            expect_same(before, model.state_dict(), "a gated forward pass changes the state dict")
            raise _Stop
    except _Stop:
        pass
    expect_same(before, model.state_dict(), "gating changes the state dict")
    left = [name for name, m in model.named_modules() if m.__dict__.get("forward") is not forwards[name]]
    expect(not left, f"gating leaves its forward on {left[:3]}")


def check_nobody_keeps_a_block(subject: Subject) -> None:
    """Blocks that no sample keeps, or that all keep, run; blocks that none keeps get zero gradients, not None."""
    model, inputs = subject.backbone.build(), subject.inputs()
    subject.loss.losses(model, inputs).sum().backward()  # type: ignore[no-untyped-call]
    trained = {id(p) for p in model.parameters() if p.grad is not None}
    for j, path in enumerate(subject.backbone.unit_paths(model)):
        own = _own_parameters(model, path)
        for learning in (True, False):
            mask = random_mask(len(subject.backbone.unit_paths(model)))
            mask[:, j - 1], mask[:, j] = 1, 0
            model.zero_grad(set_to_none=True)
            with subject.gates(model) as gates:
                gates.mask = mask.requires_grad_(learning)
                losses = subject.loss.losses(model, inputs)
                expect(bool(losses.isfinite().all()), f"losses are not finite when nobody keeps '{path}'")
                losses.sum().backward()  # type: ignore[no-untyped-call]
            grads = [p.grad for p in own if id(p) in trained]
            expect(
                all(g is not None and not g.any() for g in grads),
                f"block '{path}', which nobody keeps, has a gradient that is none or not zero",
            )


def check_every_block_learns(subject: Subject) -> None:
    """The loss has a gradient to weights of every block, and to the gate of every block."""
    model, inputs = subject.backbone.build(), subject.inputs()
    with subject.gates(model) as gates:
        gates.mask = torch.ones(NUM_ROWS, len(gates.blocks)).requires_grad_()
        subject.loss.losses(model, inputs).sum().backward()  # type: ignore[no-untyped-call]
        of_gates = gates.mask.grad
    assert of_gates is not None
    for j, path in enumerate(subject.backbone.unit_paths(model)):
        grads = [p.grad for p in model.get_submodule(path).parameters() if p.grad is not None]
        expect(any(bool(g.any()) for g in grads), f"the loss gives no weight of block '{path}' a gradient")
        expect(bool(of_gates[:, j].any()), f"the loss does not depend on whether block '{path}' is kept")


def check_sparse_is_dense(subject: Subject) -> None:
    """Losses, weight and gate gradients are those of the dense formula `m * f(x) + (1 - m) * x`."""
    losses, gradients = zip(*precisely(subject, _sparse_and_dense), strict=True)
    message = "gated losses are not those of the dense formula; see 'streams'"
    sparse, dense = losses
    expect_close(sparse, dense, 1e-5, message, size=largest(dense))
    size = max(largest(expected) for expected in gradients[1])
    for found, expected in zip(*gradients, strict=True):
        expect_close(found, expected, 1e-4, "gradients are not those of the dense formula", size=size)


class _Stop(Exception):
    """Raised to leave a context by an exception."""


def _own_parameters(model: nn.Module, path: str) -> list[nn.Parameter]:
    """The parameters that a block shares with no other module."""
    shared = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if not name.startswith(f"{path}.")}
    return [p for p in model.get_submodule(path).parameters() if id(p) not in shared]


def _sparse_and_dense(subject: Subject) -> list[tuple[Tensor, list[Tensor]]]:
    """(batch,) losses with the gradients of mask and weights, of gates and of the dense formula."""
    model, inputs = subject.network(), subject.inputs()
    blocks = subject.backbone.unit_paths(model)
    mask = random_mask(len(blocks)).to(torch.float64 if subject.wide else torch.float32).requires_grad_()
    wanted = [mask, *(p for p in model.parameters() if p.requires_grad)]

    def run() -> tuple[Tensor, list[Tensor]]:
        losses = subject.loss.losses(model, inputs)
        found = torch.autograd.grad(losses.sum(), wanted, allow_unused=True)
        return losses.detach(), [torch.zeros_like(x) if g is None else g for g, x in zip(found, wanted, strict=True)]

    with dense_formula(model, blocks, mask, subject.backbone.unit_streams(model)):
        dense = run()
    with subject.gates(model) as gates:
        gates.mask = mask
        return [run(), dense]
