"""Networks small enough to work out by hand, and one with planted truth, for criteria."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import tinyfusion_core as tiny
from tinyfusion_core.protocols.backbone import Backbone
from tinyfusion_core.protocols.blocks.streams import Stream
from tinyfusion_core.protocols.data import Tensors
from tinyfusion_core.protocols.loss import LossAdapter
from toys import Match, Planted, planted_data

TRAINER = tiny.Trainer(batch_size=16, precision="fp32", seed=0)


def planted(loss: LossAdapter | None = None, scales: tuple[float, ...] = (0, 1, 0, 1, 1, 0, 0, 1)) -> tiny.Task:
    data = planted_data()
    return tiny.Task(backbone=Planted(scales=scales), loss=loss or Match(), train=data, held_out=data)


@dataclass(frozen=True)
class Given(Backbone):
    """Stands for a network that a test has built."""

    paths: tuple[str, ...] = ("blocks.*",)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def build(self) -> nn.Module:
        raise NotImplementedError

    def config(self, model: nn.Module | None = None) -> dict[str, Any]:
        return {}

    @classmethod
    def construct(cls, config: Mapping[str, Any]) -> nn.Module:
        raise NotImplementedError

    def blocks(self, model: nn.Module) -> Sequence[str]:
        return self.paths

    def after_prune(self, model: nn.Module, kept: Mapping[str, Sequence[int]]) -> None:
        pass

    def example(self, num_rows: int) -> dict[str, Tensor]:
        return {name: torch.ones(num_rows, *shape) for name, shape in self.shapes.items()}

    @classmethod
    def tiny(cls) -> Given:
        return cls()


class TwoStreams(Given):
    streams: ClassVar[Sequence[Stream]] = (Stream("hidden", 1), Stream("encoder", 0))


@dataclass(frozen=True)
class Plain(LossAdapter):
    """Feeds the data as they are; the loss is half the squared distance to `target`, summed over features."""

    target: float = 0.0

    def prepare(self, batch: Mapping[str, Tensor], rng: tiny.Rng) -> dict[str, Tensor]:
        return dict(batch)

    def predict(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        return model(**inputs)

    def loss(self, prediction: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        return 0.5 * (prediction - self.target).square().flatten(1).sum(1)

    def distance(self, student: Tensor, teacher: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        raise NotImplementedError


class Linear(nn.Module):
    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix = nn.Parameter(matrix)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix.T


class Product(nn.Module):
    def __init__(self, matrices: Sequence[Tensor]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(map(Linear, matrices))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def given(model: nn.Module, data: dict[str, Tensor], backbone: type[Given] = Given, **options: Any) -> tiny.Task:
    shapes = {name: tuple(t.shape[1:]) for name, t in data.items()}
    columns = Tensors(data)
    return tiny.Task(
        backbone=backbone(shapes=shapes, **options), loss=Plain(), train=columns, held_out=columns, model=model
    )


def turn(degrees: float, factor: float = 1.0) -> Tensor:
    a = math.radians(degrees)
    return factor * torch.tensor([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]])


def scalars(*factors: float, x: Sequence[float] = (1.0,), target: float = 0.0) -> tiny.Task:
    task = given(Product([torch.tensor([[float(f)]]) for f in factors]), {"x": torch.tensor(x)[:, None]})
    return replace(task, loss=Plain(target))


def scores(decision: tiny.Decision) -> list[float]:
    return decision.provenance["scores"]
