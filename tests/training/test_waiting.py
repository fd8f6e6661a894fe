"""What a step waits for, and what it sends to a device: counted on devices that are not there."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tinyfusion_core.protocols.blocks.rows import moved, split_rows
from tinyfusion_core.training.steps.agreement import fingerprint


class Counted(TorchDispatchMode):
    """Counts operations: `_local_scalar_dense` reads a value, `_to_copy` goes to another device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_rows_of_all_blocks_are_one_transfer() -> None:
    torch.manual_seed(0)
    mask = (torch.rand(16, 28) < 0.5).float()
    mask[:, 3] = 0  # nobody keeps it: its first row runs all the same
    rows = [split_rows(column, torch.ones(16)) for column in mask.unbind(1)]
    with Counted() as mode:
        found = moved(rows, torch.device("meta"))
    assert mode.seen["_to_copy"] == 1
    assert [[len(t) for t in block] for block in found] == [[len(t) for t in block] for block in rows]
    assert {t.device.type for block in found for t in block} == {"meta"}
    assert moved(rows, torch.device("cpu")) is rows


@pytest.mark.parametrize("first", [0, 28])
def test_a_fingerprint_waits_for_nothing(first: int) -> None:
    tensors = [torch.randn(3, 4, generator=torch.Generator().manual_seed(j)) for j in range(first, first + 28)]
    with Counted() as mode:
        found = fingerprint(tensors)
        fingerprint([t.to("meta") for t in tensors])
    assert mode.seen["_local_scalar_dense"] == 0
    assert found.tolist() == reference(tensors)


def reference(tensors: list[Tensor]) -> list[float]:
    """The same checksum in whole numbers without bounds."""
    total = sum(
        position * sum(t.contiguous().view(torch.int32).flatten().tolist()) for position, t in enumerate(tensors, 1)
    )
    return [float(total >> shift & 0xFFFF) for shift in (0, 16, 32)]
