"""Runs a network as far as a block that is asked for."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ...protocols.backbone import Backbone
from ...protocols.blocks.streams import streams_of
from .output_layer import BlockCall


class _Reached(Exception):
    """Ends a forward pass at the block that was asked for."""


def call_of(backbone: Backbone, model: nn.Module, path: str, run: Callable[[], object]) -> BlockCall:
    """Return the call of a block; what comes behind it is not run.

    Args:
        backbone: the model family.
        model: the network.
        path: path of the block.
        run: runs the network.
    """
    found: list[BlockCall] = []

    def keep(call: BlockCall) -> None:
        found.append(call)
        raise _Reached

    hook = when_called(backbone, model, path, keep)
    try:
        with suppress(_Reached):
            run()
    finally:
        hook.remove()
    return found[0]


def when_called(backbone: Backbone, model: nn.Module, path: str, do: Callable[[BlockCall], None]) -> RemovableHandle:
    """Do something with a block's call whenever it has been called.

    Args:
        backbone: the model family.
        model: the network.
        path: path of the block.
        do: is given the call.

    Returns:
        What removes the hook.
    """
    streams = streams_of(backbone.streams, path)

    def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        do(BlockCall(block, args, kwargs, output, streams))

    return model.get_submodule(path).register_forward_hook(hook, with_kwargs=True)


def device_of(model: nn.Module) -> torch.device:
    """Return the device on which a network is."""
    return next(model.parameters()).device
