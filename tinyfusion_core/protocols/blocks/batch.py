"""Which arguments of blocks carry the batch, found by running the network at two sizes or named by a plugin."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...errors import UserError
from .call import leaves_of, positional_names

BatchDim = Callable[[str, str], "int | None"]
"""(block path, argument) -> the argument's batch dimension, or None if all samples share it."""


def named_batch_dims(names: Mapping[str, int]) -> BatchDim:
    """Return the batch dimensions that a plugin declares, by argument (`x`) or part of one (`rotary.0`).

    Arguments that are not named are shared by all samples.
    """
    return lambda path, leaf: names.get(leaf, names.get(leaf.partition(".")[0]))


def probed_batch_dims(model: nn.Module, blocks: Sequence[str], run: Callable[[int], object]) -> BatchDim:
    """Find the batch dimensions by running the model at two batch sizes and comparing shapes.

    One size would not do: 16 tokens and a batch of 16 look alike.

    Args:
        model: the network.
        blocks: paths of the blocks.
        run: runs the model on that many samples.

    Raises:
        UserError: a dimension grows with the batch but is not one entry per sample, nor several that stand together.
    """
    sizes = (2, 3)
    seen: dict[int, dict[tuple[str, str], _Seen]] = {}
    for size in sizes:
        shapes = seen[size] = {}
        hooks = [_record_shapes(model.get_submodule(path), path, size, shapes) for path in blocks]
        try:
            with torch.no_grad():
                run(size)
        finally:
            for hook in hooks:
                hook.remove()
    first, second = (seen[size] for size in sizes)
    dims = {key: _batch_dim(key, one, second.get(key, one), sizes) for key, one in first.items()}

    def batch_dim(path: str, leaf: str) -> int | None:
        try:
            return dims[path, leaf]
        except KeyError:
            raise UserError(
                f"block '{path}' was called with an argument '{leaf}' that did not occur while probing; "
                "name the batch arguments in 'batched'"
            ) from None

    return batch_dim


class _Seen(NamedTuple):
    """An argument at one batch size: its shape, and what may be the entries of the first two samples."""

    shape: torch.Size
    of_two: Tensor | None


def _batch_dim(key: tuple[str, str], one: _Seen, other: _Seen, sizes: tuple[int, int]) -> int | None:
    """The dimension of an argument that grows with the batch. Raises UserError if that is not by its samples."""
    changed = [d for d, (a, b) in enumerate(zip(one.shape, other.shape, strict=False)) if a != b]
    by_sample = all((one.shape[d], other.shape[d]) == sizes or _several(one, other, d, sizes) for d in changed)
    if len(one.shape) != len(other.shape) or len(changed) > 1 or not by_sample:
        raise UserError(
            f"block '{key[0]}', argument '{key[1]}': {list(one.shape)} for a batch of 2 and {list(other.shape)} for 3 "
            "is not one entry per sample; name the batch arguments in 'batched'"
        )
    return changed[0] if changed else None


def _several(one: _Seen, other: _Seen, dim: int, sizes: tuple[int, int]) -> bool:
    """Whether it is as many entries for each sample at both sizes, sample by sample."""
    times = one.shape[dim] // sizes[0]
    if dim != 0 or times < 2 or (one.shape[0], other.shape[0]) != (times * sizes[0], times * sizes[1]):
        return False
    assert one.of_two is not None and other.of_two is not None
    return one.of_two.is_meta or torch.equal(one.of_two, other.of_two)


def _record_shapes(block: nn.Module, path: str, size: int, shapes: dict[tuple[str, str], _Seen]) -> Any:
    names = positional_names(block.forward)

    def seen(v: Tensor) -> _Seen:
        several = v.ndim > 0 and v.shape[0] > size and v.shape[0] % size == 0
        return _Seen(v.shape, v[: 2 * (v.shape[0] // size)].detach().clone() if several else None)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        leaves, _ = leaves_of(names, args, kwargs)
        shapes.update({(path, name): seen(v) for name, v in leaves.items() if isinstance(v, Tensor)})

    return block.register_forward_pre_hook(hook, with_kwargs=True)
