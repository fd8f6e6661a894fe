"""A device that is not there: its tensors have their values in main memory, and what a GPU would wait for is counted.

Its tensors say that they are on `meta`. Whatever the host reads of them, a value or how many there are, and every copy
from or to main memory that is not `non_blocking` makes it wait for all that it has asked of a GPU before.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

FAR = torch.device("meta")
READS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "bincount"}
"""Operations whose result, or its shape, the host has to know."""


class FarTensor(Tensor):
    """A tensor of the device."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> FarTensor:
        strides, dtype, learned = held.stride(), held.dtype, held.requires_grad
        made: FarTensor = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=strides, dtype=dtype, device=FAR, requires_grad=learned
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func}: the device is off")


class FarDevice(TorchDispatchMode):
    """While it is on, `.to("meta")` keeps the values.

    Attributes:
        waits: how often the host has waited, by what and where.
        sent: how often it has sent something to the device and not waited, by where.
        fetched: how often it has asked for a copy in main memory and not waited, by where.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits, self.sent, self.fetched = Counter[str](), Counter[str](), Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), func.overloadpacket.__name__
        leaves = tree_leaves((args, kwargs))
        far = any(isinstance(leaf, FarTensor) for leaf in leaves)
        if (to := kwargs.get("device")) is None:
            result_far = far
        elif result_far := torch.device(to) == FAR:
            kwargs["device"] = torch.device("cpu")
        if name == "_to_copy":
            self._copied(far, result_far, kwargs.get("non_blocking", False))
        elif name == "copy_":
            self._copied(isinstance(args[1], FarTensor), isinstance(args[0], FarTensor), args[2:] == (True,))
        elif far:
            by_bools = name in ("index", "index_put_") and any(t is not None and t.dtype == torch.bool for t in args[1])
            if name in READS or by_bools:
                self.waits[f"{name} at {where()}"] += 1
            near = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not isinstance(leaf, FarTensor)]
            assert all(t.ndim == 0 for t in near), f"{name} on two devices at {where()}"
        result = func(*tree_map(_held, args), **tree_map(_held, kwargs))
        mine = {id(leaf.held): leaf for leaf in leaves if isinstance(leaf, FarTensor)}  # operations in place return it
        return tree_map(lambda t: mine[id(t)] if id(t) in mine else _far(t), result) if result_far else result

    def _copied(self, from_far: bool, to_far: bool, non_blocking: bool) -> None:
        if from_far == to_far:
            return
        if non_blocking:
            (self.sent if to_far else self.fetched)[where()] += 1
        else:
            self.waits[f"{'to the device' if to_far else 'to main memory'} at {where()}"] += 1


@contextmanager
def far_away(monkeypatch: pytest.MonkeyPatch) -> Iterator[FarDevice]:
    """Train there, meanwhile."""
    before, autocast = torch.__future__.get_swap_module_params_on_conversion(), torch.autocast
    # `Module.to` would make new parameters otherwise, and optimizers have those of before.
    torch.__future__.set_swap_module_params_on_conversion(True)
    with monkeypatch.context() as patch, FarDevice() as device:
        patch.setattr(Accelerator, "device", FAR)
        patch.setattr(torch, "autocast", lambda kind, **how: nullcontext() if kind == "meta" else autocast(kind, **how))
        yield device
    torch.__future__.set_swap_module_params_on_conversion(before)


def where() -> str:
    """The innermost line of the product that is on the stack."""
    for frame in reversed(traceback.extract_stack()):
        if "tinyfusion_core" in frame.filename or "plugins" in frame.filename:
            return f"{Path(frame.filename).name}:{frame.lineno} ({frame.name})"
    return "no line of ours"


def _held(leaf: Any) -> Any:
    return leaf.held if isinstance(leaf, FarTensor) else leaf


def _far(leaf: Any) -> Any:
    return FarTensor(leaf) if isinstance(leaf, Tensor) and not isinstance(leaf, FarTensor) else leaf
