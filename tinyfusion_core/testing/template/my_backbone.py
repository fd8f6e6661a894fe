"""A residual network for handwritten digits, and what tinyfusion needs to know to prune it."""

from dataclasses import dataclass

from torch import arange, nn, zeros

import tinyfusion_core as tiny

tinyfusion_api = 1  # the version of the plugin interface that this is written for


class Block(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


class Network(nn.Sequential):  # runs its modules in the order in which they are set
    def __init__(self, size=64, depth=8):
        super().__init__(nn.Flatten(), nn.Linear(64, size))
        self.blocks = nn.Sequential(*(Block(nn.RMSNorm(size), nn.Linear(size, size), nn.GELU()) for _ in range(depth)))
        self.last = nn.Linear(size, 10)
        self.config = {"size": size, "depth": depth}  # the keywords that build it again


@dataclass(frozen=True, kw_only=True)
class MyBackbone(tiny.CheckpointBackbone):
    size: int | None = None
    depth: int | None = None

    @classmethod
    def network(cls):
        return Network

    def blocks(self, model):
        return ["blocks.*"]

    def after_prune(self, model, kept):
        model.config["depth"] = len(kept["blocks"])

    def example(self, num_rows):
        return {"x": zeros(num_rows, 1, 8, 8), "y": arange(num_rows) % 10}


@dataclass(frozen=True)
class MyBackboneLoss(tiny.LossAdapter):
    def predict(self, model, inputs):
        return model(inputs["x"])

    def loss(self, prediction, inputs):
        return nn.functional.cross_entropy(prediction, inputs["y"], reduction="none")


@tiny.hookimpl
def tinyfusion_register_backbones():
    return [MyBackbone]


@tiny.hookimpl
def tinyfusion_register_losses():
    return [MyBackboneLoss]
