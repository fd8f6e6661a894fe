"""The feature space of the digits: a small classifier, shipped trained, whose features define the Fréchet distance."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from tinyfusion_core.files import load_strict, read_weights

WEIGHTS = Path(__file__).with_name("features.safetensors")


class DigitsFeatures(nn.Module):
    """A small CNN; its 32 penultimate activations are the features.

    `train_features.py` beside this file made the shipped weights.
    """

    name = "penultimate layer (32) of a small CNN trained on the digits"

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * 4, 32),
            nn.ReLU(),
        )
        self.head = nn.Linear(32, 10)

    @classmethod
    def shipped(cls) -> DigitsFeatures:
        """The network with the shipped weights, in eval mode."""
        model = cls().eval().requires_grad_(False)
        load_strict(model, read_weights(WEIGHTS), WEIGHTS)
        return model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 1, 8, 8) images in [-1, 1] -> (B, 32) features, (B, 10) logits."""
        device = next(self.parameters()).device
        features: Tensor = self.body(images.to(device, torch.float32))
        return features, self.head(features)
