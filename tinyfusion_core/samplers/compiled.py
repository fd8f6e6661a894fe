"""Compiled constraints, over which every selector optimises; made from a number, a pattern or costs, and rules."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from ..errors import UserError, require
from ..protocols.blocks.paths import block_lists
from .automaton import Automaton
from .conditional_poisson import Subsets
from .constraints import Rules, build_from, check_keep, combined, demands_of
from .demands import Budget, Segment, Spending
from .patterns import Pattern, split_groups


@dataclass(frozen=True)
class Choice:
    """Blocks of which a fixed number is kept, or as many as a budget allows.

    Attributes:
        name: what messages call them.
        lists: their indices, by block list.
        num_kept: how many are kept; None if a cost budget decides.
    """

    name: str
    lists: tuple[tuple[int, ...], ...]
    num_kept: int | None

    @property
    def blocks(self) -> tuple[int, ...]:
        """Indices of the blocks, ascending."""
        return tuple(sorted(i for members in self.lists for i in members))


@dataclass(frozen=True, eq=False)
class Constraints:
    """The masks that a selector may choose from.

    Attributes:
        choices: the groups of a pattern, the block lists, or the whole network; every block is in exactly one.
        budget: how many blocks are kept, in total or by list, or what they may cost.
        rules: the rules given besides a pattern.
        automaton: the masks, over blocks in this `order`.
        order: block index of each position of the automaton.
    """

    choices: tuple[Choice, ...]
    budget: Budget | Spending
    rules: Rules
    automaton: Automaton
    order: tuple[int, ...]

    @property
    def num_blocks(self) -> int:
        """Number of blocks of the network."""
        return len(self.order)

    @property
    def num_masks(self) -> int:
        """Number of masks that obey the constraints."""
        return self.automaton.num_masks

    @property
    def protected(self) -> frozenset[int]:
        """Blocks that must be kept."""
        return frozenset(self.rules.protect)

    @property
    def independent(self) -> bool:
        """Whether each choice keeps its number of blocks independently of the others: no rule but `protect`."""
        return not self.rules.given().keys() - {"keep", "protect"}

    def accepts(self, kept: Collection[int]) -> bool:
        """Return whether the mask that keeps exactly these blocks obeys the constraints."""
        return self.automaton.accepts({i for i, block in enumerate(self.order) if block in kept})

    def best(self, scores: Sequence[float], late: bool = False) -> tuple[int, ...]:
        """Return the kept blocks of the mask with the largest sum of scores.

        Args:
            scores: score of each block; infinite ones outweigh all others.
            late: among masks with the same sum take the one with later blocks, not earlier ones.
        """
        return self._kept(self.automaton.best(_exact([scores[block] for block in self.order]), late))

    def removable(self, kept: Collection[int]) -> list[tuple[int, ...]]:
        """Return the sets of blocks that may be removed next from `kept`: some valid mask lies within the rest.

        A set is one block, or those that the rules remove as one. Empty if `kept` already obeys the constraints.
        """
        if self.accepts(kept):
            return []
        left = set(kept)
        return [unit for unit in self._units if left.issuperset(unit) and self._accepts_within(left.difference(unit))]

    def exchanges(self, kept: Collection[int]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Return what may be exchanged in a mask, so that it obeys the constraints: sets of blocks, (kept, removed).

        A set is one block, or those that the rules remove as one.
        """
        left = set(kept)
        inside, outside = ([u for u in self._units if (u[0] in left) is there] for there in (True, False))
        return [(out, back) for out in inside for back in outside if self.accepts(left.difference(out).union(back))]

    def draw(self, generator: torch.Generator) -> tuple[int, ...]:
        """Draw a mask uniformly from all that obey the constraints, and return its kept blocks."""
        if not self.independent:
            uniform = torch.rand(1, self.num_blocks, generator=generator, dtype=torch.float64)
            return self._kept(self._uniform.sample(uniform)[0].nonzero().flatten().tolist())
        # Finished comparisons are keyed by these draws.
        kept = set(self.protected)
        for choice in self.choices:
            free = [i for i in choice.blocks if i not in self.protected]
            num = (choice.num_kept or 0) - (len(choice.blocks) - len(free))
            kept |= {free[i] for i in torch.randperm(len(free), generator=generator)[:num].tolist()}
        return tuple(sorted(kept))

    def distinct(self, num: int, generator: torch.Generator) -> list[tuple[int, ...]]:
        """Draw distinct masks; a larger number starts with the same ones. All masks, in order, if there are no more."""
        if num >= self.num_masks:
            return [self._kept(mask) for mask in self.automaton.masks()]
        drawn: dict[tuple[int, ...], None] = {}  # a set that remembers the order
        while len(drawn) < num:
            drawn[self.draw(generator)] = None
        return list(drawn)

    @cached_property
    def _units(self) -> list[tuple[int, ...]]:
        """The blocks, or those that the rules remove as one."""
        bound = [tuple(sorted(group)) for group in self.rules.together]
        return sorted([*bound, *((i,) for i in range(self.num_blocks) if all(i not in group for group in bound))])

    @cached_property
    def _uniform(self) -> Subsets:
        return Subsets(self.automaton, torch.zeros(self.num_blocks, dtype=torch.float64))

    def _accepts_within(self, kept: Collection[int]) -> bool:
        return self.automaton.accepts_within({i for i, block in enumerate(self.order) if block in kept})

    def _kept(self, places: Collection[int]) -> tuple[int, ...]:
        return tuple(sorted(self.order[i] for i in places))


def _exact(scores: Sequence[float]) -> list[int]:
    """Integers in the proportions of the scores, so that sums have no rounding error."""
    ratios = [float(score).as_integer_ratio() if math.isfinite(score) else None for score in scores]
    unit = max((ratio[1] for ratio in ratios if ratio is not None), default=1)  # all are powers of two
    whole = [None if ratio is None else ratio[0] * (unit // ratio[1]) for ratio in ratios]
    infinite = 2 * sum(abs(value) for value in whole if value is not None) + 1
    return [
        value if value is not None else infinite if score > 0 else -infinite
        for value, score in zip(whole, scores, strict=True)
    ]


def compile_constraints(
    blocks: Sequence[str],
    owner: str,
    *,
    keep: Budget | None = None,
    pattern: Pattern | None = None,
    protect: Sequence[int] = (),
    constraints: Rules | None = None,
) -> Constraints:
    """Compile the settings of a selector into the masks it may choose from.

    Args:
        blocks: paths of the network's blocks.
        owner: name of the section with these settings, for messages.
        keep: how many of the blocks are kept.
        pattern: how many of every group are kept.
        protect: indices of blocks that must be kept.
        constraints: further rules; with costs and a budget instead of keep and pattern.

    Raises:
        UserError: a setting does not fit the network, or no mask obeys all of them.
    """
    lists, num_blocks = block_lists(blocks), len(blocks)
    bad = [i for i in protect if not 0 <= i < num_blocks]
    require(not bad, f"{owner}.protect", list(protect), f"indices from 0 to {num_blocks - 1}")
    rules = combined(keep, protect, constraints)
    rules.check_shape(num_blocks, f"{owner}.constraints")
    choices = _choices(lists, keep, pattern, owner)
    _check_protected(choices, rules.protect, owner)
    # Lists may take turns; where it matters whose neighbour a block is, the automaton reads list by list.
    by_list = pattern is not None or isinstance(keep, Mapping) or rules.max_run is not None or rules.contiguous
    order = tuple(i for members in lists.values() for i in members) if by_list else tuple(range(num_blocks))
    depths = tuple(map(len, lists.values()))
    segments = tuple(Segment(len(c.blocks), c.num_kept) for c in choices if c.num_kept is not None)
    key = f"{owner}.constraints"
    automaton = build_from(rules, lambda some: demands_of(_reordered(some, order), depths, segments), key)
    return Constraints(tuple(choices), rules.spending or _number(choices, lists), rules, automaton, order)


def _number(choices: Sequence[Choice], lists: Mapping[str, Sequence[int]]) -> Budget:
    """How many blocks are kept: by list, or in total where lists share a choice or there is one list."""
    if len(lists) == 1 or any(len(choice.lists) > 1 for choice in choices):
        return sum(choice.num_kept or 0 for choice in choices)
    return {name: sum(c.num_kept or 0 for c in choices if set(c.blocks) <= set(lists[name])) for name in lists}


def _choices(
    lists: Mapping[str, Sequence[int]], keep: Budget | None, pattern: Pattern | None, owner: str
) -> list[Choice]:
    lengths = {name: len(members) for name, members in lists.items()}
    if pattern is not None:
        choices = _groups(lists, pattern)
    elif isinstance(keep, Mapping):
        check_keep(keep, lengths, f"{owner}.keep")
        choices = [Choice(f"list '{name}'", (tuple(members),), keep[name]) for name, members in lists.items()]
    else:
        if keep is not None:
            check_keep(keep, lengths, f"{owner}.keep")
        choices = [Choice("the network", tuple(map(tuple, lists.values())), keep)]
    if all(choice.num_kept == 0 for choice in choices):
        raise UserError(f"{owner}.{'keep' if pattern is None else 'pattern'}: keeps no block at all")
    return choices


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


def _check_protected(choices: Sequence[Choice], protect: Sequence[int], owner: str) -> None:
    for choice in choices:
        protected = sorted(set(protect) & set(choice.blocks))
        if choice.num_kept is not None and len(protected) > choice.num_kept:
            raise UserError(
                f"{owner}.protect: {choice.name} keeps {choice.num_kept} of its {len(choice.blocks)} blocks, but "
                f"{len(protected)} are protected ({', '.join(map(str, protected))}); protect fewer or keep more"
            )


def _reordered(rules: Rules, order: Sequence[int]) -> Rules:
    """The rules for blocks in another order."""
    place = {block: i for i, block in enumerate(order)}
    return replace(
        rules,
        costs=None if rules.costs is None else [rules.costs[block] for block in order],
        protect=[place[i] for i in rules.protect],
        remove=[place[i] for i in rules.remove],
        together=[[place[i] for i in group] for group in rules.together],
    )
