"""A residual network for handwritten digits, and what tinyfusion needs to know to prune it."""

from dataclasses import dataclass

from torch import arange, nn, zeros

import tinyfusion_core as tiny

tinyfusion_api = 1  # the version of the plugin interface that this is written for


class Block(nn.Sequential):
    """A residual unit: skipping it is the identity."""

    def forward(self, x):
        """Add the block's output to its input, (batch, size)."""
        return x + super().forward(x)


class Network(nn.Sequential):  # runs its modules in the order in which they are set
    """A linear layer, residual blocks and a classifier."""

    def __init__(self, size=64, depth=8):
        super().__init__(nn.Flatten(), nn.Linear(64, size))
        self.blocks = nn.Sequential(*(Block(nn.RMSNorm(size), nn.Linear(size, size), nn.GELU()) for _ in range(depth)))
        self.last = nn.Linear(size, 10)
        self.config = {"size": size, "depth": depth}  # the keywords that build it again


@dataclass(frozen=True, kw_only=True)
class MyBackbone(tiny.CheckpointBackbone):
    """The network as a model family; its fields are the options of a recipe."""

    size: int | None = None
    depth: int | None = None

    @classmethod
    def network(cls):
        """Return the class of the network."""
        return Network

    def blocks(self, model):
        """Return the paths of the blocks."""
        return ["blocks.*"]

    def after_prune(self, model, kept):
        """Correct the depth in the network's config."""
        model.config["depth"] = len(kept["blocks"])

    def example(self, num_rows):
        """Return a batch with the shapes of real data: images (batch, 1, 8, 8) and labels (batch,)."""
        return {"x": zeros(num_rows, 1, 8, 8), "y": arange(num_rows) % 10}


@dataclass(frozen=True)
class MyBackboneLoss(tiny.LossAdapter):
    """Classification."""

    def predict(self, model, inputs):
        """Return the logits, (batch, 10)."""
        return model(inputs["x"])

    def loss(self, prediction, inputs):
        """Return the cross-entropy of every sample, (batch,)."""
        return nn.functional.cross_entropy(prediction, inputs["y"], reduction="none")


@tiny.hookimpl
def tinyfusion_register_backbones():
    """The model families of this plugin."""
    return [MyBackbone]


@tiny.hookimpl
def tinyfusion_register_losses():
    """The losses of this plugin."""
    return [MyBackboneLoss]
