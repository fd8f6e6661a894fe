"""N:M patterns: keep N of every group of M consecutive blocks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import UserError

Pair = tuple[int, int]
Pattern = Pair | list[Pair | str] | dict[str, Pair | list[Pair | str] | str] | str
"""A pattern as users write it: one pair for every group, a list with a pair for each group, or either by block list.

`"2:4"` is the pair (2, 4).
"""

Parsed = Pair | list[Pair] | dict[str, Pair | list[Pair]]

MAX_OPTIONS = 20_000


def split_groups(pattern: Pattern, lists: Mapping[str, int]) -> list[Pair]:
    """Return the (keep, of) pair of every group, over all lists in order.

    Raises:
        UserError: the pattern is malformed or does not cover a list exactly; names list, depth and group.
    """
    parsed = parse_pattern(pattern)
    if isinstance(parsed, dict):
        unknown, left = set(parsed) - set(lists), set(lists) - set(parsed)
        if unknown or left:
            raise UserError(
                f"search.pattern: names the block list(s) {', '.join(sorted(parsed))}; "
                f"the backbone has {', '.join(lists)}: give each of them a pattern"
            )
        by_list = parsed
    else:
        by_list = dict.fromkeys(lists, parsed)
    groups: list[Pair] = []
    for name, depth in lists.items():
        part = by_list[name]
        if isinstance(part, tuple):
            keep, of = part
            if depth % of:
                raise UserError(
                    f"search.pattern: [{keep}, {of}] does not fit '{name}' with {depth} blocks: "
                    f"group {depth // of + 1} would need blocks {depth - depth % of} to {depth - depth % of + of - 1}. "
                    f"{_fitting(keep, of, depth)}"
                )
            part = [(keep, of)] * (depth // of)
        covered = 0
        for g, (_, of) in enumerate(part):
            covered += of
            if covered > depth:
                raise UserError(
                    f"search.pattern: group {g + 1} of {len(part)} ends at block {covered - 1}, "
                    f"but '{name}' has {depth} blocks"
                )
        if covered < depth:
            raise UserError(
                f"search.pattern: its {len(part)} groups cover {covered} of the {depth} blocks of '{name}'; "
                f"add groups for blocks {covered} to {depth - 1} ([M, M] keeps M blocks for certain)"
            )
        groups += part
    return groups


def parse_pattern(value: Any) -> Parsed:
    """Check a pattern as parsed from YAML.

    Raises:
        UserError: it is not a pattern.
    """
    if isinstance(value, dict):
        return {str(name): _parse_list(name, part) for name, part in value.items()}
    return _parse_list("", value)


def _parse_list(name: object, value: Any) -> Pair | list[Pair]:
    """The pattern of one block list, or of all."""
    key = f"search.pattern.{name}" if name else "search.pattern"
    if isinstance(value, str) and ":" in value:
        value = _from_ratio(value)
    if _holds_only(int, value) and len(value) == 2:
        return _parse_pair(key, int(value[0]), int(value[1]))
    if _holds_only(Sequence, value):
        parts = [_parse_list(name, v) for v in value]
        pairs = [p for p in parts if isinstance(p, tuple)]
        if len(pairs) == len(parts):
            return pairs
    raise UserError(
        f"{key}: {value!r} is no pattern. Give [keep, of], as [2, 4]; "
        "a list with such a pair for each group; or a mapping from block list to either"
    )


def _from_ratio(text: str) -> list[int | str]:
    """The parts of `2:4`, numbers as integers."""
    return [int(part) if part.strip().isdigit() else part for part in text.split(":")]


def _holds_only(kind: type, value: Any) -> bool:
    """Whether a value is a non-empty list of items of this kind."""
    listed = isinstance(value, Sequence) and not isinstance(value, str)
    return listed and len(value) > 0 and all(isinstance(v, kind) for v in value)


def _parse_pair(key: str, keep: int, of: int) -> Pair:
    if not 0 <= keep <= of or of == 0:
        raise UserError(f"{key}: [{keep}, {of}]: cannot keep {keep} of {of} blocks")
    if math.comb(of, keep) > MAX_OPTIONS:
        raise UserError(
            f"{key}: [{keep}, {of}] has {math.comb(of, keep):,} options in one group "
            f"(limit {MAX_OPTIONS:,}); use smaller groups"
        )
    return keep, of


def _fitting(keep: int, of: int, depth: int) -> str:
    fits = [m for m in range(2, depth + 1) if depth % m == 0]
    best = min(fits, key=lambda m: abs(m - of), default=depth)
    nearest = [max(1, round(keep * best / of)), best]
    return f"Group sizes that divide {depth}: {', '.join(map(str, fits))}; nearest: {nearest}"
