"""The dense formula of gating, as the reference for `Gates`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..protocols.blocks.call import entering, in_the_form_of, items_of
from ..protocols.blocks.streams import FIRST, Streams, streams_of
from .assertions import removing


@contextmanager
def dense_formula(model: nn.Module, blocks: Sequence[str], mask: Tensor, streams: Streams = FIRST) -> Iterator[None]:
    """Gate by the dense formula: every block is computed for every sample, `m * f(x) + (1 - m) * x`.

    `Gates` must agree with it; benchmarks compare with its cost.

    Args:
        model: the network.
        blocks: paths of the blocks.
        mask: (batch, num_blocks) of any numbers.
        streams: the blocks' residual streams.
    """

    def mix(j: int, path: str, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        declared = streams_of(streams, path)
        items = items_of(output, declared) or {}
        for stream, before in entering(block, args, kwargs, streams, path):
            m = mask[:, j].view(-1, *[1] * (before.ndim - 1))
            i = stream.item
            items[i] = items[i] * m + (0 if stream.added else before * (1 - m))
        return in_the_form_of(output, items, declared)

    with removing(
        model.get_submodule(path).register_forward_hook(partial(mix, j, path), with_kwargs=True)
        for j, path in enumerate(blocks)
    ):
        yield
