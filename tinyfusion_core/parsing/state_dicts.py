"""State dicts as training scripts leave them: among other entries, and under names that wrappers have changed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor

from ..errors import UserError, nearest


def chosen_entry(content: Any, containers: Sequence[str], key: str | None, where: str) -> dict[str, Tensor]:
    """Return the state dict in what a file holds.

    Args:
        content: what was read.
        containers: entries that hold a state dict, best first; the first one that exists is taken.
        key: the entry instead, through nested ones if it has dots; what is left of it is a prefix of the names.
        where: the file, for messages.

    Returns:
        Tensors by name, of any shape.

    Raises:
        UserError: there is no such entry, or no state dict.
    """
    if key is None:
        entries = content if isinstance(content, dict) else {}
        key = next((name for name in containers if isinstance(entries.get(name), dict)), "")
    content = _entry(content, key, where)
    if isinstance(content, dict) and all(isinstance(value, Tensor) for value in content.values()):
        return content
    found = ", ".join(map(str, list(content)[:6])) if isinstance(content, dict) else type(content).__name__
    raise UserError(f"{where}: holds no state dict (found: {found}; looked for {', '.join(containers)} or tensors)")


def _entry(content: Any, key: str, where: str) -> Any:
    """What is found on a dotted way into nested entries, the last of which may be a prefix of names."""
    names = key.split(".") if key else []
    while names and isinstance(content, dict):
        if names[0] in content:
            content = content[names.pop(0)]
            continue
        prefix = ".".join(names) + "."
        under = {str(name): value for name, value in content.items() if str(name).startswith(prefix)}
        if not under:
            known = {str(name).partition(".")[0] for name in content}
            raise UserError(f"{where}: has no entry '{key}'{nearest(names[0], known)}")
        return {name.removeprefix(prefix): value for name, value in under.items()}
    return content


def unwrapped(weights: Mapping[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """Return weights under the names that a network has for them, as far as wrappers alone changed these.

    torch.compile adds `_orig_mod` to the name of a network or block; DDP, Lightning and others put something in front
    of every name; `AveragedModel` counts in `n_averaged`.

    Args:
        weights: tensors by name, of any shape.
        names: the names of the network.
    """
    known = set(names)
    found = {name if name in known else _plain(name): v for name, v in weights.items()}
    if "n_averaged" not in known:
        found.pop("n_averaged", None)
    while known.isdisjoint(found) and len(heads := {name.partition(".")[0] for name in found}) == 1 > len(
        heads & {*found}
    ):
        found = {name.partition(".")[2]: v for name, v in found.items()}
    return found


def _plain(name: str) -> str:
    """A name without what torch.compile adds."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def without_ignored(
    weights: Mapping[str, Tensor], ignore: Sequence[str], names: Collection[str], key: str
) -> dict[str, Tensor]:
    """Return weights without those that are to be ignored.

    Args:
        weights: tensors by name, of any shape.
        ignore: patterns of names, with `*`.
        names: the names of the network, which cannot be ignored.
        key: the option that the patterns are from, for messages.

    Raises:
        UserError: a pattern matches nothing, or what the network needs.
    """
    for pattern in ignore:
        matched = [name for name in weights if fnmatchcase(name, pattern)]
        if needed := [name for name in matched if name in set(names)]:
            raise UserError(f"{key}: '{pattern}' matches {needed[0]}, which the network needs")
        if not matched:
            raise UserError(f"{key}: '{pattern}' matches no name of the checkpoint")
    return {name: v for name, v in weights.items() if not any(fnmatchcase(name, pattern) for pattern in ignore)}
