"""Data sets of images that were encoded once, by the autoencoder in whose latent space the network works."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tinyfusion_core.autoencoder import check_autoencoder, decode, load_autoencoder
from tinyfusion_core.data import DataSource, Samples
from tinyfusion_core.errors import MissingFileError, UserError, require
from tinyfusion_core.files import map_array
from tinyfusion_core.randomness import generator
from tinyfusion_core.shards import FORMAT_VERSION, METADATA, ShardedSamples, read_metadata, shards_in

Indices = NDArray[np.int64]
_NEEDED = ("features.npy", "labels.npy")
_STATED = ("vae", "scale", "kind")
"""What metadata.json says of the latents, and the recipe may state too."""


class _Store(ABC):
    """Latents on disk: every image in one or several copies (itself, flipped)."""

    num_images: int
    num_copies: int

    @abstractmethod
    def split(self, num_held_out: int, moments: bool, held_out: bool) -> Samples:
        """One side of the split."""


class _Rows(_Store):
    """Latents any of which can be read as fast as any other."""

    num_channels: int

    @abstractmethod
    def read(self, images: Indices, copies: Indices) -> tuple[NDArray[np.float32], Indices]:
        """Latents (B, ...) and labels (B,) of these copies of these images."""

    def split(self, num_held_out: int, moments: bool, held_out: bool) -> LatentSamples:
        if moments and self.num_channels % 2:
            raise UserError(f"moments are a mean and a std, but the latents have {self.num_channels} channels")
        order = torch.randperm(self.num_images, generator=generator("held-out images", self.num_images))
        return LatentSamples(self, moments, order[:num_held_out].sort().values.numpy(), held_out)


@dataclass(frozen=True, kw_only=True)
class _LatentSource(DataSource):
    vae: str | None = None
    scale: float | None = None
    kind: Literal["sample", "moments"] | None = None
    num_held_out: int = 1000
    decoder: str | None = None

    @abstractmethod
    def _open(self) -> tuple[_Store, dict[str, Any]]:
        """The files and what their metadata.json says."""

    @cached_property
    def _opened(self) -> tuple[_Store, dict[str, Any]]:
        opened = self._open()  # listing the folders of a large data set takes minutes: once, not for every reader
        if self.decoder is not None:
            check_autoencoder(self.decoder)  # or else the last stage of a long run would be the first to miss it
        return opened

    def train(self) -> Samples:
        return self._split(held_out=False)

    def held_out(self) -> Samples:
        return self._split(held_out=True)

    def pixels(self, x: Tensor) -> Tensor | None:
        """Decoded on the device of the latents, by `decoder`; None without one."""
        if self.decoder is None:
            return None
        metadata = self._opened[1]
        scale = metadata.get("scale", self.scale)
        if scale is None:
            raise UserError("data.scale: neither the recipe nor metadata.json says it, and data.decoder needs it")
        return decode(self._decoder, x, scale, metadata.get("shift", 0.0))

    @cached_property
    def _decoder(self) -> nn.Module:
        assert self.decoder is not None
        return load_autoencoder(self.decoder)

    def _split(self, held_out: bool) -> Samples:
        store, metadata = self._opened
        for key in _STATED:
            stated, found = getattr(self, key), metadata.get(key)
            if None not in (stated, found) and stated != found:
                raise UserError(f"data.{key} is {stated!r} in the recipe, but the latents were made with {found!r}")
        if not 0 < self.num_held_out < store.num_images:
            raise UserError(f"data.num_held_out is {self.num_held_out}; expected 1 to {store.num_images - 1}")
        kind = self.kind or metadata.get("kind", "sample")
        if kind not in ("sample", "moments"):
            raise UserError(f"metadata.json: kind '{kind}' is unknown (known: sample, moments)")
        return store.split(self.num_held_out, kind == "moments", held_out)


@dataclass(frozen=True, kw_only=True)
class Latents(_LatentSource):
    """Encoded images, in the shards that `tinyfusion encode` makes, or in a few large arrays.

    `metadata.json` says what the folder holds: `format_version` 1, `vae`, `scale`, `kind`, and for shards their names,
    rows and hashes. Arrays are `features.npy` (N, C, H, W), or (N, 2C, H, W) with means and then standard deviations;
    `labels.npy` (N,), integers; optionally `flipped.npy`, the mirrored images in the shape of `features.npy`. All
    latents are stored scaled.

    A sample is `x` (C, H, W), `y` and, with moments, `x_std` like `x`. The images held out are the same for every
    seed and recipe, and no copy of them is trained on: of shards the first images, which are in no order; of arrays
    some from everywhere. Of n images in arrays sample n + i is the flipped sample i; in shards it is the one behind.

    Args:
        folder: the folder; that of shards may be any URL that fsspec knows (s3://..., hf://..., https://...).
        vae: name of the autoencoder that the latents must come from; null takes what there is.
        scale: factor that the latents must have been multiplied by (Stable Diffusion's: 0.18215); null, any.
        kind: "sample" or "moments"; null takes what there is.
        num_held_out: number of images that are kept from training.
        decoder: the autoencoder that makes pictures of latents: a folder, a checkpoint file or a name on the hub; null
            shows no pictures.
        mix: how many shards a batch is drawn from; a multiple of the number of processes gives each shards of its
            own. Memory grows with it.
    """

    folder: str
    mix: int = 8

    def __post_init__(self) -> None:
        require(self.mix >= 1, "data.mix", self.mix, "at least 1")

    def _open(self) -> tuple[_Store, dict[str, Any]]:
        try:
            metadata = read_metadata(self.folder)
        except MissingFileError:
            raise self._missing([METADATA]) from None
        for key in _STATED:
            if getattr(self, key) is not None and key not in metadata:
                raise UserError(
                    f"{self.folder}/{METADATA}: does not say '{key}', which the recipe states; add it, or set "
                    f"data.{key}: null"
                )
        if "shards" in metadata:
            return _Shards(self.folder, metadata, self.mix), metadata
        if missing := [name for name in _NEEDED if not (Path(self.folder) / name).is_file()]:
            raise self._missing(missing)
        return _Arrays(Path(self.folder)), metadata

    def _missing(self, names: Sequence[str]) -> MissingFileError:
        made = f"--vae {self.decoder or self.vae or 'AUTOENCODER'}"
        made += f" --name {self.vae}" if self.vae and self.decoder not in (None, self.vae) else ""
        made += f" --scale {self.scale}" if self.scale else ""
        stated = {"vae": self.vae, "scale": self.scale, "kind": self.kind or "sample"}
        return MissingFileError(
            f"data.folder: '{self.folder}' lacks {', '.join(names)}. Put there the training images, encoded once: "
            f"`tinyfusion encode IMAGES --out {self.folder} {made} --kind {stated['kind']} --flip`; or features.npy "
            "(images, channels, height, width), labels.npy (images,), for mirrored images flipped.npy, and "
            f"{METADATA}: {json.dumps({'format_version': FORMAT_VERSION, **stated})}"
        )


@dataclass(frozen=True, kw_only=True)
class LatentFolders(_LatentSource):
    """Encoded images in one file each, as the feature extraction of TinyFusion writes them.

    A file of the features is (C, H, W), or (2, C, H, W) with the mirrored image second. Labels are in files of
    the same names. Samples and options are those of `Latents`; `metadata.json` (in `features`) may be missing,
    and then the recipe is believed, the latents being samples unless it says otherwise.

    Args:
        features: folder of the latents.
        labels: folder of the labels.
        vae: name of the autoencoder that the latents must come from; null takes what there is.
        scale: factor that the latents must have been multiplied by (Stable Diffusion's: 0.18215); null, any.
        kind: "sample" or "moments"; null takes what there is.
        num_held_out: number of images that are kept from training.
        decoder: the autoencoder that makes pictures of latents: a folder, a checkpoint file or a name on the hub; null
            shows no pictures.
    """

    features: str
    labels: str

    def _open(self) -> tuple[_Store, dict[str, Any]]:
        described = (Path(self.features) / METADATA).exists()
        return _Files(Path(self.features), Path(self.labels)), read_metadata(self.features) if described else {}


@dataclass(frozen=True)
class LatentSamples:
    """One side of a split.

    Args:
        store: the files.
        moments: whether the channels are means and then standard deviations.
        held: sorted indices of the images that are held out.
        held_out: which side this is.
    """

    store: _Rows
    moments: bool
    held: Indices
    held_out: bool

    @property
    def num_images(self) -> int:
        return len(self.held) if self.held_out else self.store.num_images - len(self.held)

    def __len__(self) -> int:
        return self.num_images * self.store.num_copies

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """Float32 `x` (and `x_std`), int64 `y`. Raises UserError when a file has vanished or is damaged."""
        if indices and not 0 <= min(indices) <= max(indices) < len(self):
            raise IndexError(f"sample index out of range, there are {len(self)}")
        copies, i = np.divmod(np.array(indices, dtype=np.int64), self.num_images)
        # The i-th image that is not held out, without a list of all images: held[j] - j of them lie before held[j].
        images = (
            self.held[i] if self.held_out else i + np.searchsorted(self.held - np.arange(len(self.held)), i, "right")
        )
        latents, labels = self.store.read(images, copies)
        x, y = torch.from_numpy(latents), torch.from_numpy(labels)
        if self.moments:
            mean, std = x.chunk(2, dim=1)
            return {"x": mean, "x_std": std, "y": y}
        return {"x": x, "y": y}


class _Shards(_Store):
    """The layout that `tinyfusion encode` writes: the copies of an image follow each other."""

    def __init__(self, url: str, metadata: dict[str, Any], mix: int) -> None:
        self._url, self._shards, self._mix = url, shards_in(metadata, url), mix
        self._num_rows = sum(shard.count for shard in self._shards)
        self.num_copies = 2 if metadata.get("flips") else 1
        self.num_images = self._num_rows // self.num_copies

    def split(self, num_held_out: int, moments: bool, held_out: bool) -> ShardedSamples:
        border = num_held_out * self.num_copies
        first, end = (0, border) if held_out else (border, self._num_rows)
        return ShardedSamples(self._url, self._shards, first, end, self._mix)


class _Arrays(_Rows):
    """The layout of `Latents`. Files are mapped anew for every read: cutting one that is mapped kills the process."""

    def __init__(self, folder: Path) -> None:
        self._features = [folder / "features.npy"]
        if (folder / "flipped.npy").exists():
            self._features.append(folder / "flipped.npy")
        self._labels = folder / "labels.npy"
        self._shape = _load(self._features[0]).shape
        if len(self._shape) != 4:
            raise UserError(f"{self._features[0]}: shape {self._shape}, expected (images, channels, height, width)")
        self.num_images, self.num_channels = self._shape[:2]
        self.num_copies = len(self._features)
        for path in self._features:
            _load(path, self._shape)
        _load(self._labels, self._shape[:1], integers=True)

    def read(self, images: Indices, copies: Indices) -> tuple[NDArray[np.float32], Indices]:
        latents = np.empty((len(images), *self._shape[1:]), dtype=np.float32)
        for copy, path in enumerate(self._features):
            latents[copies == copy] = _load(path, self._shape)[images[copies == copy]]
        return latents, _load(self._labels, self._shape[:1], integers=True)[images].astype(np.int64)


class _Files(_Rows):
    """The layout of `LatentFolders`."""

    def __init__(self, features: Path, labels: Path) -> None:
        self._features, self._labels = features, labels
        self._names = _names(features)
        if len(self._names) == 0:
            raise UserError(f"{features}: holds no .npy files")
        if not np.array_equal(self._names, _names(labels)):
            raise UserError(f"{features} and {labels} do not hold files of the same names")
        self.num_images = len(self._names)
        self._shape = _load(self._path(features, 0)).shape
        if len(self._shape) not in (3, 4):
            raise UserError(
                f"{self._path(features, 0)}: shape {self._shape}, expected ([copies,] channels, height, width)"
            )
        self.num_copies = self._shape[0] if len(self._shape) == 4 else 1
        self.num_channels = self._shape[-3]

    def read(self, images: Indices, copies: Indices) -> tuple[NDArray[np.float32], Indices]:
        latents = np.empty((len(images), *self._shape[-3:]), dtype=np.float32)
        labels = np.empty(len(images), dtype=np.int64)
        for row, (image, copy) in enumerate(zip(images, copies, strict=True)):
            latents[row] = _load(self._path(self._features, image), self._shape).reshape(-1, *self._shape[-3:])[copy]
            path = self._path(self._labels, image)
            label = _load(path, integers=True)
            if label.size != 1:
                raise UserError(f"{path}: shape {label.shape}, expected one label")
            labels[row] = label.item()
        return latents, labels

    def _path(self, folder: Path, image: int | np.int64) -> Path:
        return folder / os.fsdecode(bytes(self._names[image]))


def _names(folder: Path) -> NDArray[np.bytes_]:
    """The .npy files of a folder in lexicographic order, as an array: a list takes ten times the memory."""
    try:
        return np.array(sorted(os.fsencode(entry.name) for entry in os.scandir(folder) if entry.name.endswith(".npy")))
    except OSError as e:
        raise UserError(f"{folder}: not a readable folder ({e.strerror})") from None


def _load(path: Path, shape: Sequence[int] | None = None, integers: bool = False) -> NDArray[Any]:
    """Map a .npy file of numbers.

    Raises:
        UserError: it is missing, cut short, holds anything else, or its shape is not the expected one.
    """
    array = map_array(path)
    wanted = "iu" if integers else "f"
    if not isinstance(array, np.ndarray) or array.dtype.kind not in wanted:
        found = array.dtype if isinstance(array, np.ndarray) else "an archive"
        raise UserError(f"{path}: holds {found}, expected {'integers' if integers else 'floating point numbers'}")
    if shape is not None and array.shape != tuple(shape):
        raise UserError(f"{path}: shape {array.shape}, expected {tuple(shape)}")
    return array
