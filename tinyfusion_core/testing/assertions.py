"""What the checks say when something does not hold, and what they watch while a stranger's code runs."""

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
"""Units of rounding, of the largest number that went into a result, that are no difference between two results."""


def expect(holds: bool, message: str) -> None:
    """Raises AssertionError with this message unless it holds."""
    if not holds:
        raise AssertionError(message)


def expect_same(before: Mapping[str, Tensor], after: Mapping[str, Tensor], message: str) -> None:
    """Named tensors of any shape, the same names in the same order, equal bit for bit."""
    expect(list(before) == list(after), f"{message}: {sorted(set(before) ^ set(after))[:3]}")
    differ = [k for k, t in before.items() if t.shape != after[k].shape or not torch.equal(t, after[k])]
    expect(not differ, f"{message}: {differ[:3]}")


def expect_close(found: Tensor, expected: Tensor, tolerance: float, message: str, size: float) -> None:
    """Equal up to a share of the largest value, and to the rounding of the numbers that went into it.

    Args:
        found: a tensor of any shape; one of whole numbers must be equal.
        expected: of the same shape.
        tolerance: the share.
        message: what is wrong otherwise.
        size: the largest number that was added or subtracted on the way; beyond the values when they cancel.
    """
    expect(found.shape == expected.shape, f"{message}: {tuple(found.shape)} and {tuple(expected.shape)}")
    if torch.equal(found, expected):
        return
    expect(found.is_floating_point(), message)
    error, scale = float((found - expected)[found != expected].abs().max()), largest(expected)
    rounding = ROUNDINGS * torch.finfo(found.dtype).eps * size
    expect(error <= tolerance * scale + rounding, f"{message} (off by {error:.2g} of {scale:.2g})")


def largest(x: Tensor) -> float:
    """The largest of the finite numbers of a tensor of any shape, without sign."""
    finite = x[x.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


@contextmanager
def removing(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Take these hooks away again on exit."""
    handles = list(handles)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def tensors_of(tree: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists and mappings."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def seed_everything(seed: int) -> None:
    """Seed the global generators of torch, numpy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def global_states() -> tuple[bytes, bytes, object]:
    """Where the global generators of torch, numpy and Python stand."""
    return bytes(torch.get_rng_state().tolist()), np.random.get_state()[1].tobytes(), random.getstate()  # type: ignore[index]
