"""Paths of blocks and of the branches inside them, and the lists in which they stand."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...errors import UserError

if TYPE_CHECKING:  # a decision is read without torch
    from torch import nn

_BRANCH = re.compile(r"(?P<block>(?:(?P<list>.+)\.)?(?P<index>\d+))\.(?P<branch>[^.\d][^.]*(?:\.[^.\d][^.]*)*)")


def list_of(path: str) -> str:
    """Return the list of a block: `blocks` of `blocks.3`; or of a branch: `blocks.*.attn` of `blocks.3.attn`."""
    found = _BRANCH.fullmatch(path)
    return path.rpartition(".")[0] if found is None else f"{found['list'] or ''}.*.{found['branch']}".lstrip(".")


def numbers_of(blocks: Sequence[str]) -> list[int]:
    """Return the numbers that people know blocks by: their indices; of branches the numbers of their blocks."""
    found = [_BRANCH.fullmatch(path) for path in blocks]
    return [i if branch is None else int(branch["index"]) for i, branch in enumerate(found)]


def word_for(blocks: Sequence[str]) -> str:
    """Return what these are, for messages: blocks, or branches."""
    return "branches" if any(block_of(path) != path for path in blocks) else "blocks"


def block_of(path: str) -> str:
    """Return the path of the block in which a branch is, `blocks.3` of `blocks.3.attn`; of a block, itself."""
    found = _BRANCH.fullmatch(path)
    return path if found is None else found["block"]


def expand(model: nn.Module, paths: Sequence[str]) -> list[str]:
    """Replace every `"list.*"` by the paths of the list's children and check that each path leads to a module.

    Raises:
        UserError: a path does not exist, a block is named twice, or one lies inside another.
    """
    out: list[str] = []
    for path in paths:
        parent, star, rest = path.partition(".*")
        if rest:
            raise UserError(
                f"block path '{path}': '*' stands for all children of a list, and nothing follows it; "
                f"name '{parent}.*', or every block by itself"
            )
        try:
            module = model.get_submodule(parent)
        except AttributeError as e:
            raise UserError(
                f"block path '{path}': {type(model).__name__} has no module '{parent}' ({e}); name one that it has"
            ) from None
        out += [f"{parent}.{name}" for name, _ in module.named_children()] if star else [parent]
    if len(set(out)) != len(out):
        twice = sorted({p for p in out if out.count(p) > 1})
        raise UserError(f"block path(s) named twice: {', '.join(twice)}; name every block once")
    for path in out:
        if inside := [other for other in out if other.startswith(f"{path}.")]:
            raise UserError(f"block path '{inside[0]}' lies inside of '{path}'; name one of the two")
    return out


def block_lists(blocks: Sequence[str]) -> dict[str, list[int]]:
    """Group the paths of blocks or branches by `list_of`: name of the list -> positions in `blocks`."""
    lists: dict[str, list[int]] = {}
    for i, path in enumerate(blocks):
        lists.setdefault(list_of(path), []).append(i)
    return lists


def list_lengths(blocks: Sequence[str]) -> dict[str, int]:
    """Count the paths of blocks or branches by `list_of`: name of the list -> number."""
    return {name: len(members) for name, members in block_lists(blocks).items()}
