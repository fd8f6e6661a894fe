"""The blocks of a decision in a row, as a page shows them: kept or removed, list by list and choice by choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..protocols.blocks.paths import block_lists, numbers_of
from ..pruning.decision import Decision


@dataclass(frozen=True)
class Block:
    """One block: its number, whether it is kept, and its path with its probability."""

    number: int
    kept: bool
    told: str


@dataclass(frozen=True)
class Row:
    """The blocks of one block list.

    Attributes:
        name: path of the list; empty if there is no other.
        groups: its blocks, those that were decided together beside each other, with the confidence of that.
    """

    name: str
    groups: Sequence[tuple[Sequence[Block], str]]


def strip_of(decision: Decision) -> list[Row]:
    """Return the rows of a decision's strip."""
    lists = block_lists(decision.blocks)
    return [Row(name if len(lists) > 1 else "", _groups(decision, members)) for name, members in lists.items()]


def _groups(decision: Decision, members: Sequence[int]) -> list[tuple[Sequence[Block], str]]:
    """The choices about a list's blocks, if they are about nothing else; all of its blocks otherwise."""
    pairs = list(zip(decision.choices, decision.confidences, strict=False))
    within = [(blocks, f"{confidence:.2f}") for blocks, confidence in pairs if set(blocks) <= set(members)]
    if [i for blocks, _ in within for i in blocks] != list(members):
        within = [(tuple(members), "")]
    return [([_block(decision, i) for i in blocks], confidence) for blocks, confidence in within]


def _block(decision: Decision, index: int) -> Block:
    kept = index in decision.kept
    told = f"{decision.blocks[index]}: {'kept' if kept else 'removed'}"
    if decision.marginals:
        told += f", probability to be kept {decision.marginals[index]:.2f}"
    return Block(numbers_of(decision.blocks)[index], kept, told)
