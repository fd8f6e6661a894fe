"""Residual branches inside blocks, attention and feed-forward, which can go by themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from .call import Call, positional_names
from .streams import Stream

REMOVED = "removed_branches"
"""Key of a network's config: the branches that were removed, by path."""


@dataclass(frozen=True)
class Branch:
    """A module inside a block whose output is added to the stream, perhaps times something, but not normalised again.

    Args:
        path: path of the module in its block.
        argument: name or position of an argument that has the shape of the output.
        outputs: how many things it returns, the first of which is added; None: that one, not in a tuple.
    """

    path: str
    argument: str | int = 0
    outputs: int | None = None

    @property
    def streams(self) -> Sequence[Stream]:
        """What is left of it when it is skipped."""
        return (Stream(self.argument, added=True),)


class Removed(nn.Module):
    """Stands in the place of a removed branch, and adds nothing.

    Args:
        branch: what was there.
        names: names of the positional parameters of its forward.
    """

    def __init__(self, branch: Branch, names: Sequence[str]) -> None:
        super().__init__()
        self.branch, self.names = branch, list(names)

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor | None, ...]:
        """Return zeros of the shape, (batch, ...), of the branch's argument, in the form of its output."""
        call = Call(self.forward, self.names, args, kwargs, lambda leaf: None)
        zeros = torch.zeros_like(call.stream(self.branch.streams[0], self.branch.path))
        return zeros if self.branch.outputs is None else (zeros, *[None] * (self.branch.outputs - 1))


def removed_branches(model: nn.Module) -> dict[str, Branch]:
    """Return the branches that a network has lost, by path."""
    return {path: module.branch for path, module in model.named_modules() if isinstance(module, Removed)}


def remove_branches(model: nn.Module, branches: Mapping[str, Branch]) -> None:
    """Take branches out of a network, by path, in place."""
    for path, branch in branches.items():
        owner, _, name = path.rpartition(".")
        removed = Removed(branch, positional_names(model.get_submodule(path).forward))
        setattr(model.get_submodule(owner), name, removed)
