"""1,797 real handwritten digits, 8x8 pixels, included in the package.

Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning
Repository, 1998, doi:10.24432/C50P49, CC BY 4.0; the 1,797 images of scikit-learn's `load_digits`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from typing_extensions import override

from tinyfusion_core.protocols.data import DataSource, FeatureSpace, Tensors
from tinyfusion_core.runtime.seeding import generator

NUM_HELD_OUT = 297


@dataclass(frozen=True)
class Digits(DataSource):
    """8x8 grey images of the digits 0 to 9, values in [-1, 1]: 1,500 for training, 297 held out by a fixed draw."""

    @override
    def train(self) -> Tensors:
        return self._part(slice(NUM_HELD_OUT, None))

    @override
    def held_out(self) -> Tensors:
        return self._part(slice(NUM_HELD_OUT))

    def pixels(self, x: Tensor) -> Tensor:
        """Map examples, (batch, 1, height, width) in [-1, 1], to images in [0, 1], the same shape."""
        return ((x + 1) / 2).clamp(0, 1)

    @override
    def feature_space(self) -> FeatureSpace:
        from tinyfusion_images.features import shipped

        return shipped("digits")

    def _part(self, part: slice) -> Tensors:
        order = torch.randperm(len(self._columns["y"]), generator=generator("digits", "held out"))[part]
        return Tensors({name: column[order] for name, column in self._columns.items()})

    @cached_property
    def _columns(self) -> dict[str, Tensor]:
        raw = load_file(Path(__file__).with_name("digits.safetensors"))
        return {"x": raw["images"].float() / 8 - 1, "y": raw["labels"].long()}
