"""Storage of latents on disk: one file per image, a few large arrays, or shards."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from tinyfusion_core.dataloading.shards import METADATA, ShardedSamples, shards_in
from tinyfusion_core.errors import UserError
from tinyfusion_core.protocols.data import Samples
from tinyfusion_core.runtime.files import map_array
from tinyfusion_core.runtime.seeding import generator

Indices = NDArray[np.int64]


class Store(ABC):
    """Latents on disk: every image in one or more copies (itself, mirrored)."""

    num_images: int
    num_copies: int

    @abstractmethod
    def split(self, num_held_out: int, moments: bool, held_out: bool) -> Samples:
        """Return the held-out samples, or the others.

        Args:
            num_held_out: number of held-out images.
            moments: whether the channels are means and then standard deviations.
            held_out: which side to return.

        Raises:
            UserError: the files cannot be split so.
        """


class Rows(Store):
    """Latents with random access: each can be read as fast as any other."""

    num_channels: int

    @abstractmethod
    def read(self, images: Indices, copies: Indices) -> tuple[NDArray[np.float32], Indices]:
        """Return latents (batch, ...) and labels (batch,) of these copies of these images."""

    @abstractmethod
    def where(self, name: str, image: int, copy: int) -> str:
        """Return where a latent (`x`, `x_std`) or label (`y`) lies."""

    def label_extremes(self) -> Sequence[tuple[int, str]]:
        """Return the smallest and largest label, and where each is; empty if that takes reading every file."""
        return []

    @override
    def split(self, num_held_out: int, moments: bool, held_out: bool) -> LatentSamples:
        if moments and self.num_channels % 2:
            raise UserError(f"moments are a mean and a std, but the latents have {self.num_channels} channels")
        order = torch.randperm(self.num_images, generator=generator("held-out images", self.num_images))
        return LatentSamples(self, moments, order[:num_held_out].sort().values.numpy(), held_out)


@dataclass(frozen=True)
class LatentSamples:
    """One side of a split.

    Args:
        store: the files.
        moments: whether the channels are means and then standard deviations.
        held: sorted indices of the held-out images.
        held_out: which side this is.
    """

    store: Rows
    moments: bool
    held: Indices
    held_out: bool

    @property
    def num_images(self) -> int:
        """Number of images on this side."""
        return len(self.held) if self.held_out else self.store.num_images - len(self.held)

    def __len__(self) -> int:
        return self.num_images * self.store.num_copies

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """Return float32 `x` (and `x_std`), each (batch, channels, height, width), and int64 `y`, (batch,).

        Raises:
            UserError: a file is missing or damaged.
            IndexError: an index is out of range.
        """
        if indices and not 0 <= min(indices) <= max(indices) < len(self):
            raise IndexError(f"sample index out of range, there are {len(self)}")
        images, copies = self._images(indices)
        latents, labels = self.store.read(images, copies)
        x, y = torch.from_numpy(latents), torch.from_numpy(labels)
        if self.moments:
            mean, std = x.chunk(2, dim=1)
            return {"x": mean, "x_std": std, "y": y}
        return {"x": x, "y": y}

    def extremes(self, name: str) -> Sequence[tuple[int, str]]:
        """Return the smallest and largest label of all images, and where each is, if one file holds them."""
        return self.store.label_extremes() if name == "y" else []

    def where(self, name: str, index: int) -> str:
        """Return the file of a latent or label, and its row there."""
        (image,), (copy,) = self._images([index])
        return self.store.where(name, int(image), int(copy))

    def _images(self, indices: Sequence[int]) -> tuple[Indices, Indices]:
        """The images of these samples, and which of their copies."""
        copies, i = np.divmod(np.array(indices, dtype=np.int64), self.num_images)
        if self.held_out:
            return self.held[i], copies
        # The i-th image that is not held out, without a list of all images: held[j] - j of them lie before held[j].
        return i + np.searchsorted(self.held - np.arange(len(self.held)), i, "right"), copies


class Shards(Store):
    """The layout that `tinyfusion encode` writes: the copies of an image are adjacent."""

    def __init__(self, url: str, metadata: dict[str, Any], mix: int) -> None:
        self._url, self._shards, self._mix = url, shards_in(metadata, url), mix
        self._num_rows = sum(shard.count for shard in self._shards)
        self.num_copies = 2 if metadata.get("flips") else 1
        self.num_images = self._num_rows // self.num_copies

    @override
    def split(self, num_held_out: int, moments: bool, held_out: bool) -> ShardedSamples:
        border = num_held_out * self.num_copies
        first, end = (0, border) if held_out else (border, self._num_rows)
        return ShardedSamples(self._url, self._shards, first, end, self._mix)


class Arrays(Rows):
    """The layout of `Latents`. Files are mapped anew for every read: truncating a mapped file kills the process."""

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

    @override
    def read(self, images: Indices, copies: Indices) -> tuple[NDArray[np.float32], Indices]:
        latents = np.empty((len(images), *self._shape[1:]), dtype=np.float32)
        for copy, path in enumerate(self._features):
            latents[copies == copy] = _load(path, self._shape)[images[copies == copy]]
        return latents, _load(self._labels, self._shape[:1], integers=True)[images].astype(np.int64)

    @override
    def where(self, name: str, image: int, copy: int) -> str:
        return f"{self._labels if name == 'y' else self._features[copy]} (row {image})"

    @override
    def label_extremes(self) -> Sequence[tuple[int, str]]:
        return extremes_of(_load(self._labels, self._shape[:1], integers=True), self.where)


class Files(Rows):
    """The layout of `LatentFolders`."""

    def __init__(self, features: Path, labels: Path) -> None:
        self._features, self._labels = features, labels
        self._names = _names(features)
        if len(self._names) == 0:
            raise UserError(f"{features}: holds no .npy files{layout_of(features, 'LatentFolders')}")
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

    @override
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

    @override
    def where(self, name: str, image: int, copy: int) -> str:
        return str(self._path(self._labels if name == "y" else self._features, image))

    def _path(self, folder: Path, image: int | np.int64) -> Path:
        return folder / os.fsdecode(bytes(self._names[image]))


def _names(folder: Path) -> NDArray[np.bytes_]:
    """The .npy files of a folder in lexicographic order, as an array: a list takes ten times the memory."""
    try:
        return np.array(sorted(os.fsencode(entry.name) for entry in os.scandir(folder) if entry.name.endswith(".npy")))
    except OSError as e:
        raise UserError(f"{folder}: not a readable folder ({e.strerror})") from None


def _load(path: Path, shape: Sequence[int] | None = None, integers: bool = False) -> NDArray[Any]:
    """Memory-map a .npy file of numbers.

    Raises:
        UserError: it is missing, truncated, holds anything else, or has another shape than expected.
    """
    array = map_array(path)
    wanted = "iu" if integers else "f"
    if not isinstance(array, np.ndarray) or array.dtype.kind not in wanted:
        found = array.dtype if isinstance(array, np.ndarray) else "an archive"
        raise UserError(f"{path}: holds {found}, expected {'integers' if integers else 'floating point numbers'}")
    if shape is not None and array.shape != tuple(shape):
        raise UserError(f"{path}: shape {array.shape}, expected {tuple(shape)}")
    return array


def extremes_of(labels: NDArray[Any], where: Callable[[str, int, int], str]) -> Sequence[tuple[int, str]]:
    """Return the smallest and largest of all labels (images,), and where each is."""
    return [(int(labels[i]), where("y", i, 0)) for i in (int(labels.argmin()), int(labels.argmax()))]


def layout_of(folder: Path, reader: str) -> str:
    """Return which other class reads the latents in a folder, to end the message of one that does not.

    Args:
        folder: the folder.
        reader: the class that does not.
    """
    parts = [next((p for p in sorted(folder.glob(f"*{kind}")) if p.is_dir()), None) for kind in ("features", "labels")]
    known = (
        ("Latents", (folder / METADATA).is_file(), METADATA),
        ("ListedMoments", (folder / "dataset.json").is_file(), "dataset.json, as REPA and EDM2 list latents"),
        ("CachedMoments", next(folder.glob("*/*.npz"), None), ".npz files in folders of classes, as MAR caches them"),
        (
            "LatentTensors",
            next(folder.glob("*.safetensors"), None),
            ".safetensors files, as LightningDiT extracts them",
        ),
        ("LatentFolders", all(parts), "a file for each image"),
    )
    for name, there, what in known:
        if there and name != reader:
            options = f", init_args: {{features: {parts[0]}, labels: {parts[1]}}}" if name == "LatentFolders" else ""
            return f", but holds {what}: data: {{class_path: {name}{options}}}"
    return ""
