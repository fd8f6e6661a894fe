"""Rules for masks, as users write them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from ..errors import UserError, nearest, require
from ..parsing.settings import MOST, Settings
from .automaton import Automaton, automaton_of
from .demands import Budget, Demands, Segment, Spending


@dataclass(frozen=True, kw_only=True)
class Rules(Settings):
    """Rules for masks. Blocks are numbered over all lists, in execution order.

    Args:
        keep: how many blocks are kept: in total, or of every block list.
        costs: cost of each block, whole numbers; see `tinyfusion costs`.
        budget: with `costs`: the largest total cost of the kept blocks. Masks use as much of it as possible, to within
            the cost of the cheapest block.
        protect: blocks that must be kept.
        remove: blocks that must be removed.
        together: sets of blocks that are kept or removed as one.
        max_run: the longest run of neighbouring blocks of one list that may be removed.
        contiguous: whether the removed blocks of a list must be one run.
        period: kinds of blocks, such as `[s, s, s, f]`, that the network repeats from the first block on; so must those
            that are kept, for tools that know a block by its position. Not with costs.
    """

    keep: int | Mapping[str, int] | None = None
    costs: Sequence[int] | None = field(default=None, metadata={MOST: None})
    budget: int | None = field(default=None, metadata={MOST: None})
    protect: Sequence[int] = ()
    remove: Sequence[int] = ()
    together: Sequence[Sequence[int]] = ()
    max_run: int | None = None
    contiguous: bool = False
    period: Sequence[str] | None = field(default=None, metadata={"neutral": None})

    def given(self) -> dict[str, object]:
        """Return the rules that are set, by name."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return {name: value for name, value in found.items() if value not in ([], {})}

    def check(self, lists: Mapping[str, int], key: str = "search.sampler.rules") -> None:
        """Check that every rule makes sense for block lists of these lengths.

        Raises:
            UserError: names the key that does not.
        """
        by_costs = self.costs is not None and self.budget is not None
        by_number = self.costs is None and self.budget is None
        require(by_number if self.keep is not None else by_costs, key, self.given(), "keep, or costs with budget")
        if self.keep is not None:
            check_keep(self.keep, lists, f"{key}.keep")
        if isinstance(self.keep, Mapping):
            require(sum(self.keep.values()) > 0, f"{key}.keep", dict(self.keep), "at least one block in all")
        self.check_shape(sum(lists.values()), key)

    def check_shape(self, num_blocks: int, key: str) -> None:
        """Check that every rule but `keep` makes sense for this number of blocks.

        Raises:
            UserError: names the key that does not.
        """
        if self.costs is not None:
            right = len(self.costs) == num_blocks and all(type(c) is int and c >= 0 for c in self.costs)
            require(right, f"{key}.costs", list(self.costs), f"{num_blocks} whole numbers")
            least = min((c for c in self.costs if c), default=1)
            enough = _in(self.budget, least, math.inf)
            require(enough, f"{key}.budget", self.budget, "enough for one block, a whole number")
        indices = f"different indices from 0 to {num_blocks - 1}"
        for name, blocks in (
            ("protect", self.protect),
            ("remove", self.remove),
            ("together", [i for group in self.together for i in group]),
        ):
            right = all(type(i) is int and 0 <= i < num_blocks for i in blocks) and len(set(blocks)) == len(blocks)
            require(right, f"{key}.{name}", getattr(self, name), indices)
        right = self.max_run is None or (type(self.max_run) is int and self.max_run >= 0)
        require(right, f"{key}.max_run", self.max_run, "0 or more blocks, a whole number")
        require(type(self.contiguous) is bool, f"{key}.contiguous", self.contiguous, "true or false")

    @property
    def spending(self) -> Spending | None:
        """The budget of costs, if there is one."""
        return None if self.costs is None or self.budget is None else Spending(tuple(self.costs), self.budget)

    def without(self, name: str) -> Rules:
        """Return these rules with one of them reset to its default."""
        default: Any = next(f.default for f in fields(self) if f.name == name)
        return replace(self, **{name: default})

    def with_limits(self, limits: Mapping[str, Sequence[Any]]) -> Rules:
        """Return these rules and those of a network: what it protects, and the period of its kinds of blocks.

        Raises:
            UserError: there is a period, and costs, which do not count blocks.
        """
        if "period" in limits and self.costs is not None:
            raise UserError("a budget of costs does not go with a period; give keep")
        protect = tuple(sorted({*self.protect, *limits.get("protect", ())}))
        ours, theirs = tuple(self.period or ()), tuple(limits.get("period", ()))
        if ours and theirs and ours != theirs:
            length = math.lcm(len(ours), len(theirs))
            both = tuple(f"{ours[i % len(ours)]} {theirs[i % len(theirs)]}" for i in range(length))
            return replace(self, protect=protect, period=both)
        return replace(self, protect=protect, period=ours or theirs or None)


def check_said(owner: str, constraints: Rules | None, ways: Mapping[str, object]) -> None:
    """Check that the kept blocks are limited in exactly one way: by one setting, or by costs with a budget.

    Args:
        owner: name of the section with these settings, for messages.
        constraints: its setting of that name.
        ways: the other settings that limit them, by name.

    Raises:
        UserError: they are limited in no way, or in several.
    """
    given = Rules() if constraints is None else constraints
    if given.keep is not None:
        raise UserError(f"{owner}.constraints.keep: say it as {owner}.keep")
    if (given.costs is None) != (given.budget is None):
        raise UserError(f"{owner}.constraints: costs and budget go together")
    if sum(value is not None for value in ways.values()) + (given.costs is not None) != 1:
        names, number = " or ".join(ways), {3: "three", 4: "four"}[len(ways)]
        raise UserError(f"{owner}: give {names}, one of the {number}, or constraints with costs and budget alone")


def combined(keep: Budget | None, protect: Sequence[int], constraints: Rules | None) -> Rules:
    """Combine the settings of a selector into one set of rules."""
    given = Rules() if constraints is None else constraints
    return replace(given, keep=keep, protect=tuple(sorted({*given.protect, *protect})))


def check_keep(keep: Budget, lists: Mapping[str, int], key: str) -> None:
    """Check that block lists of these lengths can keep so many blocks.

    Raises:
        UserError: they cannot; names the key.
    """
    if not isinstance(keep, Mapping):
        num_blocks = sum(lists.values())
        require(_in(keep, 1, num_blocks), key, keep, f"1 to {num_blocks} blocks")
        return
    for name in keep:
        if name not in lists:
            raise UserError(f"{key}: the network has no block list '{name}'{nearest(name, lists)}")
    if missing := [name for name in lists if name not in keep]:
        raise UserError(f"{key}: says nothing of the block list(s) {', '.join(missing)}; give each a number")
    for name, depth in lists.items():
        require(_in(keep[name], 0, depth), f"{key}.{name}", keep[name], f"0 to {depth} blocks")


def _in(value: object, least: float, most: float) -> bool:
    """Whether a value is an integer within bounds."""
    return type(value) is int and least <= value <= most


def build(rules: Rules, lists: Mapping[str, int], key: str = "search.sampler.rules") -> Automaton:
    """Build the automaton of the masks that obey the rules, for consecutive block lists.

    Raises:
        UserError: a rule makes no sense for these lists, or no mask obeys them all; names the rules to drop.
    """
    rules.check(lists, key)
    depths = tuple(lists.values())
    return build_from(rules, lambda some: demands_of(some, depths, segments_of(some.keep, lists)), key)


def build_from(rules: Rules, demands: Callable[[Rules], Demands], key: str) -> Automaton:
    """Build the automaton of the rules.

    Args:
        rules: the rules.
        demands: converts rules to demands on each block.
        key: name of the setting, for messages.

    Raises:
        UserError: as `build`.
    """
    if rules.period and rules.costs is not None:
        raise UserError(f"{key}.period: goes with a number of blocks or a pattern, not with a budget of costs")
    found = automaton_of(demands(rules), key)
    if found is not None:
        return found
    blame = []
    for name, value in rules.given().items():
        if name in ("keep", "costs", "budget"):
            continue
        if (without := automaton_of(demands(rules.without(name)), key)) is not None:
            blame.append(f"{name} {value} (without it {without.num_masks:,} masks would do)")
    given = ", ".join(f"{name} {value}" for name, value in rules.given().items())
    reason = "; in the way: " + "; ".join(blame) if blame else ""
    raise UserError(f"{key}: no mask of {sum(demands(rules).lists)} blocks obeys {given}{reason}")


def segments_of(keep: Budget | None, lists: Mapping[str, int]) -> tuple[Segment, ...]:
    """Return how many blocks of each part of consecutive lists are kept; empty if costs decide."""
    if keep is None:
        return ()
    if isinstance(keep, Mapping):
        return tuple(Segment(depth, keep[name]) for name, depth in lists.items())
    return (Segment(sum(lists.values()), keep),)


def demands_of(rules: Rules, depths: tuple[int, ...], segments: tuple[Segment, ...]) -> Demands:
    """Convert rules to demands on each block, for lists of these lengths."""
    return Demands(
        lists=depths,
        segments=segments,
        costs=None if rules.costs is None else tuple(rules.costs),
        budget=rules.budget or 0,
        protect=frozenset(rules.protect),
        remove=frozenset(rules.remove),
        together=tuple(map(frozenset, rules.together)),
        max_run=rules.max_run,
        contiguous=rules.contiguous,
        period=tuple(rules.period or ()),
    )
