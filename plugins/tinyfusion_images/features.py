"""Feature spaces of the Fréchet distance: small trained classifiers that come with the package."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from tinyfusion_core.parsing.weights import load_strict, read_weights
from tinyfusion_core.protocols.data import FeatureSpace


class SmallCNN(nn.Module, FeatureSpace):
    """A small classifier of grey images into ten classes; its penultimate activations are the features.

    `train_features.py` beside this file made the included weights.

    Args:
        side: height and width of the images, a multiple of 4.
        num_features: number of features.
        name: what the features are, for the record.
    """

    def __init__(self, side: int, num_features: int, name: str) -> None:
        super().__init__()
        self.name = name
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * (side // 4) ** 2, num_features),
            nn.ReLU(),
        )
        self.head = nn.Linear(num_features, 10)

    @override
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Map images (batch, 1, height, width) in [-1, 1] to features (batch, features) and logits (batch, 10)."""
        weight = self.head.weight
        parts = [self.body(part.to(weight)) for part in torch.split(images, 1000)]
        features = torch.cat(parts)
        return features, self.head(features)


SIDES = {"digits": 8, "fashion": 28}


def fresh(name: str) -> SmallCNN:
    """Return the untrained network for one of the data sets."""
    return SmallCNN(SIDES[name], 32, f"penultimate layer (32) of a small CNN trained on {name}")


def weights(name: str) -> Path:
    """Return the path of the included weights for one of the data sets."""
    return Path(__file__).with_name(f"{name}_features.safetensors")


@dataclass(frozen=True, kw_only=True)
class ShippedFeatures(FeatureSpace):
    """The penultimate layer of a small trained classifier of grey images, values in [-1, 1].

    Args:
        data: what it was trained on: digits (8x8 images) or fashion (28x28).
    """

    data: Literal["digits", "fashion"]

    @property
    @override
    def name(self) -> str:  # type: ignore[override]
        return self._network.name

    @override
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = self._network.to(images.device)(images)
        return found

    @cached_property
    def _network(self) -> SmallCNN:
        return shipped(self.data)


def shipped(name: str) -> SmallCNN:
    """Return the network with the included weights, in eval mode."""
    model = fresh(name).eval().requires_grad_(False)
    load_strict(model, read_weights(weights(name)), weights(name))
    return model
