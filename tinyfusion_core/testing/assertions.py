"""Assertions with messages for plugin authors, and helpers that watch side effects."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

ROUNDINGS = 32
"""Rounding tolerance: units of rounding of the largest number that went into a result."""


def expect(holds: bool, message: str) -> None:
    """Raise AssertionError with this message unless a condition holds."""
    if not holds:
        raise AssertionError(message)


def expect_same(before: Mapping[str, Tensor], after: Mapping[str, Tensor], message: str) -> None:
    """Check that named tensors of any shape are equal bit for bit, with the same names in the same order."""
    expect(list(before) == list(after), f"{message}: {sorted(set(before) ^ set(after))[:3]}")
    differ = [k for k, t in before.items() if t.shape != after[k].shape or not torch.equal(t, after[k])]
    expect(not differ, f"{message}: {differ[:3]}")


def expect_close(found: Tensor, expected: Tensor, tolerance: float, message: str, size: float) -> None:
    """Check that tensors are equal up to a share of the largest value, and to the rounding of their operands.

    Args:
        found: a tensor of any shape; integers must be equal.
        expected: a tensor of the same shape.
        tolerance: the share.
        message: what is wrong otherwise.
        size: the largest number added or subtracted on the way; larger than the values if they cancel.
    """
    expect(found.shape == expected.shape, f"{message}: {tuple(found.shape)} and {tuple(expected.shape)}")
    if torch.equal(found, expected):
        return
    expect(found.is_floating_point(), message)
    error, scale = float((found - expected)[found != expected].abs().max()), largest(expected)
    rounding = ROUNDINGS * torch.finfo(found.dtype).eps * size
    expect(error <= tolerance * scale + rounding, f"{message} (off by {error:.2g} of {scale:.2g})")


def largest(x: Tensor) -> float:
    """Return the largest finite absolute value of a tensor of any shape; 0 for booleans."""
    if x.dtype == torch.bool or not x.isfinite().any():
        return 0.0
    return float(x[x.isfinite()].abs().max())


@contextmanager
def removing(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove these hooks on exit."""
    handles = list(handles)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def tensors_of(tree: Any) -> list[Tensor]:
    """Return the tensors, of any shape, in nested tuples, lists and mappings."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def seed_everything(seed: int) -> None:
    """Seed the global generators of torch, numpy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def global_states() -> tuple[bytes, bytes, object]:
    """Return the states of the global generators of torch, numpy and Python."""
    return bytes(torch.get_rng_state().tolist()), np.random.get_state()[1].tobytes(), random.getstate()  # type: ignore[index]
