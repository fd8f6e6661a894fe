"""The residual streams that blocks hand on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...errors import UserError
from .paths import list_of


@dataclass(frozen=True)
class Stream:
    """One residual stream of a block: the tensor that a skipped block returns unchanged.

    Args:
        argument: name or position of the block's argument that carries the stream; `state.x` is the entry `x` of an
            argument `state` that is a mapping.
        output: index or key in the block's output; None if the output is the stream itself, or its first item.
        added: whether the output is not the stream but what is added to it: a skipped branch gives zeros, of the
            argument's shape.
        batch_dim: dimension of the tensor that counts the samples; the first, unless tokens or several copies of the
            stream come before.
    """

    argument: str | int = 0
    output: int | str | None = None
    added: bool = False
    batch_dim: int = 0

    @property
    def item(self) -> int | str:
        """Index or key of the stream in a block's output."""
        return 0 if self.output is None else self.output

    def of(self, output: Any) -> Tensor:
        """Return the stream, (batch, ...), from a block's output: a tensor, or a tuple or mapping that contains it."""
        return self.by_sample(output if isinstance(output, Tensor) else output[self.item])

    def by_sample(self, x: Tensor) -> Tensor:
        """Return the stream's tensor with the samples first, (batch, ...)."""
        return x.movedim(self.batch_dim, 0) if self.batch_dim else x

    def as_given(self, x: Tensor) -> Tensor:
        """Return such a tensor, (batch, ...), as the block takes and returns it."""
        return x.movedim(0, self.batch_dim) if self.batch_dim else x


Streams = Sequence[Stream] | Mapping[str, Sequence[Stream]]
"""The residual streams of all blocks, or of every block list by its path."""

Unneeded = Sequence[int | str] | Mapping[int | str, Sequence[str]]
"""Outputs of a block that are no stream; or with the names of arguments in which the next block may be given each."""

FIRST: Streams = (Stream(),)
"""One stream: the first argument of a block, and its output."""


def streams_of(streams: Streams, path: str) -> Sequence[Stream]:
    """Return the streams of the block or branch at a path.

    Raises:
        UserError: none are declared for its list.
    """
    if not isinstance(streams, Mapping):
        return streams
    names = list_of(path), path.rpartition(".")[0]
    if (name := next((name for name in names if name in streams), None)) is None:
        raise UserError(f"no streams are declared for the block list '{names[0]}'; name them in 'streams'")
    return streams[name]
