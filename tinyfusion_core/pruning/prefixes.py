"""A network under many masks on the same inputs: what masks begin with in common is computed once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ..protocols.blocks.call import Call, is_plain, version
from .gating import Gates

MOST_BYTES = 2**30


@dataclass(frozen=True)
class _Made:
    """A call of a block in the last forward pass.

    Attributes:
        block: its index.
        kept: whether the mask kept it.
        output: flat, and its form; None if the next pass must compute it again.
        versions: how often each leaf of it had been changed in place when the block returned it.
        num_bytes: memory that it holds.
    """

    block: int
    kept: bool
    output: tuple[Sequence[Any], TreeSpec] | None = None
    versions: Sequence[int] = ()
    num_bytes: int = 0

    def same(self) -> Any:
        """Return the output in containers of its own; None if it is not here, or not as the block returned it."""
        if self.output is None or [*map(version, self.output[0])] != self.versions:
            return None
        return tree_unflatten(*self.output)


class Prefixes:
    """Masks in the order of a trie, and the block calls of the last forward pass, which the next one may take over.

    A pass follows the one before while the same blocks are called in the same order and both masks say the same of
    them: so far all that a block receives is the same, and so is what it returns. Everything but the blocks runs as
    always, so that results are those of the plain passes bit for bit, whatever the network makes of its blocks'
    outputs. A pass that follows computes again, with the same result, what cannot be taken over: an output that was
    changed in place after the block had returned it, or that shares memory with an argument; the call of a block that
    changes its arguments, or is given an object that it might change; a dropped block, which is a copy; and what does
    not fit into `most_bytes`.

    One thing cannot be seen: blocks that tell each other, or the network, something by another way than arguments and
    outputs. So the first pass is tried again, half of it taken over; if its result differs, every mask runs plainly.

    Args:
        gates: of the network; to be open, and without gradients, while masks are evaluated.
        most_bytes: how much memory the outputs of blocks may hold.
    """

    def __init__(self, gates: Gates, most_bytes: int = MOST_BYTES) -> None:
        self.gates, self.most_bytes = gates, most_bytes
        self._shares: bool | None = None
        self._full = False
        self._order = list(range(len(gates.blocks)))
        self._calls: list[_Made] = []
        self._place, self._follows = 0, False
        gates.recall = self._recall

    def evaluate(self, masks: Tensor, num_rows: int, compute: Callable[[], Tensor]) -> Iterator[tuple[int, Tensor]]:
        """Yield the index of every mask, and what the network gives under it, in an order of its own.

        Args:
            masks: (masks, num_blocks) zeros and ones.
            num_rows: number of samples in the batch.
            compute: runs the network on one batch, the same at each call; returns a tensor of any shape.
        """
        said = masks.tolist()
        waiting = self._sorted(range(len(said)), said)
        try:
            while waiting:
                i = waiting.pop(0)
                mask = masks[i].expand(num_rows, -1)
                found = self._under(mask, compute)
                if self._shares is None and waiting:
                    self._try(mask, compute, found)
                    waiting = self._sorted(waiting, said)  # now it is known which blocks come first
                yield i, found
        finally:
            self._calls.clear()

    def _sorted(self, indices: Iterable[int], masks: Sequence[Sequence[float]]) -> list[int]:
        """Masks with a common beginning side by side, fuller ones first: a block that has run need not when dropped."""
        return sorted(indices, key=lambda i: [masks[i][j] for j in self._order], reverse=True)

    def _under(self, mask: Tensor, compute: Callable[[], Tensor]) -> Tensor:
        self.gates.mask = mask
        self._place, self._follows = 0, True
        return compute()

    def _try(self, mask: Tensor, compute: Callable[[], Tensor], found: Tensor) -> None:
        """Run a pass again with every second call taken over, and once more with the others."""
        self._order = list(dict.fromkeys([*(made.block for made in self._calls), *self._order]))
        self._shares = True
        for first in (0, 1):
            self._calls[first::2] = [_Made(made.block, made.kept) for made in self._calls[first::2]]
            same = torch.allclose(self._under(mask, compute), found, rtol=0, atol=0, equal_nan=True)
            self._shares = self._shares and same
        if not self._shares:
            self._calls.clear()
            warnings.warn(
                "what blocks receive and return does not decide the network's result, or it is not the same twice: "
                "masks share no computation",
                stacklevel=2,
            )

    def _recall(self, block: int, kept: bool, call: Call, compute: Callable[[], Any]) -> Any:
        if self._shares is False:
            return compute()
        place, self._place = self._place, self._place + 1
        if self._follows:
            before = self._calls[place] if place < len(self._calls) else None
            self._follows = before is not None and (before.block, before.kept) == (block, kept)
            if not self._follows:
                del self._calls[place:]
            elif before is not None and (output := before.same()) is not None:
                return output
            else:
                self._calls[place] = _Made(block, kept)  # what has changed holds no memory meanwhile
        output = compute()
        self._calls[place : place + 1] = [self._made(block, kept, call, output)]
        return output

    def _made(self, block: int, kept: bool, call: Call, output: Any) -> _Made:
        leaves, spec = tree_flatten(output)
        again = _Made(block, kept)
        if not kept or not _told_by_its_output(call, leaves):
            return again
        num_bytes = sum(t.untyped_storage().nbytes() for t in leaves if isinstance(t, Tensor))
        if num_bytes + sum(other.num_bytes for other in self._calls) <= self.most_bytes:
            return _Made(block, kept, (leaves, spec), [*map(version, leaves)], num_bytes)
        if not self._full:
            self._full = True
            warnings.warn(
                f"the outputs of {len(self.gates.blocks)} blocks do not fit into {self.most_bytes / 2**30:.3g} GiB: "
                "masks share less computation; a smaller batch_size helps",
                stacklevel=2,
            )
        return again


def _told_by_its_output(call: Call, leaves: Sequence[Any]) -> bool:
    """Whether a call did nothing but return these leaves, in memory of their own."""
    arguments, spec = tree_flatten((call.args, call.kwargs))
    same = spec == call.spec and all(now is then for now, then in zip(arguments, call.leaves, strict=True))
    if call.changed or not same or not all(map(_traceable, [*arguments, *leaves])):
        return False
    return _memory(leaves).isdisjoint(_memory(arguments))


def _traceable(leaf: Any) -> bool:
    """Whether one can tell that this has been changed."""
    if type(leaf) not in (Tensor, nn.Parameter):
        return is_plain(leaf)
    return leaf.layout == torch.strided and not leaf.is_nested and not leaf.is_inference()


def _memory(leaves: Iterable[Any]) -> set[int]:
    return {leaf.untyped_storage().data_ptr() for leaf in leaves if isinstance(leaf, Tensor)}
