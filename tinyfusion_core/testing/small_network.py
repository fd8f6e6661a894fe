"""The small network on which selectors, weight updates and distillation are checked for side effects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from ..protocols.backbone import Backbone
from ..protocols.data import Tensors
from ..protocols.loss import LossAdapter
from ..protocols.task import Task
from ..runtime.seeding import generator
from ..training.trainer import Trainer

LISTS = {"first": 4, "second": 4}
"""The block lists of the network, and how many blocks each holds."""

NUM_KEPT = 5
"""How many blocks to keep where a class asks for a number."""

WIDTH = 4


class _Centre(nn.Module):
    """Subtracts a running mean, which is updated in training mode, as in a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))

    @override
    def forward(self, x: Tensor) -> Tensor:
        mean = self.get_buffer("mean")
        if self.training:
            mean.lerp_(x.detach().mean((0, 1)), 0.1)
        return x - mean


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.centre, self.linear, self.output = _Centre(), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    @override
    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = x + self.output(torch.tanh(self.linear(self.centre(x))))
        return found


class _Network(nn.Module):
    def __init__(self, first: int, second: int) -> None:
        super().__init__()
        self.depths = {"first": first, "second": second}
        self.first = nn.ModuleList(_Block() for _ in range(first))
        self.second = nn.ModuleList(_Block() for _ in range(second))
        self.last = nn.Linear(WIDTH, WIDTH)

    @override
    def forward(self, x: Tensor) -> Tensor:
        for block in [*self.first, *self.second]:
            x = block(x)
        found: Tensor = self.last(x)
        return found


@dataclass(frozen=True)
class SmallBackbone(Backbone):
    """A residual network of two lists of four blocks, with running means, over (batch, 3, 4) tokens."""

    @override
    def build(self) -> nn.Module:
        source = generator("conformance", "network")
        with torch.random.fork_rng():  # checks watch the global generator
            model = _Network(**LISTS)
        for t in model.state_dict().values():
            t.copy_(torch.randn(t.shape, generator=source) / 2)
        return model.eval()

    @override
    def config(self, model: nn.Module | None = None) -> dict[str, Any]:
        if model is None:
            return dict(LISTS)
        assert isinstance(model, _Network)
        return dict(model.depths)

    @classmethod
    @override
    def construct(cls, config: Mapping[str, Any]) -> nn.Module:
        return _Network(**config)

    @override
    def blocks(self, model: nn.Module) -> Sequence[str]:
        return [f"{name}.*" for name in LISTS]

    @override
    def after_prune(self, model: nn.Module, kept: Mapping[str, Sequence[int]]) -> None:
        assert isinstance(model, _Network)
        model.depths = {name: len(stayed) for name, stayed in kept.items()}

    @override
    def example(self, num_rows: int) -> dict[str, Tensor]:
        return {name: torch.zeros(num_rows, 3, WIDTH) for name in ("x", "y")}

    @classmethod
    @override
    def tiny(cls) -> SmallBackbone:
        return cls()


@dataclass(frozen=True)
class SmallLoss(LossAdapter):
    """Mean squared error."""

    @override
    def predict(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        found: Tensor = model(inputs["x"])
        return found

    @override
    def prepare_clean(self, batch: Mapping[str, Tensor], rng: Any) -> dict[str, Tensor]:
        return dict(batch)

    @override
    def loss(self, prediction: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        return self.distance(prediction, inputs["y"], inputs)

    @override
    def distance(self, student: Tensor, teacher: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        return (student - teacher).square().flatten(1).mean(1)


def small_task() -> Task:
    """Return the network with data; one weight is frozen and one module is in training mode, which must not change."""
    source = generator("conformance", "data")
    data = Tensors({name: torch.randn(16, 3, WIDTH, generator=source) for name in ("x", "y")})
    task = Task(backbone=SmallBackbone(), loss=SmallLoss(), train=data, held_out=data)
    task.teacher.get_parameter("last.bias").requires_grad_(False)
    task.teacher.get_submodule("last").train()
    return task


def small_trainer() -> Trainer:
    """Return the trainer of its stages."""
    return Trainer(batch_size=8, precision="fp32")


def values_of(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of all parameters and buffers, of any shape, on the CPU."""
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: t.detach().cpu().clone() for name, t in named.items()}


def modes_of(model: nn.Module) -> dict[str, object]:
    """Return everything else that a stage may leave changed, by module and parameter."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    found: dict[str, object] = {}
    for name, module in model.named_modules():
        found[f"type of {name}"] = type(module)
        found[f"training flag of {name}"] = module.training
        found[f"forward of {name}"] = vars(module).get("forward")
        found[f"hooks of {name}"] = [list(getattr(module, kind)) for kind in hooks]
    for name, p in model.named_parameters():
        found[f"requires_grad of {name}"] = p.requires_grad
        found[f"gradient of {name}"] = p.grad is not None
    return found


def changes(before: Mapping[str, object], after: Mapping[str, object]) -> list[str]:
    """Return the names whose values differ, or that exist on one side only."""
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
