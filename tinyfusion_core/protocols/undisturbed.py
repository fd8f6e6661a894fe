"""Use a network and leave it as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Restore a network when the context closes: buffers, training flags, gradients, and what requires a gradient.

    Also what modules keep of a forward pass as a plain attribute, such as the last state of a recurrent layer.
    Everything is told apart by identity, not by name, so that modules may be wrapped meanwhile. Values of parameters
    are not, see `restored`. There are no gradients at first.
    """
    modes = [(module, module.training) for module in model.modules()]
    flags = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    buffers = [
        (module, name, buffer, None if buffer is None else buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    try:
        for p, _, _ in flags:
            p.grad = None
        with _forgetting(model):
            yield
    finally:
        with torch.no_grad():
            for module, name, buffer, copy in buffers:
                now = module._buffers.get(name)
                if buffer is not None and now is not None and now.device != buffer.device:  # sharding moves networks
                    buffer = now
                module._buffers[name] = buffer if buffer is None or copy is None else buffer.copy_(copy)
        for p, flag, grad in flags:
            p.requires_grad_(flag)
            p.grad = grad
        for module, training in modes:
            module.training = training


@contextmanager
def restored(weights: Iterable[nn.Parameter]) -> Iterator[list[Tensor]]:
    """Give weights their values again when the context closes, bit for bit; yields these, on the CPU.

    Args:
        weights: parameters of any shape.
    """
    weights = list(weights)
    # A network that is only planned with, on the meta device, has no values to restore.
    original = [p.detach().to("meta" if p.is_meta else "cpu", copy=True) for p in weights]
    try:
        yield original
    finally:
        with torch.no_grad():
            for p, values in zip(weights, original, strict=True):
                p.copy_(values)


@contextmanager
def _forgetting(model: nn.Module) -> Iterator[None]:
    """Restore attributes that are tensors, or None and become one."""
    kept = [(module, name, v) for module in model.modules() for name, v in vars(module).items() if _may_be_tensor(v)]
    try:
        yield
    finally:
        for module, name, value in kept:
            if isinstance(vars(module).get(name), Tensor):
                vars(module)[name] = value


def _may_be_tensor(value: object) -> bool:
    return value is None or isinstance(value, Tensor)


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Put networks in eval mode, and leave them as they were when the context closes."""
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(undisturbed(model))
            model.eval()
        yield


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace what a module does while the context is open; its keys and hooks stay as they are."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            module.__dict__.pop("forward", None)
        else:  # somebody else had taken it over already
            module.__dict__["forward"] = before
