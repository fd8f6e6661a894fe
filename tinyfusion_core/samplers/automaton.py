"""The set of masks that obey given demands, as a finite automaton that reads the blocks in order.

A state holds what the past decides about the future: how much is kept so far, how many blocks in a row were dropped
and so on. Every path through the automaton is a mask that obeys all demands, and every such mask is one path;
distributions over masks are dynamic programs over it (see conditional_poisson.py).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import UserError
from .demands import Demands, Segment

MAX_STATES = 2_000_000


class _State(NamedTuple):
    used: int = 0  # blocks kept of this segment, or the cost of all that are kept
    run: int = 0  # dropped blocks just before, in this list
    phase: int = 0  # contiguous: 0 before the dropped run, 1 in it, 2 after
    open: tuple[tuple[int, bool], ...] = ()  # sets of `together` that have begun and not ended, and how


class _Place(NamedTuple):
    """Position of a block."""

    block: int
    last: bool  # of its list, where runs of dropped blocks end
    segment: Segment | None
    closes: bool  # the last of its segment
    kept: int  # in the segments before


@dataclass(frozen=True, eq=False)
class Automaton:
    """The masks that obey some demands.

    Attributes:
        drop: for every block a table, (states before,): the state after it if the block is dropped. The number of
            states after it stands for "forbidden".
        keep: the same if it is kept.
        num_ends: number of states after the last block.
        num_masks: number of masks.
        dearest: with costs, the largest cost of a mask.
    """

    drop: tuple[Tensor, ...]
    keep: tuple[Tensor, ...]
    num_ends: int
    num_masks: int
    dearest: int

    @property
    def num_blocks(self) -> int:
        """Number of blocks of a mask."""
        return len(self.drop)

    def accepts(self, kept: Collection[int]) -> bool:
        """Return whether the mask that keeps exactly these blocks obeys the demands."""
        state = 0
        for i, (drop, keep) in enumerate(zip(self.drop, self.keep, strict=True)):
            table = keep if i in kept else drop
            if state >= len(table):  # it was forbidden
                return False
            state = int(table[state])
        return state < self.num_ends

    def accepts_within(self, kept: Collection[int]) -> bool:
        """Return whether some mask that obeys the demands keeps only blocks among these."""
        reached = torch.tensor([0])
        for i, (drop, keep) in enumerate(zip(self.drop, self.keep, strict=True)):
            after = torch.cat([drop[reached], keep[reached]]) if i in kept else drop[reached]
            possible = {state for state in after.tolist() if state < self._num_after(i)}
            reached = torch.tensor(sorted(possible), dtype=torch.long)
        return len(reached) > 0

    def best(self, weights: Sequence[int], late: bool = False) -> tuple[int, ...]:
        """Return the kept blocks of the mask with the largest sum of weights; if tied, earlier (or `late`) blocks."""
        values: list[list[int | None]] = [[0] * self.num_ends]
        tables = [(drop.tolist(), keep.tolist()) for drop, keep in zip(self.drop, self.keep, strict=True)]
        for weight, (drop, keep) in zip(reversed(weights), reversed(tables), strict=True):
            after = [*values[-1], None]  # forbidden
            ways = [(after[a], _plus(after[b], weight)) for a, b in zip(drop, keep, strict=True)]
            values.append([max((v for v in pair if v is not None), default=None) for pair in ways])
        values.reverse()
        state, kept = 0, []
        for i, (drop, keep) in enumerate(tables):
            after = [*values[i + 1], None]
            dropping, keeping = after[drop[state]], _plus(after[keep[state]], weights[i])
            if dropping is None or (keeping is not None and (keeping > dropping or (keeping == dropping and not late))):
                kept.append(i)
                state = keep[state]
            else:
                state = drop[state]
        return tuple(kept)

    def masks(self) -> Iterator[tuple[int, ...]]:
        """Yield the kept blocks of all masks, in lexicographic order."""
        waiting: list[tuple[int, tuple[int, ...], int]] = [(0, (), 0)]  # block, those kept before it, state
        while waiting:
            i, kept, state = waiting.pop()
            if i == self.num_blocks:
                yield kept
                continue
            for table, with_it in ((self.drop[i], kept), (self.keep[i], (*kept, i))):
                after = int(table[state])
                if after < self._num_after(i):
                    waiting.append((i + 1, with_it, after))

    def _num_after(self, i: int) -> int:
        """The number of states after block i."""
        return self.num_ends if i + 1 == self.num_blocks else len(self.drop[i + 1])


def _plus(value: int | None, weight: int) -> int | None:
    return None if value is None else value + weight


@lru_cache(maxsize=16)
def automaton_of(demands: Demands, key: str) -> Automaton | None:
    """Build the automaton of the masks that obey; None if there is no such mask. `key` names the setting in messages.

    Raises:
        UserError: it would need more than `MAX_STATES` states.
    """
    paths = _explore(demands, key)
    found = _prune(demands, *paths)
    if found is None or demands.costs is None:
        return found
    return _prune(demands, *paths, least=found.dearest - demands.slack())


_Layers = list[dict[_State, int]]
_Moves = list[list[tuple[_State | None, _State | None]]]


def _places(demands: Demands) -> Iterator[_Place]:
    ends = [i == depth - 1 for depth in demands.lists for i in range(depth)]
    before = accumulate((segment.kept for segment in demands.segments), initial=0)
    parts: list[tuple[Segment | None, bool, int]] = [
        (segment, i == segment.size - 1, kept)
        for segment, kept in zip(demands.segments, before, strict=False)  # the last is the number of all
        for i in range(segment.size)
    ]
    for block, (last, part) in enumerate(zip(ends, parts or [(None, False, 0)] * len(ends), strict=True)):
        yield _Place(block, last, *part)


def _explore(demands: Demands, key: str) -> tuple[_Layers, _Moves]:
    """The states before and after every block, and where dropping and keeping it lead from each."""
    layers: _Layers = [{_State(): 0}]
    moves: _Moves = []
    num_states = 1
    for place in _places(demands):
        following: dict[_State, int] = {}
        out: list[tuple[_State | None, _State | None]] = []
        for state in layers[-1]:
            pair = _move(demands, state, place, False), _move(demands, state, place, True)
            for after in pair:
                if after is not None:
                    following.setdefault(after, len(following))
            out.append(pair)
        moves.append(out)
        layers.append(following)
        num_states += len(following)
        if num_states > MAX_STATES:
            fix = "fewer or closer blocks in together" if demands.costs is None else "costs of smaller numbers"
            raise UserError(f"{key}: these need too many states; give {fix}")
    return layers, moves


def _prune(demands: Demands, layers: _Layers, moves: _Moves, least: int = 0) -> Automaton | None:
    """Keep the states from which an end with a cost above `least` can be reached, and count the masks."""
    counts: dict[_State, int] = {state: 1 for state in layers[-1] if demands.costs is None or state.used > least}
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


def _move(demands: Demands, state: _State, place: _Place, kept: bool) -> _State | None:
    """The state after a block, or None if the demands forbid it.

    A part of the state that no demand needs is always 0, because it would only multiply the states.
    """
    if place.block in (demands.remove if kept else demands.protect):
        return None
    kinds = demands.period
    if kept and kinds and kinds[place.block % len(kinds)] != kinds[(place.kept + state.used) % len(kinds)]:
        return None
    used = _used(demands, state.used, place, kept)
    run = _run(demands, state.run, kept)
    phase = _phase(demands, state.phase, kept)
    open_sets = _open_sets(demands, state.open, place.block, kept)
    if used is None or run is None or phase is None or open_sets is None:
        return None
    return _State(used, 0 if place.last else run, 0 if place.last else phase, open_sets)


def _used(demands: Demands, used: int, place: _Place, kept: bool) -> int | None:
    """What is used after a block; None if that is too much, or too little at the end of a segment."""
    if place.segment is None:
        assert demands.costs is not None
        used += demands.costs[place.block] * kept
        return used if used <= demands.budget else None
    used += kept
    if used > place.segment.kept or (place.closes and used != place.segment.kept):
        return None
    return 0 if place.closes else used


def _run(demands: Demands, before: int, kept: bool) -> int | None:
    """Number of dropped blocks in a row after a block; None if too many; 0 if there is no limit."""
    if kept or demands.max_run is None:
        return 0
    return before + 1 if before < demands.max_run else None


def _phase(demands: Demands, before: int, kept: bool) -> int | None:
    """The phase after a block; None if it starts a forbidden second run of dropped blocks; 0 if runs are free."""
    if not demands.contiguous:
        return 0
    if kept:
        return 2 if before else 0
    return 1 if before < 2 else None


def _open_sets(
    demands: Demands, before: tuple[tuple[int, bool], ...], block: int, kept: bool
) -> tuple[tuple[int, bool], ...] | None:
    """The sets of `together` that are open after a block; None if the block differs from the others of its set."""
    sets = dict(before)
    for number, members in enumerate(demands.together):
        if block in members:
            if sets.setdefault(number, kept) != kept:
                return None
            if block == max(members):
                del sets[number]
    return tuple(sorted(sets.items()))
