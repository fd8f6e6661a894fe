"""Latents as the code of others leaves them, normalised when they are read: REPA's and EDM2's, LightningDiT's."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from typing_extensions import override

from tinyfusion_core.errors import MissingFileError, UserError, require
from tinyfusion_core.parsing.records import check_inside, check_regular, read_json
from tinyfusion_core.parsing.weights import read_weights
from tinyfusion_core.runtime.files import map_array
from tinyfusion_dit.latents import LatentSource
from tinyfusion_dit.stores import Indices, Rows, Store, extremes_of, layout_of

LISTING, STATISTICS = "dataset.json", "latents_stats.pt"


@dataclass(frozen=True, kw_only=True)
class RawLatents(LatentSource):
    """Latents that lie as the autoencoder gave them, and are normalised when they are read.

    Args:
        folder: the folder.
        scale: factor for the latents, after the mean was subtracted and they were divided by the deviation.
        mean: mean of each channel; null for 0.
        std: standard deviation of each channel; null for 1.
    """

    folder: str
    mean: list[float] | None = None
    std: list[float] | None = None

    def __post_init__(self) -> None:
        require(self.scale is not None and self.scale > 0, "data.scale", self.scale, "a factor above 0")
        require(self.std is None or min(self.std, default=0) > 0, "data.std", self.std, "numbers above 0")

    @abstractmethod
    def _raw(self) -> tuple[Rows, str]:
        """The files, and the kind of what they hold."""

    def _statistics(self) -> tuple[Sequence[float] | None, Sequence[float] | None]:
        """Mean and standard deviation of each channel."""
        return self.mean, self.std

    @override
    def _open(self) -> tuple[Store, dict[str, Any]]:
        store, kind = self._raw()
        channels = store.num_channels // (2 if kind == "moments" else 1)
        found: dict[str, Any] = {"scale": self.scale, "kind": kind}
        for key, values in zip(("mean", "std"), self._statistics(), strict=True):
            if values is not None:
                require(len(values) == channels, f"data.{key}", values, f"a number for each of {channels} channels")
                found[key] = list(values)
        assert self.scale is not None
        return _Normalised(store, channels, self.scale, found.get("mean"), found.get("std")), found


@dataclass(frozen=True, kw_only=True)
class ListedMoments(RawLatents):
    """Encoded images as the preprocessing of REPA and EDM2 writes them: one file each, listed with labels.

    `dataset.json` in the folder lists the files and their labels. A file is (2C, H, W), the means and then the standard
    deviations of an image's posterior, not scaled. A sample is `x` and `x_std`, each (C, H, W), normalised, and `y`.
    Held-out images are a fixed random choice.

    REPA's networks take the default scale. Those of EDM2 take `scale: 0.5`, `mean: [5.81, 3.25, 0.12, -2.15]` and
    `std: [4.17, 4.62, 3.71, 3.28]`; their autoencoder was given images from 0 to 1, which a `decoder` here is not.
    """

    scale: float | None = 0.18215

    @override
    def _raw(self) -> tuple[Rows, str]:
        return _Listed(Path(self.folder)), "moments"


@dataclass(frozen=True, kw_only=True)
class LatentTensors(RawLatents):
    """Encoded images as LightningDiT extracts them: safetensors files with `latents`, `latents_flip` and `labels`.

    Each of them has `latents` (n, C, H, W), `labels` (n,) and mostly `latents_flip` like `latents`, the mirrored
    images. The mean and standard deviation of each channel are those of `latents_stats.pt` in the folder, unless they
    are given. A sample is `x` (C, H, W), normalised, and `y`. Held-out images are a fixed random choice.
    """

    scale: float | None = 1.0

    @override
    def _raw(self) -> tuple[Rows, str]:
        return _Tensors(Path(self.folder)), "sample"

    @override
    def _statistics(self) -> tuple[Sequence[float] | None, Sequence[float] | None]:
        if self.mean is not None and self.std is not None:
            return self.mean, self.std
        path = Path(self.folder) / STATISTICS
        if not path.is_file():
            raise MissingFileError(
                f"{path}: no such file; put there what was published with the autoencoder, or set data.mean and "
                "data.std, a number for each channel (0 and 1 for latents that are normalised already)"
            )
        found = read_weights(path, containers=())
        if missing := sorted({"mean", "std"} - found.keys()):
            raise UserError(f"{path}: holds {', '.join(sorted(found))}, and no '{missing[0]}'")
        means, stds = (found[key].flatten().tolist() for key in ("mean", "std"))
        return self.mean or means, self.std or stds


class _Normalised(Rows):
    """Latents of a store, (means - mean) * scale / std; deviations, if it has moments, * scale / std."""

    def __init__(
        self, store: Rows, channels: int, scale: float, mean: list[float] | None, std: list[float] | None
    ) -> None:
        self._store = store
        self.num_images, self.num_copies, self.num_channels = store.num_images, store.num_copies, store.num_channels
        shift, factor = np.zeros(store.num_channels, np.float32), np.full(store.num_channels, scale, np.float32)
        if mean is not None:
            shift[:channels] = mean
        if std is not None:
            factor /= np.tile(np.array(std, np.float32), store.num_channels // channels)
        self._shift, self._factor = shift[:, None, None], factor[:, None, None]

    @override
    def read(self, images: Indices, copies: Indices) -> tuple[NDArray[np.float32], Indices]:
        latents, labels = self._store.read(images, copies)
        return (latents - self._shift) * self._factor, labels

    @override
    def where(self, name: str, image: int, copy: int) -> str:
        return self._store.where(name, image, copy)

    @override
    def label_extremes(self) -> Sequence[tuple[int, str]]:
        return self._store.label_extremes()


class _Listed(Rows):
    """The layout of `ListedMoments`."""

    num_copies = 1

    def __init__(self, folder: Path) -> None:
        self._folder, path = folder, folder / LISTING
        if folder.is_file():
            raise UserError(f"data.folder: {folder} is a file; unpack it, and give the folder")
        if not path.is_file():
            raise MissingFileError(f"data.folder: '{folder}' lacks {LISTING}{layout_of(folder, 'ListedMoments')}")
        content = read_json(path)
        entries = content.get("labels") if isinstance(content, dict) else None
        if not isinstance(entries, list) or not entries or not all(map(_is_entry, entries)):
            raise UserError(f"{path}: 'labels' is no list of [file, label]; make it with a class for each image")
        names = [entry[0] for entry in entries]
        if bad := [name for name in names if not name.endswith(".npy")]:
            raise UserError(
                f"{path}: lists {bad[0]!r:.60}, which is no latent; give the folder with the encoded images"
            )
        check_inside(names, path)
        # In the order of the names, as its authors read it; as arrays, for lists take ten times the memory.
        encoded = np.array([name.encode() for name in names])
        order = np.argsort(encoded)
        self._names, self._labels = encoded[order], np.array([entry[1] for entry in entries], np.int64)[order]
        self.num_images = len(names)
        self._shape = self._moments(0).shape
        if len(self._shape) != 3 or self._shape[0] % 2:
            raise UserError(f"{self._path(0)}: shape {self._shape}, expected (2 * channels, height, width)")
        self.num_channels = self._shape[0]

    @override
    def read(self, images: Indices, copies: Indices) -> tuple[NDArray[np.float32], Indices]:
        latents = np.empty((len(images), *self._shape), dtype=np.float32)
        for row, image in enumerate(images):
            latents[row] = found = self._moments(int(image))
            if found.shape != self._shape:
                raise UserError(f"{self._path(int(image))}: shape {found.shape}, expected {self._shape}")
        return latents, self._labels[images]

    @override
    def where(self, name: str, image: int, copy: int) -> str:
        return f"{self._folder / LISTING} ({self._path(image).name})" if name == "y" else str(self._path(image))

    @override
    def label_extremes(self) -> Sequence[tuple[int, str]]:
        return extremes_of(self._labels, self.where)

    def _moments(self, image: int) -> NDArray[Any]:
        array = map_array(self._path(image))
        if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
            raise UserError(f"{self._path(image)}: holds no floating point numbers; expected means and deviations")
        return array

    def _path(self, image: int) -> Path:
        return self._folder / bytes(self._names[image]).decode()


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str) and type(entry[1]) is int


@dataclass(frozen=True)
class _File:
    path: Path
    shape: tuple[int, ...]
    flipped: bool


class _Tensors(Rows):
    """The layout of `LatentTensors`. Files are opened anew for every read, by rows."""

    def __init__(self, folder: Path) -> None:
        self._files = [_described(path) for path in sorted(folder.glob("*.safetensors"))]
        if not self._files:
            raise MissingFileError(
                f"data.folder: '{folder}' lacks .safetensors files with 'latents'{layout_of(folder, 'LatentTensors')}"
            )
        first = self._files[0]
        for file in self._files:
            if (file.shape[1:], file.flipped) != (first.shape[1:], first.flipped):
                raise UserError(
                    f"{file.path}: its latents are {list(file.shape[1:])}, {'with' if file.flipped else 'without'} "
                    f"latents_flip, and those of {first.path.name} differ; extract all of them alike"
                )
        self._ends = np.cumsum([file.shape[0] for file in self._files])
        self.num_images, self.num_channels = int(self._ends[-1]), first.shape[1]
        self.num_copies = 2 if first.flipped else 1

    @override
    def read(self, images: Indices, copies: Indices) -> tuple[NDArray[np.float32], Indices]:
        latents = np.empty((len(images), *self._files[0].shape[1:]), dtype=np.float32)
        files, rows = self._places(images)
        for number in np.unique(files):
            places = np.flatnonzero(files == number)
            latents[places] = self._rows(self._files[number].path, rows[places], copies[places])
        return latents, self._labels[images]

    @override
    def where(self, name: str, image: int, copy: int) -> str:
        (file,), (row,) = self._places(np.array([image]))
        tensor = "labels" if name == "y" else ("latents", "latents_flip")[copy]
        return f"{self._files[file].path} ({tensor}, row {row})"

    @override
    def label_extremes(self) -> Sequence[tuple[int, str]]:
        return extremes_of(self._labels, self.where)

    def _places(self, images: Indices) -> tuple[Indices, Indices]:
        """The files of these images, and the rows there."""
        files = np.searchsorted(self._ends, images, "right")
        return files, images - self._ends[files] + np.array([self._files[i].shape[0] for i in files])

    def _rows(self, path: Path, rows: Indices, copies: Indices) -> NDArray[np.float32]:
        try:
            with safe_open(path, framework="pt") as file:
                tensors = [file.get_slice(name) for name in ("latents", "latents_flip")[: self.num_copies]]
                found = [tensors[c][int(r) : int(r) + 1] for r, c in zip(rows, copies, strict=True)]
        except (OSError, SafetensorError) as e:
            raise UserError(f"{path}: damaged or cut short ({e}). Copy or make it again") from None
        numbers: NDArray[np.float32] = torch.cat(found).float().numpy()
        return numbers

    @cached_property
    def _labels(self) -> Indices:
        found = []
        for file in self._files:
            with safe_open(file.path, framework="np") as opened:
                found.append(opened.get_tensor("labels").astype(np.int64))
        return np.concatenate(found)


def _described(path: Path) -> _File:
    """The shape of a file's latents. Raises UserError if it is damaged, or no file of latents."""
    check_regular(path)
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  # no mapping
    except (OSError, SafetensorError) as e:
        raise UserError(f"{path}: damaged or cut short ({e}). Copy or make it again") from None
    shape = shapes.get("latents", ())
    if len(shape) != 4 or shapes.get("labels") != shape[:1] or shapes.get("latents_flip", shape) != shape:
        found = ", ".join(f"{name} {list(size)}" for name, size in sorted(shapes.items()))
        raise UserError(
            f"{path}: holds {found}; expected latents (n, channels, height, width), labels (n,), and latents_flip like "
            f"latents{layout_of(path.parent, 'LatentTensors')}"
        )
    return _File(path, shape, "latents_flip" in shapes)
