"""Processes that train together hold the same numbers; where they do not, say so instead of going on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(tensors: Iterable[Tensor]) -> Tensor:
    """(3,) float32 on the CPU, small whole numbers that a different bit in a tensor changes: cheap to send along."""
    total = 0
    for position, t in enumerate(tensors, 1):
        bits = t.detach().contiguous().view(_BITS[t.element_size()])
        total += position * int(bits.sum(dtype=torch.int64))
    return torch.tensor([float(total >> shift & 0xFFFF) for shift in (0, 16, 32)])


def require_same(accelerator: Accelerator, tensors: Iterable[Tensor], what: str) -> None:
    """Every process must call it.

    Raises:
        UserError: the processes do not hold the same tensors; raised on all of them.
    """
    require_equal(accelerator.gather(fingerprint(tensors)[None].to(accelerator.device)), what)


def require_equal(rows: Tensor, what: str) -> None:
    """Raises UserError unless all rows of fingerprints, one for each process, are the same."""
    odd = (rows != rows[0]).any(1).nonzero().flatten().tolist()
    if odd:
        raise UserError(
            f"{what} of process {', '.join(map(str, odd))} of {len(rows)} are not those of process 0. Give all "
            "processes the same files, versions and kind of device, then run again to go on from the last checkpoint"
        )
