"""What every mask of a search must obey, as an automaton that reads the blocks in order.

A state holds what the past decides about the future: how much is kept so far, how many blocks in a row were dropped
and so on. Every path through the automaton is a mask that obeys all rules, and every such mask is one path;
distributions over masks are dynamic programmes over it (see conditional_poisson.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import UserError, nearest, require

MAX_STATES = 2_000_000


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Rules for masks. Blocks are counted over all lists, in execution order.

    Args:
        keep: how many blocks stay: of all together, or of every block list.
        costs: what each block costs, whole numbers; see `tinyfusion costs`.
        budget: with `costs`: the most that the blocks that stay may cost together. Masks use as much of it as can be
            used, to within the cost of the cheapest block.
        protect: blocks that must stay.
        remove: blocks that must go.
        together: sets of blocks that stay or go together.
        max_run: the longest run of neighbouring blocks of one list that may go.
        contiguous: whether the blocks of a list that go are one run.
    """

    keep: int | Mapping[str, int] | None = None
    costs: Sequence[int] | None = None
    budget: int | None = None
    protect: Sequence[int] = ()
    remove: Sequence[int] = ()
    together: Sequence[Sequence[int]] = ()
    max_run: int | None = None
    contiguous: bool = False

    def given(self) -> dict[str, object]:
        """The rules that are in force, by name."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return {name: value for name, value in found.items() if value not in ([], {})}

    def check(self, lists: Mapping[str, int], key: str = "search.sampler.rules") -> None:
        """Raises UserError, naming the key, when a rule has no meaning for block lists of these lengths."""
        num_blocks = sum(lists.values())

        def need(holds: bool, name: str, value: object, expected: str) -> None:
            require(holds, f"{key}.{name}", value, expected)

        by_costs = self.costs is not None and self.budget is not None
        by_number = self.costs is None and self.budget is None
        one = by_number if self.keep is not None else by_costs
        require(one, key, self.given(), "keep, or costs with budget")
        if isinstance(self.keep, Mapping):
            if unknown := [name for name in self.keep if name not in lists]:
                hint = nearest(unknown[0], lists)
                raise UserError(f"{key}.keep: the network has no block list '{unknown[0]}'{hint}")
            missing = [name for name in lists if name not in self.keep]
            need(not missing, "keep", dict(self.keep), f"a number for {', '.join(missing)} too")
            for name, depth in lists.items():
                need(_in(self.keep[name], 0, depth), f"keep.{name}", self.keep[name], f"0 to {depth}")
            need(sum(self.keep.values()) > 0, "keep", dict(self.keep), "at least one block in all")
        elif self.keep is not None:
            need(_in(self.keep, 1, num_blocks), "keep", self.keep, f"1 to {num_blocks} blocks")
        if self.costs is not None:
            right = len(self.costs) == num_blocks and all(type(c) is int and c >= 0 for c in self.costs)
            need(right, "costs", list(self.costs), f"{num_blocks} whole numbers")
            least = min((c for c in self.costs if c), default=1)
            need(_in(self.budget, least, math.inf), "budget", self.budget, "enough for one block, a whole number")
        indices = f"different indices from 0 to {num_blocks - 1}"
        for name, blocks in (
            ("protect", self.protect),
            ("remove", self.remove),
            ("together", [i for group in self.together for i in group]),
        ):
            right = all(0 <= i < num_blocks for i in blocks) and len(set(blocks)) == len(blocks)
            need(right, name, getattr(self, name), indices)
        need(self.max_run is None or self.max_run >= 0, "max_run", self.max_run, "0 or more blocks")

    def slack(self) -> int:
        """What a mask may leave of the largest use of the budget: less than the cheapest that could still be added."""
        assert self.costs is not None
        grouped = [tuple(group) for group in self.together]
        units = [*grouped, *((i,) for i in range(len(self.costs)) if all(i not in group for group in grouped))]
        fixed = {*self.protect, *self.remove}
        free = [sum(self.costs[i] for i in unit) for unit in units if fixed.isdisjoint(unit)]
        return min((cost for cost in free if cost), default=1)

    def without(self, name: str) -> Rules:
        """These rules but one."""
        default: Any = next(f.default for f in fields(self) if f.name == name)
        return replace(self, **{name: default})


def _in(value: object, least: float, most: float) -> bool:
    """Whether a value is a whole number within bounds."""
    return type(value) is int and least <= value <= most


class _State(NamedTuple):
    used: int = 0  # blocks kept, or their cost; of this list where every list has its own number
    run: int = 0  # dropped blocks just before, in this list
    phase: int = 0  # contiguous: 0 before the dropped run, 1 in it, 2 after
    open: tuple[tuple[int, bool], ...] = ()  # sets of `together` that have begun and not ended, and how


class _Place(NamedTuple):
    """Where a block is."""

    block: int  # its number over all lists
    name: str  # of its list
    first: bool  # of its list
    last: bool


@dataclass(frozen=True)
class Automaton:
    """The masks that obey some rules.

    Attributes:
        drop: for every block a table: state before it -> state after it when the block is dropped. The number of
            states after it stands for "forbidden".
        keep: the same when it is kept.
        num_ends: how many states there are after the last block.
        num_masks: how many masks there are.
        dearest: the most that a mask uses of the budget.
    """

    drop: tuple[Tensor, ...]
    keep: tuple[Tensor, ...]
    num_ends: int
    num_masks: int
    dearest: int

    @property
    def num_blocks(self) -> int:
        return len(self.drop)

    def accepts(self, kept: Sequence[int]) -> bool:
        """Whether the mask that keeps these blocks obeys the rules."""
        state = 0
        for i, (drop, keep) in enumerate(zip(self.drop, self.keep, strict=True)):
            table = keep if i in kept else drop
            if state >= len(table):  # it was forbidden
                return False
            state = int(table[state])
        return state < self.num_ends


def build(rules: Rules, lists: Mapping[str, int]) -> Automaton:
    """The automaton of the masks that obey the rules; states from which no mask can be finished are left out.

    Raises:
        UserError: a rule has no meaning for these lists, or no mask obeys them all; names those that are too many.
    """
    rules.check(lists)
    found = _automaton(rules, lists)
    if found is not None:
        return found
    blame = []
    for name, value in rules.given().items():
        if name in ("keep", "costs", "budget"):
            continue
        fewer = rules.without(name)
        if (without := _automaton(fewer, lists)) is not None:
            blame.append(f"{name} {value} (without it {without.num_masks:,} masks would do)")
    given = ", ".join(f"{name} {value}" for name, value in rules.given().items())
    reason = "; in the way: " + "; ".join(blame) if blame else ""
    raise UserError(f"search.sampler.rules: no mask of {sum(lists.values())} blocks obeys {given}{reason}")


def _automaton(rules: Rules, lists: Mapping[str, int]) -> Automaton | None:
    paths = _explore(rules, lists)
    found = _prune(rules, *paths)
    if found is None or rules.costs is None:
        return found
    return _prune(rules, *paths, least=found.dearest - rules.slack())


_Layers = list[dict[_State, int]]
_Moves = list[list[tuple[_State | None, _State | None]]]


def _explore(rules: Rules, lists: Mapping[str, int]) -> tuple[_Layers, _Moves]:
    """The states before and after every block, and for each where dropping and keeping the block lead."""
    blocks = [(name, i, depth) for name, depth in lists.items() for i in range(depth)]
    layers: _Layers = [{_State(): 0}]
    moves: _Moves = []
    for index, (name, i, depth) in enumerate(blocks):
        following: dict[_State, int] = {}
        out: list[tuple[_State | None, _State | None]] = []
        place = _Place(index, name, first=i == 0, last=i == depth - 1)
        for state in layers[-1]:
            pair = tuple(_move(rules, state, place, kept) for kept in (False, True))
            for after in pair:
                if after is not None:
                    following.setdefault(after, len(following))
            out.append((pair[0], pair[1]))
        moves.append(out)
        layers.append(following)
        if sum(map(len, layers)) > MAX_STATES:
            fix = "fewer or closer blocks in together" if rules.costs is None else "costs of smaller numbers"
            raise UserError(f"search.sampler.rules: these need too many states; give {fix}")
    return layers, moves


def _prune(rules: Rules, layers: _Layers, moves: _Moves, least: int = 0) -> Automaton | None:
    """Keep the states from which an end that uses more than the least can be reached; count the masks on the way."""
    counts: dict[_State, int] = {state: 1 for state in layers[-1] if _done(rules, state, least)}
    names = {state: i for i, state in enumerate(counts)}
    num_ends, drops, keeps = len(counts), [], []
    dearest = max((state.used for state in counts), default=0)
    for layer, out in zip(reversed(layers[:-1]), reversed(moves), strict=True):
        before: dict[_State, int] = {}
        rows: list[tuple[int, int]] = []
        for state, pair in zip(layer, out, strict=True):
            total = sum(counts.get(after, 0) for after in pair if after is not None)
            if total:
                before[state] = total
                dead = len(names)
                a, b = (names.get(after, dead) if after is not None else dead for after in pair)
                rows.append((a, b))
        if not rows:
            return None
        table = torch.tensor(rows)
        drops.append(table[:, 0])
        keeps.append(table[:, 1])
        counts, names = before, {state: i for i, state in enumerate(before)}
    return Automaton(tuple(reversed(drops)), tuple(reversed(keeps)), num_ends, next(iter(counts.values())), dearest)


def _move(rules: Rules, state: _State, place: _Place, kept: bool) -> _State | None:
    """The state after a block, or None when the rules forbid it."""
    index = place.block
    if (index in rules.protect and not kept) or (index in rules.remove and kept):
        return None
    run = 0 if place.first else state.run
    phase = 0 if place.first else state.phase
    run = 0 if kept else run + 1
    if rules.max_run is not None and run > rules.max_run:
        return None
    if rules.contiguous:
        if not kept and phase == 2:
            return None
        phase = phase if (kept and phase != 1) else 2 if kept else 1
    open_sets = dict(state.open)
    for number, members in enumerate(rules.together):
        if index in members:
            if open_sets.setdefault(number, kept) != kept:
                return None
            if index == max(members):
                del open_sets[number]
    used = state.used + (rules.costs[index] if rules.costs is not None else 1) * kept
    limit = rules.budget if rules.costs is not None else rules.keep
    if isinstance(limit, Mapping):
        if used > limit[place.name] or (place.last and used != limit[place.name]):
            return None
        used = 0 if place.last else used
    elif limit is not None and used > limit:
        return None
    # What no rule asks for would only multiply the states.
    run = run if rules.max_run is not None and not place.last else 0
    phase = phase if rules.contiguous and not place.last else 0
    return _State(used, run, phase, tuple(sorted(open_sets.items())))


def _done(rules: Rules, state: _State, least: int) -> bool:
    if rules.costs is not None:
        return state.used > least
    return isinstance(rules.keep, Mapping) or state.used == rules.keep
