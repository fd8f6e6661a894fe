"""Constraints: what every selector optimises over, compiled from a number, a pattern or costs, and from rules."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from ..errors import UserError, require
from ..protocols.backbone import block_lists
from .automaton import Automaton, Segment
from .conditional_poisson import Subsets
from .constraints import Budget, Rules, Spending, build_from, check_keep, combined, demands_of
from .patterns import Pattern, split_groups


@dataclass(frozen=True)
class Choice:
    """Blocks of which a fixed number stays, or what a budget pays for.

    Attributes:
        name: what messages call them.
        lists: their indices, by block list.
        num_kept: how many stay; None: what the budget pays for.
    """

    name: str
    lists: tuple[tuple[int, ...], ...]
    num_kept: int | None

    @property
    def blocks(self) -> tuple[int, ...]:
        return tuple(sorted(i for members in self.lists for i in members))


@dataclass(frozen=True, eq=False)
class Constraints:
    """The masks that a selector may choose from.

    Attributes:
        choices: the groups of a pattern, the block lists, or the network; every block is in one of them.
        budget: how many blocks stay, of all or by list, or what they may cost.
        rules: that were given besides a pattern.
        automaton: the masks, of blocks in this `order`.
        order: the index of every block of the automaton.
    """

    choices: tuple[Choice, ...]
    budget: Budget | Spending
    rules: Rules
    automaton: Automaton
    order: tuple[int, ...]

    @property
    def num_blocks(self) -> int:
        return len(self.order)

    @property
    def num_masks(self) -> int:
        """How many masks obey."""
        return self.automaton.num_masks

    @property
    def protected(self) -> frozenset[int]:
        """Blocks that must stay."""
        return frozenset(self.rules.protect)

    @property
    def independent(self) -> bool:
        """Whether every choice keeps its number of blocks, whatever the others keep, and nothing else is asked for."""
        return not self.rules.given().keys() - {"keep", "protect"}

    def accepts(self, kept: Collection[int]) -> bool:
        """Whether the mask that keeps these blocks obeys."""
        return self.automaton.accepts({i for i, block in enumerate(self.order) if block in kept})

    def best(self, scores: Sequence[float], late: bool = False) -> tuple[int, ...]:
        """The blocks that the mask with the largest sum of scores keeps.

        Args:
            scores: of every block; infinite ones count before all others.
            late: of masks with the same sum the one that keeps the later blocks, not the earlier.
        """
        return self._kept(self.automaton.best(_exact([scores[block] for block in self.order]), late))

    def removable(self, kept: Collection[int]) -> list[tuple[int, ...]]:
        """The sets of blocks of which one may go when `kept` are left, so that some mask that obeys is within the rest.

        A set is one block, or those that the rules hold together; there is none when `kept` obeys.
        """
        if self.accepts(kept):
            return []
        bound = [tuple(sorted(group)) for group in self.rules.together]
        units = [*bound, *((i,) for i in range(self.num_blocks) if all(i not in group for group in bound))]
        return sorted(unit for unit in units if set(unit) <= set(kept) and self._accepts_within(set(kept) - set(unit)))

    def draw(self, generator: torch.Generator) -> tuple[int, ...]:
        """The blocks to keep, every mask that obeys with the same probability."""
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
        """Drawn masks, no two alike; a larger number begins with them. All in order if there are no more."""
        if num >= self.num_masks:
            return [self._kept(mask) for mask in self.automaton.masks()]
        drawn: dict[tuple[int, ...], None] = {}  # a set that remembers the order
        while len(drawn) < num:
            drawn[self.draw(generator)] = None
        return list(drawn)

    @cached_property
    def _uniform(self) -> Subsets:
        return Subsets(self.automaton, torch.zeros(self.num_blocks, dtype=torch.float64))

    def _accepts_within(self, kept: Collection[int]) -> bool:
        return self.automaton.accepts_within({i for i, block in enumerate(self.order) if block in kept})

    def _kept(self, places: Collection[int]) -> tuple[int, ...]:
        return tuple(sorted(self.order[i] for i in places))


def _exact(scores: Sequence[float]) -> list[int]:
    """Whole numbers in the proportions of the scores, whose sums know no rounding."""
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
    """What a selector may choose from in a network.

    Args:
        blocks: paths of the network's blocks.
        owner: whose settings the following are, for messages.
        keep: how many of the blocks stay.
        pattern: how many of every group stay.
        protect: indices of blocks that must stay.
        constraints: further rules; with costs and a budget in the place of keep and pattern.

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
    """How many blocks stay: of every list, or of all where lists share a choice or there is one."""
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
