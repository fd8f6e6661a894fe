"""Networks that use the outputs of their blocks in every way that may matter to masks that share a beginning."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from tinyfusion_core.protocols.blocks.batch import named_batch_dims
from tinyfusion_core.protocols.blocks.paths import expand
from tinyfusion_core.protocols.blocks.streams import FIRST, Stream, Streams
from tinyfusion_core.pruning.gating import Gates
from toys import DoubleNet, Net

ROWS, TOKENS, WIDTH = 3, 4, 8
Make = Callable[[Tensor], Any]


class Bend(nn.Module):
    """x + f(x), in the form that `make` gives it; `runs` counts over all blocks."""

    runs = 0

    def __init__(self, make: Make = lambda y: y) -> None:
        super().__init__()
        self.inner, self.make = nn.Linear(WIDTH, WIDTH), make

    def forward(self, x: Tensor, shared: dict[str, Tensor] | None = None) -> Any:
        assert len(x) > 0
        Bend.runs += 1
        y = x + torch.tanh(self.inner(x))
        if shared is not None:
            y = y + sum(shared.values())
            shared[f"of {len(shared)}"] = y.mean(0, keepdim=True)
        return self.make(y)


class Stack(nn.Module):
    """Blocks one after the other; `between` is what the network does with their outputs."""

    def __init__(self, between: Callable[[int, Any], Tensor], make: Make = lambda y: y, depth: int = 5) -> None:
        super().__init__()
        self.blocks, self.between = nn.ModuleList(Bend(make) for _ in range(depth)), between

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        for i, block in enumerate(self.blocks):
            x = self.between(i, block(x))
        return x


def in_place(i: int, x: Tensor) -> Tensor:
    return x.add_(i)


def once_in_place(i: int, x: Tensor) -> Tensor:
    return x.add_(1) if i == 2 else x


def emptied(i: int, out: dict[str, Tensor]) -> Tensor:
    return out.pop("x")


class Twice(Stack):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(super().forward(x).cos())


class Skips(nn.Module):
    """The second half adds, last first, what the first half has returned: in place, or not."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.blocks, self.in_place = nn.ModuleList(Bend() for _ in range(5)), in_place

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for block in self.blocks[:2]:
            x = block(x)
            skips.append(x)
        for block in self.blocks[2:]:
            x = block(x)
            if skips:
                skip = skips.pop()
                x = skip.add_(x) if self.in_place else skip + x
        return x


class Turns(nn.Module):
    """Two lists that take turns, the second one first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.ModuleList(Bend() for _ in range(n)) for n in (2, 3))

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.second):
            x = block(x)
            if i < len(self.first):
                x = self.first[i](x).cos()
        return x


class Chooses(Stack):
    """Which blocks it calls depends on what the ones before gave."""

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            if i < 3 or float(x.sum()) > 0:
                x = block(x)
        return x


class Cached(Stack):
    """Blocks hand something on in a dictionary that they are given."""

    def forward(self, x: Tensor) -> Tensor:
        shared: dict[str, Tensor] = {}
        for block in self.blocks:
            x = block(x, shared=shared)
        return x


class Same(nn.Module):
    """Returns a view of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view_as(x)


class Adds(nn.Module):
    """Changes its input in place and returns something else."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(3) + 1


class Aliases(nn.Module):
    """Keeps what went into blocks whose output shares its memory, or that have changed it."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([first, Bend(), second, Bend(), Bend()])

    def forward(self, x: Tensor) -> Tensor:
        kept = start = x + 1
        for block in self.blocks:
            start = block(start)
        return start + kept


class Reflects(nn.Module):
    """Where the second block is dropped, the network changes the output of the first, a part of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Same(), *(Bend() for _ in range(4))])

    def forward(self, x: Tensor) -> Tensor:
        start = x + 1
        first = self.blocks[0](start)
        x = self.blocks[1](first)
        if torch.equal(x, first):
            first.add_(1)
        for block in self.blocks[2:]:
            x = block(x)
        return x + start


NETS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: Stack(lambda i, x: x),
    "two lists": Net,
    "two streams": DoubleNet,
    "tuples": lambda: Stack(lambda i, out: out[0], lambda y: (y, None)),
    "mappings that the network empties": lambda: Stack(emptied, lambda y: {"x": y}),
    "in place after every block": lambda: Stack(in_place),
    "in place after one block": lambda: Stack(once_in_place),
    "every block called twice": lambda: Twice(lambda i, x: x),
    "long skips": lambda: Skips(in_place=False),
    "long skips in place": lambda: Skips(in_place=True),
    "lists that take turns": Turns,
    "calls that depend on the data": lambda: Chooses(lambda i, x: x),
    "a cache": lambda: Cached(lambda i, x: x),
    "an output that is a part of the input": lambda: Aliases(Same(), Adds()),
    "such an output, changed in one pass of two": Reflects,
    "a block that changes its input": lambda: Aliases(Adds(), Bend()),
}
LISTS = {Net: ["first.*", "second.*"], Turns: ["first.*", "second.*"]}
STREAMS: dict[type, Streams] = {
    DoubleNet: [Stream("hidden", 1), Stream("encoder", 0)],
}
BATCHED = named_batch_dims({"x": 0, "c": 0, "hidden": 0, "encoder": 0, "rotary.0": 0})


def gates_of(net: nn.Module, out: int | str = 0) -> Gates:
    streams = STREAMS.get(type(net), FIRST if out == 0 else [Stream(0, out)])
    return Gates(net, expand(net, LISTS.get(type(net), ["blocks.*"])), BATCHED, streams)


def inputs_of(net: nn.Module) -> tuple[Tensor, ...]:
    x = torch.randn(ROWS, TOKENS, WIDTH)
    if isinstance(net, Net):
        return x, torch.randn(ROWS, WIDTH)
    return (x, torch.randn(ROWS, 2, WIDTH)) if isinstance(net, DoubleNet) else (x,)


def masks_of(net: nn.Module, gates: Gates) -> Tensor:
    """All masks in any order, but blocks that change their input must be kept."""
    found = [list(map(float, mask)) for mask in product((0, 1), repeat=len(gates.blocks))]
    bound = [j for j, path in enumerate(gates.blocks) if isinstance(net.get_submodule(path), Adds)]
    found = [mask for mask in found if all(mask[j] for j in bound)]
    random.Random(0).shuffle(found)
    return torch.tensor(found)


def runs(work: Callable[[], object]) -> int:
    Bend.runs = 0
    work()
    return Bend.runs
