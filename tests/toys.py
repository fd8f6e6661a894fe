"""Small networks that behave like the awkward ones: several lists, several streams, arguments that look batched."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.checkpoint import checkpoint

import tinyfusion_core as tiny
from tinyfusion_core.protocols.backbone import Backbone
from tinyfusion_core.protocols.data import Tensors
from tinyfusion_core.protocols.loss import LossAdapter
from tinyfusion_core.runtime.seeding import Rng, generator


class Block(nn.Module):
    """Refuses an empty batch, as attention code does."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor, c: Tensor, table: Tensor | None = None, rotary: tuple[Tensor, Tensor] | None = None):
        assert len(x) > 0
        h = x + c[:, None]
        if table is not None:
            h = h + table
        if rotary is not None:
            h = h * rotary[0] + rotary[1]
        return x + self.outer(torch.tanh(self.inner(h)))


class Net(nn.Module):
    """Two block lists; `table` (T, D) has no batch dimension, `rotary` is one batched and one shared tensor."""

    def __init__(self, width: int = 8, depths: tuple[int, int] = (3, 2), use_checkpoint: bool = False) -> None:
        super().__init__()
        self.width, self.use_checkpoint = width, use_checkpoint
        self.first = nn.ModuleList(Block(width) for _ in range(depths[0]))
        self.second = nn.ModuleList(Block(width) for _ in range(depths[1]))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        table = torch.linspace(-1, 1, x.shape[1] * self.width).view(x.shape[1], self.width)
        rotary = (1 + 0.1 * c[:, None], table[None])
        for block in self.first:
            if self.use_checkpoint:
                x = checkpoint(block, x, c, table, use_reentrant=False)
            else:
                x = block(x, c, table=table)
        for block in self.second:
            x = block(x=x, c=c, rotary=rotary)
        return x


class DoubleBlock(nn.Module):
    """Two streams, returned in the other order than they come, as in MMDiT."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, hidden: Tensor, encoder: Tensor) -> tuple[Tensor, Tensor]:
        joint = torch.cat([hidden, encoder], dim=1).mean(1, keepdim=True)
        return encoder + torch.tanh(self.text(encoder + joint)), hidden + torch.tanh(self.image(hidden + joint))


class DoubleNet(nn.Module):
    def __init__(self, width: int = 8, depth: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(DoubleBlock(width) for _ in range(depth))

    def forward(self, hidden: Tensor, encoder: Tensor) -> Tensor:
        for block in self.blocks:
            encoder, hidden = block(hidden, encoder=encoder)
        return torch.cat([hidden, encoder], dim=1)


class Residual(nn.Module):
    """x + scale * f(x); with scale 0 it does nothing."""

    def __init__(self, width: int, scale: float) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(width, width), scale

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * torch.tanh(self.linear(x))


class Chain(nn.Module):
    def __init__(self, width: int, scales: Sequence[float]) -> None:
        super().__init__()
        self.config: dict[str, Any] = {"width": width, "scales": list(scales)}
        self.blocks = nn.ModuleList(Residual(width, s) for s in scales)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@dataclass(frozen=True)
class Planted(Backbone):
    """A chain in which some blocks do the work and the others do nothing."""

    scales: tuple[float, ...] = (0, 1, 0, 1, 1, 0, 0, 1)
    width: int = 8

    def build(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return Chain(self.width, self.scales).eval()

    def config(self, model: nn.Module | None = None) -> dict[str, Any]:
        return dict(model.config) if model is not None else {"width": self.width, "scales": list(self.scales)}

    @classmethod
    def construct(cls, config: Mapping[str, Any]) -> nn.Module:
        return Chain(**config)

    def blocks(self, model: nn.Module) -> Sequence[str]:
        return ["blocks.*"]

    def after_prune(self, model: nn.Module, kept: Mapping[str, Sequence[int]]) -> None:
        model.config["scales"] = [model.config["scales"][i] for i in kept["blocks"]]

    def example(self, num_rows: int) -> dict[str, Tensor]:
        return {"x": torch.zeros(num_rows, self.width)}

    @classmethod
    def tiny(cls) -> Planted:
        return cls()


@cache
def _whole(dtype: torch.dtype) -> nn.Module:
    return Planted().build().to(dtype)


@dataclass(frozen=True)
class Match(LossAdapter):
    """Squared distance to the full chain's output; `noise` jitters the inputs."""

    noise: float = 0.1
    explode_at: tuple[int, ...] = ()

    def prepare(self, batch: Mapping[str, Tensor], rng: Rng) -> dict[str, Tensor]:
        x = batch["x"] + self.noise * rng.normal("noise", batch["x"])
        if rng.step in self.explode_at and rng.stage in ("search", "recover"):
            x = x * float("nan")
        with torch.no_grad():
            return {"x": x, "target": _whole(x.dtype)(x)}

    def predict(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        return model(inputs["x"])

    def loss(self, prediction: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        return (prediction - inputs["target"]).square().flatten(1).mean(1)

    def distance(self, student: Tensor, teacher: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        return (student - teacher).square().flatten(1).mean(1)


def planted_data(num: int = 64, width: int = 8) -> Tensors:
    return Tensors({"x": torch.randn(num, width, generator=generator("planted"))})


class StopAt(Match):
    """Sends this process a signal while the inputs of one step are prepared."""

    def prepare(self, batch, rng):
        if rng.stage in ("search", "recover") and rng.step == 11:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().prepare(batch, rng)


class LinearBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.5 * self.linear(x)


class LinearNet(nn.Module):
    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.stem, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)
        self.layers = nn.ModuleList(LinearBlock() for _ in range(depth))
        self.head = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def learning_back(model: nn.Module) -> tiny.Task:
    """The network has to become what it was when this was called."""
    x = torch.randn(512, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = model(x)

    def loss(model: nn.Module, batch: tiny.Batch) -> Tensor:
        return mse_loss(model(batch["x"]), batch["y"], reduction="none").mean(1)

    return tiny.wrap(model, blocks="layers.*", loss_fn=loss, data={"x": x, "y": y})
