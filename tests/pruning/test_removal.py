"""What is pruned is what was measured, or the task is refused before anything is spent."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import tinyfusion_core as tiny
from planted_search import TRAINER
from tinyfusion_core.pruning.decision import Decision
from tinyfusion_core.pruning.gating import Gates


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x))


class LongSkips(nn.Module):
    """Blocks of the way down push what they make, blocks of the way up pop it."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(Residual() for _ in range(3))
        self.up = nn.ModuleList(Residual() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for block in self.down:
            x = block(x)
            skips.append(x)
        for block in self.up:
            x = block(x + skips.pop() if skips else x)
        return x


class Counted(nn.Module):
    """Its forward counts on four layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Residual() for _ in range(4))
        self.depth = 4

    def forward(self, x: Tensor) -> Tensor:
        for i in range(self.depth):
            x = self.layers[i](x)
        return x


def wrapped(model: nn.Module, blocks, **how) -> tiny.Task:
    x = torch.randn(32, 8)
    loss = lambda model, batch: (model(batch["x"]) - batch["y"]).square().mean(1)  # noqa: E731
    return tiny.wrap(model, blocks=blocks, loss_fn=loss, data={"x": x, "y": x.roll(1, 1)}, **how)


SELECTORS = {
    "search": lambda keep: tiny.Search(keep=keep, steps=50),
    "criterion": lambda keep: tiny.Greedy(keep=keep),
    "finals": lambda keep: tiny.Finals(search=tiny.Search(keep=keep, steps=2), masks=2, steps=2),
    "race": lambda keep: tiny.Race(keep=keep, steps=50),
}


@pytest.mark.parametrize("name", SELECTORS)
def test_long_skips_are_refused_before_the_search(name: str) -> None:
    task = wrapped(LongSkips(), ("down.*", "up.*"))
    with pytest.raises(tiny.UserError, match=r"the network without .* predicts otherwise .* after_prune"):
        SELECTORS[name](3)(task, TRAINER)


@pytest.mark.parametrize("name", SELECTORS)
def test_a_forward_that_counts_its_blocks_is_refused_before_the_search(name: str) -> None:
    task = wrapped(Counted(), "layers.*")
    with pytest.raises(tiny.UserError, match=r"the network without layers\.\d.* fails \(IndexError: .*after_prune"):
        SELECTORS[name](2)(task, TRAINER)


def test_after_prune_repairs_it() -> None:
    def repair(model, kept):
        model.depth = len(kept["layers"])

    task = wrapped(Counted(), "layers.*", after_prune=repair)
    decision = tiny.Greedy(keep=2)(task, TRAINER)
    assert tiny.prune(task, decision).depth == 2 and task.teacher.depth == 4


def test_a_choice_that_was_never_tried_is_tried_when_it_is_pruned() -> None:
    task = wrapped(LongSkips(), ("down.*", "up.*"))
    decision = Decision(blocks=tuple(task.blocks), kept=(0, 2, 3), method="by hand")
    with pytest.raises(tiny.UserError, match=r"without down\.1, up\.1, up\.2 predicts otherwise"):
        tiny.prune(task, decision)


def test_a_choice_is_tried_once() -> None:
    calls = []

    class Watched(Residual):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(1)
            return super().forward(x)

    task = wrapped(nn.Sequential(nn.Sequential(*(Watched() for _ in range(4)))), "0.*")
    decision = tiny.Uniform(keep=2)(task, TRAINER)
    tried = len(calls)
    assert tried > 0
    tiny.prune(task, decision)
    assert len(calls) == tried


@pytest.mark.parametrize("blocks", ["layers.*.linear", "layers.*.nonsense", "*.layers"])
def test_a_star_ends_a_path(blocks: str) -> None:
    with pytest.raises(tiny.UserError, match=r"block path '.*'"):
        wrapped(Counted(), blocks)


class ChangesItsCondition(nn.Module):
    """What later blocks are given depends on whether this one has run."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        c.mul_(0.5)
        return x + self.linear(x) * c


@pytest.mark.parametrize("mask", [[[1.0, 0.0], [0.0, 1.0]], [[1.0, 1.0], [1.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
def test_a_block_that_changes_what_is_no_stream_is_refused(mask: list[list[float]]) -> None:
    model = nn.ModuleList([ChangesItsCondition(), ChangesItsCondition()])
    x, c = torch.randn(2, 4), torch.randn(2, 4)
    with Gates(model, ["0", "1"], lambda path, leaf: 0) as gates, torch.no_grad():
        gates.mask = torch.tensor(mask)
        with pytest.raises(tiny.UserError, match=r"block '[01]' changes its input in place \(c\)"):
            for block in model:
                x = block(x, c)
