"""A network whose blocks are of several widths, and what processes fold in it together."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

import tinyfusion_core as tiny
from starting import started
from toys import learning_back


class Perceptron(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.up, self.down, self.unused = nn.Linear(8, hidden), nn.Linear(hidden, 8), nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Mixed(nn.Module):
    """Blocks of several widths, each with a weight that no forward pass uses."""

    def __init__(self, *hidden: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(map(Perceptron, hidden))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def mixed(*hidden: int) -> tiny.Task:
    torch.manual_seed(0)
    return learning_back(Mixed(*hidden).eval())


def fused(into: Path, sharding: str) -> None:
    trainer = tiny.Trainer(batch_size=32, precision="fp32", progress=False, sharding=sharding)
    found = started(mixed(4, 4, 4, 4), [0, 2], tiny.Fuse(rank=2, steps=4), trainer).state_dict()
    if trainer.accelerator.is_main_process:
        torch.save(found, into)
