"""How many blocks stay: of all, of every block list or of every group; and which ones must."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..errors import UserError, nearest, require
from ..protocols.backbone import block_lists
from .patterns import Pattern, split_groups

Budget = int | Mapping[str, int]
"""How many blocks stay: of all together, or of every block list."""


def budget_text(budget: Budget) -> str:
    """As it stands in a sentence."""
    if isinstance(budget, int):
        return str(budget)
    return " + ".join(f"{num} of '{name}'" for name, num in budget.items())


@dataclass(frozen=True)
class Choice:
    """Blocks of which a fixed number stays.

    Attributes:
        name: what messages call them.
        lists: their indices, by block list.
        num_kept: how many stay.
    """

    name: str
    lists: tuple[tuple[int, ...], ...]
    num_kept: int

    @property
    def blocks(self) -> tuple[int, ...]:
        return tuple(sorted(i for members in self.lists for i in members))


@dataclass(frozen=True)
class Quota:
    """What a decision must obey.

    Attributes:
        choices: the independent choices; every block is in one of them.
        protected: blocks that must stay; no more of a choice than stay of it.
    """

    choices: tuple[Choice, ...]
    protected: frozenset[int]

    def top(self, scores: Sequence[float]) -> tuple[int, ...]:
        """The blocks to keep by their scores: the highest of each choice, the lower index where they are equal."""
        kept: list[int] = []
        for choice in self.choices:
            ranked = sorted(choice.blocks, key=lambda i: (i not in self.protected, -scores[i], i))
            kept += ranked[: choice.num_kept]
        return tuple(sorted(kept))

    def removable(self, kept: Collection[int]) -> list[int]:
        """The blocks of which one may go when `kept` are left; none when the budget is met."""
        found: list[int] = []
        for choice in self.choices:
            left = [i for i in choice.blocks if i in kept]
            if len(left) > choice.num_kept:
                found += [i for i in left if i not in self.protected]
        return sorted(found)

    @property
    def num_blocks(self) -> int:
        return sum(len(choice.blocks) for choice in self.choices)

    @property
    def num_masks(self) -> int:
        """How many decisions obey it."""
        return math.prod(math.comb(len(free), num) for free, num in map(self._free, self.choices))

    def draw(self, generator: torch.Generator) -> tuple[int, ...]:
        """The blocks to keep, every possibility with the same probability."""
        kept = set(self.protected)
        for choice in self.choices:
            free, num = self._free(choice)
            kept |= {free[i] for i in torch.randperm(len(free), generator=generator)[:num].tolist()}
        return tuple(sorted(kept))

    def distinct(self, num: int, generator: torch.Generator) -> list[tuple[int, ...]]:
        """Drawn decisions, no two alike; a larger number begins with them. All in order if there are no more."""
        if num >= self.num_masks:
            parts = [itertools.combinations(*self._free(choice)) for choice in self.choices]
            return [tuple(sorted(itertools.chain(self.protected, *kept))) for kept in itertools.product(*parts)]
        drawn: dict[tuple[int, ...], None] = {}  # a set that remembers the order
        while len(drawn) < num:
            drawn[self.draw(generator)] = None
        return list(drawn)

    def _free(self, choice: Choice) -> tuple[list[int], int]:
        """The blocks that are not protected, and how many of them stay."""
        free = [i for i in choice.blocks if i not in self.protected]
        return free, choice.num_kept - (len(choice.blocks) - len(free))


def make_quota(
    blocks: Sequence[str], keep: Budget | None, pattern: Pattern | None, protect: Collection[int], owner: str
) -> Quota:
    """Apply a budget to a network; either `keep` or `pattern` is given.

    Args:
        blocks: paths of the network's blocks.
        keep: how many of them stay.
        pattern: how many of every group stay.
        protect: indices of blocks that must stay.
        owner: whose options these are, for messages.

    Raises:
        UserError: it does not fit the network, or protects more than it keeps.
    """
    lists = block_lists(blocks)
    bad = [i for i in protect if not 0 <= i < len(blocks)]
    require(not bad, f"{owner}.protect", list(protect), f"indices from 0 to {len(blocks) - 1}")
    if pattern is not None:
        choices = _groups(lists, pattern)
    elif isinstance(keep, Mapping):
        choices = _by_list(lists, keep, owner)
    else:
        require(keep is not None and 1 <= keep <= len(blocks), f"{owner}.keep", keep, f"1 to {len(blocks)} blocks")
        assert keep is not None
        choices = [Choice("the network", tuple(map(tuple, lists.values())), keep)]
    if not any(choice.num_kept for choice in choices):
        raise UserError(f"{owner}.{'keep' if pattern is None else 'pattern'}: keeps no block at all")
    for choice in choices:
        protected = sorted(set(protect) & set(choice.blocks))
        if len(protected) > choice.num_kept:
            raise UserError(
                f"{owner}.protect: {choice.name} keeps {choice.num_kept} of its {len(choice.blocks)} blocks, but "
                f"{len(protected)} are protected ({', '.join(map(str, protected))}); protect fewer or keep more"
            )
    return Quota(tuple(choices), frozenset(protect))


def _groups(lists: Mapping[str, Sequence[int]], pattern: Pattern) -> list[Choice]:
    pairs = split_groups(pattern, {name: len(members) for name, members in lists.items()})
    order = [i for members in lists.values() for i in members]  # groups never straddle two lists
    choices, start = [], 0
    for g, (num_kept, size) in enumerate(pairs):
        members = tuple(order[start : start + size])
        name = f"group {g + 1} (blocks {members[0]} to {members[-1]})"
        choices.append(Choice(name, (members,), num_kept))
        start += size
    return choices


def _by_list(lists: Mapping[str, Sequence[int]], keep: Mapping[str, int], owner: str) -> list[Choice]:
    for name in keep:
        if name not in lists:
            raise UserError(f"{owner}.keep: the network has no block list '{name}'{nearest(name, lists)}")
    missing = [name for name in lists if name not in keep]
    if missing:
        raise UserError(f"{owner}.keep: says nothing of the block list(s) {', '.join(missing)}; give each a number")
    for name, members in lists.items():
        require(0 <= keep[name] <= len(members), f"{owner}.keep.{name}", keep[name], f"0 to {len(members)} blocks")
    return [Choice(f"list '{name}'", (tuple(members),), keep[name]) for name, members in lists.items()]
