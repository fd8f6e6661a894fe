"""Which layers LoRA can adapt: those that are called, and do to their input what their kind says."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import need


def uncalled(model: nn.Module) -> list[str]:
    """Return the paths of torch's attention, which uses the weights of its output layer without calling it.

    And of that layer.
    """
    attention = [name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)]
    return [*attention, *(f"{name}.out_proj" for name in attention)]


def adaptable(model: nn.Module, blocks: Sequence[str]) -> list[str]:
    """Return the paths of the layers that LoRA updates by default: linear ones and convolutions that are not grouped.

    Args:
        model: the network.
        blocks: paths of its blocks; what is outside of them is left alone.
    """
    transposed = need("transformers.pytorch_utils", "tinyfusion[lora]", "update: LoRA").Conv1D  # of GPT-2
    apart = {*uncalled(model), *_read(model)}
    inside = tuple(f"{path}." for path in blocks)
    return [
        name
        for name, module in model.named_modules()
        if f"{name}.".startswith(inside) and name not in apart and _is_plain(module, transposed)
    ]


def _read(model: nn.Module) -> Iterator[str]:
    """Paths of layers whose weights the module around them reads, as kernels do, and may miss what LoRA adds.

    Those of torch itself do so only where nothing learns.
    """
    for path, module in model.named_modules():
        if type(module).__module__.startswith("torch."):
            continue
        try:
            code = inspect.getsource(inspect.unwrap(type(module).forward))
        except (OSError, TypeError):  # of a session, or compiled
            continue
        for name in set(re.findall(r"self\.(\w+)\.weight\b(?!\.(?:dtype|device|shape))", code)):
            yield f"{path}.{name}".lstrip(".")


def _is_plain(module: nn.Module, transposed: type[nn.Module]) -> bool:
    if next(module.children(), None) is not None:
        return False
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return module.groups == 1
    if isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward:
        return _is_linear(module)
    return isinstance(module, nn.Linear | transposed)


def _is_linear(module: nn.Linear) -> bool:
    """Whether a layer with a forward of its own still makes its outputs of its inputs; routers may give a tuple."""
    meta = {name: tensor.to("meta") for name, tensor in module.state_dict().items()}
    try:
        found = functional_call(
            module, meta, torch.zeros(2, module.in_features, dtype=module.weight.dtype, device="meta")
        )
    except Exception:  # of any library's layer
        return False
    return isinstance(found, Tensor) and found.shape == (2, module.out_features)
