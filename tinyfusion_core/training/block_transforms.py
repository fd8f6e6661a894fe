"""Activation checkpointing and compilation of blocks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..protocols.undisturbed import replaced_forward


@contextmanager
def block_transforms(blocks: Iterable[nn.Module], recompute: bool, compiled: bool) -> Iterator[None]:
    """Replace the `forward` of blocks while the context is open; their keys and hooks stay as they are.

    Open it around `Gates`, so that a gate calls the transformed forward: the gate's bookkeeping is neither recomputed
    nor compiled.

    Args:
        blocks: the modules.
        recompute: discard the activations inside a block and recompute them in the backward pass.
        compiled: run each block through `torch.compile`.
    """
    with ExitStack() as stack:
        for block in blocks if recompute or compiled else ():
            stack.enter_context(replaced_forward(block, _transformed(block.forward, recompute, compiled)))
        yield


def _transformed(plain: Callable[..., Any], recompute: bool, compiled: bool) -> Callable[..., Any]:
    # Gates give a block another number of rows in every step.
    run = torch.compile(plain, dynamic=True) if compiled else plain

    @functools.wraps(plain)  # whose signature says which arguments carry the batch
    def forward(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(run, *args, use_reentrant=False, **kwargs) if recompute else run(*args, **kwargs)

    return forward
