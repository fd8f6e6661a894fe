"""Whether all processes hold the same tensors, told by checksums."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(tensors: Iterable[Tensor]) -> Tensor:
    """Compute a cheap checksum that changes when a bit of the tensors does; not when values change places in one.

    Args:
        tensors: of any shape, dtype and device.

    Returns:
        (3,) whole numbers below 65536, float32 on the device of the first tensor: nothing waits for it.
    """
    total: Tensor | None = None
    for position, t in enumerate(tensors, 1):
        bits = t.detach().contiguous().view(_BITS[t.element_size()])
        part = position * bits.sum(dtype=torch.int64)  # wraps around, which leaves the lower bits as they are
        total = part if total is None else total + part.to(total.device)
    if total is None:
        return torch.zeros(3)
    return torch.stack([total >> shift & 0xFFFF for shift in (0, 16, 32)]).float()


def check_ranks_agree(accelerator: Accelerator, tensors: Iterable[Tensor], what: str) -> None:
    """Check that all processes hold the same tensors. A collective call.

    Args:
        accelerator: gathers the checksums.
        tensors: of any shape.
        what: what they are, for the message.

    Raises:
        UserError: they differ; raised on all processes.
    """
    check_rows_agree(accelerator.gather(fingerprint(tensors)[None].to(accelerator.device)), what)


def check_rows_agree(rows: Tensor, what: str) -> None:
    """Check that the checksums of all processes are the same.

    Args:
        rows: (processes, 3) checksums, see `fingerprint`.
        what: what was summed, for the message.

    Raises:
        UserError: they differ.
    """
    odd = (rows != rows[0]).any(1).nonzero().flatten().tolist()
    if odd:
        raise UserError(
            f"{what} of process {', '.join(map(str, odd))} of {len(rows)} are not those of process 0. Give all "
            "processes the same files, versions and kind of device, then run again to go on from the last checkpoint"
        )
