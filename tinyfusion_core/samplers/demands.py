"""What masks must obey, in the terms in which an automaton reads them. This module needs no torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

Budget = int | Mapping[str, int]
"""How many blocks are kept: in total, or of every block list."""


@dataclass(frozen=True)
class Spending:
    """A budget of costs.

    Attributes:
        costs: cost of every block, whole numbers.
        budget: largest total cost of the kept blocks.
    """

    costs: tuple[int, ...]
    budget: int

    def cost_of(self, kept: Collection[int]) -> int:
        """Return the total cost of these blocks."""
        return sum(self.costs[i] for i in kept)


def budget_text(budget: Budget | Spending) -> str:
    """Format a budget for a sentence."""
    if isinstance(budget, int):
        return str(budget)
    if isinstance(budget, Spending):
        return f"what {budget.budget:,} of {sum(budget.costs):,} in costs pays for"
    return " + ".join(f"{num} of '{name}'" for name, num in budget.items())


class Segment(NamedTuple):
    """Consecutive blocks, of which `kept` out of `size` are kept."""

    size: int
    kept: int


@dataclass(frozen=True, kw_only=True)
class Demands:
    """What every mask must obey, block by block.

    Attributes:
        lists: lengths of the block lists; a run of dropped blocks ends where its list ends.
        segments: how many blocks of each part of the network are kept; they cover it. Empty with `costs`.
        costs: cost of each block.
        budget: with `costs`: the largest total cost of the kept blocks.
        protect: blocks that must be kept.
        remove: blocks that must be removed.
        together: sets of blocks that are kept or removed as one.
        max_run: the longest run of dropped blocks in a list.
        contiguous: whether the dropped blocks of a list are one run.
        period: kinds of blocks, repeated from the first block on; those that are kept repeat them too.
    """

    lists: tuple[int, ...]
    segments: tuple[Segment, ...] = ()
    costs: tuple[int, ...] | None = None
    budget: int = 0
    protect: frozenset[int] = frozenset()
    remove: frozenset[int] = frozenset()
    together: tuple[frozenset[int], ...] = ()
    max_run: int | None = None
    contiguous: bool = False
    period: tuple[str, ...] = ()

    def slack(self) -> int:
        """Return the cost by which a mask must stay within the largest: less than the cheapest free block."""
        assert self.costs is not None
        alone = (frozenset([i]) for i in range(len(self.costs)) if all(i not in group for group in self.together))
        fixed = self.protect | self.remove
        free = [sum(self.costs[i] for i in unit) for unit in (*self.together, *alone) if fixed.isdisjoint(unit)]
        return min((cost for cost in free if cost), default=1)
