"""The attention mask of a batch, in a form that a network takes, with values or without."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from tinyfusion_core.protocols.loss import has_values

T = TypeVar("T")


def attending(attention: Tensor, run: Callable[[Tensor], T]) -> T:
    """Run a network under the attention mask of a batch.

    Networks look for padding in its values. Where there are none, they are given a mask for each pair of tokens, which
    most take as it is; the others look at no values.

    Args:
        attention: (batch, tokens), 0 at padding.
        run: runs the network under a mask.

    Returns:
        What `run` returns.

    Raises:
        NotImplementedError: there are no values, and the network looks at them.
    """
    if has_values(attention):
        return run(attention)
    num_rows, num_tokens = attention.shape
    pairs = torch.ones(num_rows, 1, num_tokens, num_tokens, dtype=torch.bool, device=attention.device)
    try:
        return run(pairs)
    except (LookupError, RuntimeError, TypeError, ValueError):
        pass
    try:
        return run(attention)
    except (LookupError, RuntimeError, TypeError, ValueError) as e:
        raise NotImplementedError(f"without values it does not run: {e}") from e
