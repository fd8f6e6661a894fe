"""The optimizer that a recipe names: any class of torch, or of another package, for what it takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from typing_extensions import override

from ...errors import UserError, first_line
from ...parsing.named_class import NamedClass

KEY = "optimizer (of recover or train)"
NAMED = NamedClass(KEY, "torch.optim", "AdamW or Muon")
OURS = {"params", "lr", "weight_decay"}
"""Arguments of optimizers that are settings of a recovery."""


class Joined(Optimizer):
    """Several optimizers as one, each with its own groups; states and checkpoints are those of all groups in order.

    Args:
        parts: the optimizers, which have taken no step.
    """

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share()

    @override
    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        self._share()

    @override
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # it calls no closure
        for part in self.parts:
            part.step()

    def _share(self) -> None:
        """Give the parts the groups and the state of the whole, so that a rate that is set here is theirs."""
        groups = iter(self.param_groups)
        for part in self.parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state


class NamedOptimizer:
    """Makes the optimizer that a recipe names.

    One that takes nothing but matrices, as Muon, gets those of the blocks, and AdamW the rest.

    Args:
        named: its class, as a name of `torch.optim` or `class_path` and `init_args`.

    Raises:
        UserError: there is no such optimizer, or it does not take these arguments or a step by gradients alone.
    """

    def __init__(self, named: str | Mapping[str, Any]) -> None:
        path, self.arguments = NAMED.read(named)
        if taken := OURS & self.arguments.keys():
            raise UserError(f"{KEY}: '{min(taken)}' is not for init_args; lr and weight_decay stand beside optimizer")
        self.cls = NAMED.find(path, Optimizer)
        try:
            made = self.cls([nn.Parameter(torch.zeros(2, 2))], **self.arguments)
            if self.cls.__module__.startswith("torch."):  # others may need a device that is not here
                _step(made, [torch.ones(2, 2)])
        except (TypeError, ValueError, RuntimeError, AttributeError) as e:
            raise UserError(f"{KEY}: {path} cannot be had so: {first_line(e)}") from None
        self.of_matrices = not self._takes(torch.zeros(2))

    def __call__(self, groups: Sequence[Mapping[str, Any]], inside: Iterable[nn.Parameter]) -> Optimizer:
        """Return the optimizer of parameter groups.

        Args:
            groups: each with `params`, `lr` and `weight_decay`.
            inside: the parameters in blocks, of any shape.
        """
        if not self.of_matrices:
            return self.cls(list(map(dict, groups)), **self.arguments)
        matrices = {id(p) for p in inside if p.ndim == 2}
        ours = _split(groups, lambda p: id(p) in matrices)
        rest = _split(groups, lambda p: id(p) not in matrices)
        parts = [self.cls(ours, **self.arguments)] if ours else []
        return Joined([*parts, *([AdamW(rest)] if rest else [])])

    def goes_by_element(self) -> bool:
        """Return whether the parts of a matrix are updated as the whole is, so that they may lie on several devices."""
        gradients = [torch.randn(4, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
        found = []
        for parts in (1, 2):
            weights = [nn.Parameter(part.clone()) for part in torch.eye(4).chunk(parts)]
            try:
                made = self.cls(weights, **self.arguments)
                for gradient in gradients:
                    _step(made, gradient.chunk(parts))
            except (TypeError, ValueError, RuntimeError):
                return False
            found.append(torch.cat([w.detach() for w in weights]))
        return torch.allclose(found[0], found[1], rtol=1e-5, atol=1e-7)

    def _takes(self, weight: Tensor) -> bool:
        try:
            self.cls([nn.Parameter(weight)], **self.arguments)
        except (TypeError, ValueError, RuntimeError):
            return False
        return True


def _split(groups: Sequence[Mapping[str, Any]], takes: Any) -> list[dict[str, Any]]:
    """The groups with those of their parameters that are taken; without the empty ones."""
    parts = [{**group, "params": [p for p in group["params"] if takes(p)]} for group in groups]
    return [part for part in parts if part["params"]]


def _step(optimizer: Optimizer, gradients: Sequence[Tensor]) -> None:
    for p, gradient in zip((p for group in optimizer.param_groups for p in group["params"]), gradients, strict=True):
        p.grad = gradient.clone()
    optimizer.step()
