"""Hooks that compare a network's stream before and after blocks, or with and without a branch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...protocols.blocks.call import Call, positional_names
from ...protocols.blocks.streams import Stream
from ...protocols.undisturbed import replaced_forward


class Measure(Protocol):
    """A comparison of two streams, accumulated over batches without storing them."""

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add a batch.

        Args:
            x: (..., channels) stream before the blocks.
            y: (..., channels) stream after them.
        """

    def state(self) -> Any:
        """Return the accumulated state, to be sent to another process."""

    def merge(self, state: Any) -> None:
        """Add the state of another measure."""

    def value(self) -> float:
        """Return the result over all batches added so far."""
        ...


def watch_branch(
    measures: Sequence[Measure], streams: Sequence[Stream], branch: nn.Module, skipped: Callable[..., Any]
) -> Callable[..., None]:
    """Return a hook for after the block of a branch, which runs the block again without it.

    Args:
        measures: one for each stream; they are given the stream, (batch, ...), without the branch and with it.
        streams: the block's streams.
        branch: the branch's module.
        skipped: what it does when it is skipped.
    """

    def after(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        with replaced_forward(branch, skipped):
            without = block.forward(*args, **kwargs)
        for measure, stream in zip(measures, streams, strict=True):
            _add(measure, stream.of(without), stream.of(output))

    return after


def _add(measure: Measure, x: Tensor, y: Tensor) -> None:
    """Add a batch in full precision: bf16 cannot tell two blocks apart that are nearly the identity."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        measure.add(x.to(dtype), y.to(dtype))


def watch_span(
    measures: Sequence[Measure], streams: Sequence[Stream], first: nn.Module, path: str
) -> tuple[Callable[..., None], Callable[..., None]]:
    """Return hooks for before the first and after the last block of a span.

    Args:
        measures: one for each stream; they are given the stream, (batch, ...), before the span and after it.
        streams: the streams of the span's blocks.
        first: the first block.
        path: its path.
    """
    names = positional_names(first.forward)
    entered: list[Tensor] = []

    def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = Call(block.forward, names, args, kwargs, lambda leaf: None)
        # Copies: the model may go on in place.
        entered[:] = [call.stream(stream, path).clone() for stream in streams]

    def after(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for measure, stream, x in zip(measures, streams, entered, strict=True):
            _add(measure, x, stream.of(output))
        entered.clear()

    return before, after
