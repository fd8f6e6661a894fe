"""Records the outputs of blocks while a network runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ...errors import UserError
from .streams import Streams, streams_of


@contextmanager
def captured(model: nn.Module, paths: Sequence[str], streams: Streams) -> Iterator[list[list[Tensor]]]:
    """Record the outputs of these blocks while the context is open: for every path, each stream's tensor, (batch, ...).

    Raises:
        UserError: the model changes a block's output in place, so that the recorded tensor is no longer that output.
    """
    values: list[list[Tensor]] = [[] for _ in paths]
    versions: dict[str, list[int]] = {}

    def keep(slot: int, output: Any) -> None:
        values[slot][:] = [stream.of(output) for stream in streams_of(streams, paths[slot])]
        versions[paths[slot]] = [t._version for t in values[slot]]

    handles = [
        model.get_submodule(path).register_forward_hook(lambda _m, _args, output, slot=slot: keep(slot, output))
        for slot, path in enumerate(paths)
    ]
    try:
        yield values
    finally:
        for handle in handles:
            handle.remove()
    for path, tensors in zip(paths, values, strict=True):
        if tensors and versions[path] != [t._version for t in tensors]:
            raise UserError(f"the network changes the output of '{path}' in place; distil with OutputKD, or other taps")
