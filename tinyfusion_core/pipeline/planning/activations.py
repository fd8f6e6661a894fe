"""Counts the activations that a forward pass saves for its backward pass, on real or fake tensors."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn
from torch.utils._pytree import tree_leaves

from ...protocols.undisturbed import replaced_forward

Storages = dict[int, UntypedStorage]
"""Storages by address; kept alive, so that no address is used twice."""


@dataclass(frozen=True)
class Saved:
    """Bytes that a forward pass saves for its backward pass.

    Attributes:
        whole: without checkpointing.
        checkpointed: with every block checkpointed: the blocks' inputs, and the largest block when it is recomputed.
    """

    whole: int
    checkpointed: int


def saved_by(run: Callable[[], Any], model: nn.Module, blocks: Sequence[str], precision: str = "fp32") -> Saved:
    """Count the bytes that a forward pass saves for its backward pass, on real or fake tensors.

    Args:
        run: the forward pass; its result is kept alive until everything is counted.
        model: the network, whose parameters and buffers do not count.
        blocks: paths of its blocks.
        precision: precision of the autocast; `auto` is bf16, because plans are made for GPUs.
    """
    own = {_address(t) for t in (*model.parameters(), *model.buffers())}
    outside: Storages = {}
    inside: list[Storages] = [{} for _ in blocks]
    entering: Storages = {}
    current = [outside]

    def keep(t: Tensor, where: Storages) -> None:
        if _address(t) not in own:
            where[_address(t)] = t.untyped_storage()

    def pack(t: Tensor) -> Tensor:
        keep(t, current[-1])
        return t

    def enter(j: int, args: Any) -> None:
        current.append(inside[j])
        for leaf in tree_leaves(args):
            if isinstance(leaf, Tensor) and torch.is_grad_enabled():
                keep(leaf, entering)

    cast = torch.autocast("cpu", torch.bfloat16, enabled=precision != "fp32")
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
    with _around(model, blocks, enter, current.pop), cast, hooks, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # kernels' advice on speed
        output = run()
    kept = {**outside, **entering}
    del output
    return Saved(
        _size({**outside, **{k: v for block in inside for k, v in block.items()}}),
        _size(kept) + max((_size({k: v for k, v in block.items() if k not in kept}) for block in inside), default=0),
    )


@contextmanager
def _around(
    model: nn.Module, blocks: Sequence[str], enter: Callable[[int, Any], None], leave: Callable[[], Any]
) -> Iterator[None]:
    """Call `enter` and `leave` around a block's own forward, inside whatever replaces it later."""
    with ExitStack() as stack:
        for j, path in enumerate(blocks):
            block = model.get_submodule(path)

            def noted(*args: Any, _plain: Any = block.forward, _j: int = j, **kwargs: Any) -> Any:
                enter(_j, (args, kwargs))
                try:
                    return _plain(*args, **kwargs)
                finally:
                    leave()

            stack.enter_context(replaced_forward(block, functools.wraps(block.forward)(noted)))
        yield


def _address(t: Tensor) -> int:
    address: int = t.untyped_storage()._cdata
    return address


def _size(storages: Storages) -> int:
    return sum(storage.nbytes() for storage in storages.values())
