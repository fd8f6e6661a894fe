"""A quantised copy of the teacher, for devices that do not hold two networks in full."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UserError, first_line, need
from ...parsing.named_class import NamedClass

KEY = "recover.kd.quantise"
NAMED = NamedClass(KEY, "torchao.quantization", "Float8WeightOnlyConfig or Int8WeightOnlyConfig")


def config_of(named: str | Mapping[str, Any]) -> Any:
    """Return the config of torchao that is named.

    Raises:
        UserError: torchao is not installed, or there is no such config, or it does not take these arguments.
    """
    base: type[Any] = need("torchao.core.config", "tinyfusion[quantise]", KEY).AOBaseConfig
    path, arguments = NAMED.read(named)
    cls = NAMED.find(path, base)
    try:
        return cls(**arguments)
    except (TypeError, ValueError, AssertionError) as e:
        raise UserError(f"{KEY}: {path} cannot be had so: {first_line(e)}") from None


def quantised(model: nn.Module, named: str | Mapping[str, Any], device: torch.device | None = None) -> nn.Module:
    """Return a copy of a network whose linear layers are quantised; nothing of it can be trained.

    Args:
        model: the network, which stays as it is.
        named: the config of torchao.
        device: where each layer is quantised, and stays; None: where it is.

    Raises:
        UserError: as `config_of`; or the config quantises nothing of this network, or cannot do it here.
    """
    config, torchao = config_of(named), need("torchao.quantization", "tinyfusion[quantise]", KEY)
    made = copy.deepcopy(model).requires_grad_(False)
    try:
        torchao.quantize_(made, config, device=device)
    except (RuntimeError, ImportError, NotImplementedError, AssertionError, ValueError) as e:
        raise UserError(f"{KEY}: {type(config).__name__} cannot quantise this network: {first_line(e)}") from None
    if num_bytes(made.parameters()) >= num_bytes(model.parameters()):
        raise UserError(f"{KEY}: {type(config).__name__} makes nothing smaller of this network; leave it out")
    return made


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Return how many bytes tensors hold.

    Args:
        tensors: of any shape. Quantised ones report the bytes of what they stand for; those of their parts count.
    """
    return sum(_num_bytes(t) for t in tensors)


def _num_bytes(t: Any) -> int:
    if hasattr(t, "__tensor_flatten__"):
        return num_bytes(getattr(t, name) for name in t.__tensor_flatten__()[0])
    return int(t.numel() * t.element_size())
