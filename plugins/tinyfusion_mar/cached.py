"""Latents as MAR's own code caches them: the moments of an image in one .npz file, in a folder for each class."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from tinyfusion_core.errors import UserError, require
from tinyfusion_core.runtime.files import map_array
from tinyfusion_dit.latents import LatentSource
from tinyfusion_dit.stores import Indices, Rows, Store, layout_of

COPIES = ("moments", "moments_flip")
"""Arrays of a file: of the image and of its mirror image, (2C, H, W) means and then log-variances, not scaled."""
LOG_VARIANCES = (-30.0, 20.0)
"""Range that the autoencoder's posterior clips them to."""


@dataclass(frozen=True, kw_only=True)
class CachedMoments(LatentSource):
    """Encoded images as `main_cache.py` of MAR writes them: CLASS/IMAGE.npz with `moments` and `moments_flip`.

    A sample is `x` and `x_std`, each (C, H, W), scaled, and `y`, the place of its class among the folders' names.
    Held-out images are a fixed random choice.

    Args:
        folder: the folder of the classes.
        scale: factor for the latents; MAR's is 0.2325.
    """

    folder: str
    scale: float | None = 0.2325

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.scale is not None and self.scale > 0, "data.scale", self.scale, "a factor above 0")
        require(self.kind in (None, "moments"), "data.kind", self.kind, "moments, which is what MAR caches")

    @override
    def _open(self) -> tuple[Store, dict[str, Any]]:
        assert self.scale is not None
        return _Cache(Path(self.folder), self.scale), {"scale": self.scale, "kind": "moments"}


class _Cache(Rows):
    num_copies = len(COPIES)

    def __init__(self, folder: Path, scale: float) -> None:
        self._scale = scale
        try:
            self._classes = sorted(Path(entry.path) for entry in os.scandir(folder) if entry.is_dir())
            names = [
                sorted(os.fsencode(entry.name) for entry in os.scandir(members) if entry.name.endswith(".npz"))
                for members in self._classes
            ]
        except OSError as e:
            raise UserError(f"{folder}: not a readable folder ({e.strerror})") from None
        self._names = np.array([name for members in names for name in members])  # a list takes ten times the memory
        self._labels = np.repeat(np.arange(len(self._classes)), [len(members) for members in names])
        self.num_images = len(self._names)
        if self.num_images == 0:
            found = layout_of(folder, "CachedMoments")
            raise UserError(f"{folder}: holds no .npz files in folders of classes{found}")
        self._shape = self._moments(0, 0).shape
        self.num_channels = self._shape[0]

    @override
    def read(self, images: Indices, copies: Indices) -> tuple[NDArray[np.float32], Indices]:
        latents = np.empty((len(images), *self._shape), dtype=np.float32)
        half = self.num_channels // 2
        for row, (image, copy) in enumerate(zip(images, copies, strict=True)):
            moments = self._moments(int(image), int(copy))
            latents[row, :half] = self._scale * moments[:half]
            latents[row, half:] = self._scale * np.exp(0.5 * np.clip(moments[half:], *LOG_VARIANCES))
        return latents, self._labels[images]

    @override
    def where(self, name: str, image: int, copy: int) -> str:
        return f"{self._path(image)} ({COPIES[copy]})" if name != "y" else str(self._path(image).parent)

    def _path(self, image: int) -> Path:
        return self._classes[int(self._labels[image])] / os.fsdecode(bytes(self._names[image]))

    def _moments(self, image: int, copy: int) -> NDArray[Any]:
        path, name = self._path(image), COPIES[copy]
        try:
            with map_array(path) as archive:
                moments: NDArray[Any] = archive[name]
        except (AttributeError, TypeError, KeyError, ValueError, OSError) as e:
            raise UserError(f"{path}: holds no array '{name}', as MAR's cache does ({e})") from None
        expected = getattr(self, "_shape", moments.shape)
        if moments.dtype.kind != "f" or moments.ndim != 3 or moments.shape != expected:
            raise UserError(f"{path}: '{name}' is {moments.dtype} {moments.shape}, expected floats {expected}, 3 axes")
        return moments
