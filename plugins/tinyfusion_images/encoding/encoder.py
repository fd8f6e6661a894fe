"""Encoding of images: an autoencoder, its scale, and noise that depends only on the seed and the image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tinyfusion_core.dataloading.encoding import DTYPES
from tinyfusion_core.errors import UserError
from tinyfusion_core.runtime.seeding import generator
from tinyfusion_images.encoding.autoencoder import load_autoencoder


@dataclass
class ImageEncoder:
    """Encodes images to rows of a shard.

    Args:
        vae: the autoencoder: a folder, a checkpoint file, or a name on the hub; see `load_autoencoder`.
        scale: factor on the latents; None for that of the autoencoder's config.
        kind: "sample" for a draw from each posterior; "moments" for its mean and deviation.
        dtype: dtype of the latents.
        flip: whether to encode the mirrored image too.
        seed: seed of the draws.
        device: device of the autoencoder.
    """

    vae: str
    scale: float | None
    kind: Literal["sample", "moments"]
    dtype: Literal["float32", "float16", "bfloat16"]
    flip: bool
    seed: int
    device: torch.device

    @property
    def copies(self) -> int:
        """Number of rows per image."""
        return 2 if self.flip else 1

    @cached_property
    def autoencoder(self) -> nn.Module:
        """The autoencoder, on the device."""
        return load_autoencoder(self.vae).to(self.device)

    @cached_property
    def scaling(self) -> tuple[float, float]:
        """Factor and shift.

        Raises:
            UserError: neither the autoencoder nor the user gives the factor.
        """
        config: Mapping[str, Any] = self.autoencoder.config  # type: ignore[assignment]
        scale = config.get("scaling_factor") if self.scale is None else self.scale
        if scale is None:
            raise UserError(
                f"encode: {self.vae} does not say its scale; give --scale (Stable Diffusion: 0.18215, MAR: 0.2325)"
            )
        return scale, config.get("shift_factor") or 0.0

    def rows(self, images: Sequence[int], crops: Tensor, labels: Sequence[int]) -> dict[str, Tensor]:
        """Encode images to rows of a shard.

        Args:
            images: indices of the n images, which with the seed determine the noise.
            crops: (n, 3, size, size) uint8 images.
            labels: n class labels.

        Returns:
            `x` (n * copies, channels, height, width) and `y` (n * copies,); for moments also `x_std`, the same shape
            as `x`. A copy follows its image.
        """
        scale, shift = self.scaling
        dtype = DTYPES[self.dtype]
        x = torch.stack([crops, crops.flip(-1)][: self.copies], dim=1).flatten(0, 1)  # an image, then its mirror image
        with torch.no_grad():
            encoded = self.autoencoder.encode(x.to(self.device).float() / 127.5 - 1)  # type: ignore[operator]
        posterior = encoded.latent_dist
        rows = {"x": posterior.mean.cpu(), "x_std": posterior.std.cpu()}
        if self.kind == "sample":
            std = rows.pop("x_std")
            rows["x"] = rows["x"] + std * self._noise(images, std)
        else:
            rows["x_std"] = (rows["x_std"] * scale).to(dtype)
        rows["x"] = ((rows["x"] - shift) * scale).to(dtype)
        return {**rows, "y": torch.tensor(labels, dtype=torch.int64).repeat_interleave(self.copies)}

    def _noise(self, images: Sequence[int], like: Tensor) -> Tensor:
        """Standard normal numbers, the shape of `like`; each image's depend only on the seed and its index."""
        shape = (self.copies, *like.shape[1:])
        return torch.cat([torch.randn(shape, generator=generator("encode", self.seed, "latent", i)) for i in images])
