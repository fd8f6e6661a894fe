"""Latents and prompts that were encoded beforehand, read from their files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from typing_extensions import override

from tinyfusion_core.errors import MissingFileError, UserError, require
from tinyfusion_core.parsing.records import check_regular
from tinyfusion_core.protocols.data import DataSource
from tinyfusion_core.runtime.files import map_array
from tinyfusion_core.runtime.seeding import generator

NAMES = ("x", "x_std", "condition", "y", "text", "mask", "pooled", "image")


@dataclass(frozen=True, kw_only=True)
class EncodedPrompts(DataSource):
    """Latents with the embeddings of their prompts, in one file per name or one for all.

    The folder holds `.npy` files or `.safetensors` files. The tensors are named `x` (N, ...), latents as the
    network takes them, scaled and shifted as its pipeline does; `text` (N, L, D), `mask` (N, L), `pooled` (N, D), `y`
    (N,), those that the network takes; `x_std` like `x`, if `x` are means. Networks that make videos of images, fill
    or edit take `condition` (N, ...), the channels that the pipeline puts beside the noisy latents; Wan 2.1 besides
    `image` (N, T, D), the embeddings of the image. A `.npy` file has the name of its tensor; a safetensors file may
    hold several. Only the rows of a batch are read.

    Args:
        folder: the folder.
        num_held_out: rows that are not trained on, the same for every seed.
    """

    deviations = {"x": (0.4, 2.5)}  # pipelines scale and shift latents to make it 1

    folder: str
    num_held_out: int = 256

    @override
    def train(self) -> EncodedSamples:
        return self._part(held_out=False)

    @override
    def held_out(self) -> EncodedSamples:
        return self._part(held_out=True)

    def _part(self, held_out: bool) -> EncodedSamples:
        files = self._files
        rows = len(files["x"])
        require(1 <= self.num_held_out < rows, "data.num_held_out", self.num_held_out, f"1 to {rows - 1}")
        order = torch.randperm(rows, generator=generator("held-out prompts", rows))
        some = order[: self.num_held_out] if held_out else order[self.num_held_out :]
        return EncodedSamples(files, some.sort().values)

    @cached_property
    def _files(self) -> dict[str, _Column]:
        folder = Path(self.folder)
        columns: dict[str, _Column] = {}
        for path in sorted([*folder.glob("*.npy"), *folder.glob("*.safetensors")]):
            for column in _columns(path):
                if column.name not in NAMES:
                    raise UserError(f"{path}: holds '{column.name}'; expected {', '.join(NAMES)}")
                if column.name in columns:
                    raise UserError(f"{path}: '{column.name}' is in {columns[column.name].path.name} too; keep one")
                columns[column.name] = column
        if "x" not in columns:
            raise MissingFileError(
                f"data.folder: no x.npy, and no .safetensors file with an 'x', in {folder}; expected latents, and "
                f"beside them those of {', '.join(NAMES[1:])} that the network takes"
            )
        for column in columns.values():
            if column.shape[:1] != columns["x"].shape[:1]:
                raise UserError(
                    f"{column.path}: '{column.name}' has shape {list(column.shape)}, 'x' has {len(columns['x'])} rows"
                )
        return columns


@dataclass(frozen=True)
class EncodedSamples:
    """Some rows of the files.

    Args:
        columns: the files by name.
        rows: (rows,) their indices, sorted.
    """

    columns: Mapping[str, _Column]
    rows: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """Return these samples by name, each (rows, ...).

        Raises:
            UserError: a file is missing or damaged.
        """
        rows = self.rows[indices].tolist()
        return {name: column.read(rows) for name, column in self.columns.items()}

    def extremes(self, name: str) -> Sequence[tuple[int, str]]:
        """Return the smallest and largest of these samples' labels, and where each is."""
        if name not in self.columns or len(self.columns[name].shape) != 1:
            return []
        values = self.columns[name].whole()[self.rows]
        if values.dtype.is_floating_point or values.dtype == torch.bool:
            return []
        return [(int(values[i]), self.where(name, i)) for i in (int(values.argmin()), int(values.argmax()))]

    def where(self, name: str, index: int) -> str:
        """Return the file of a column, and a sample's row in it."""
        return f"{self.columns[name].path} (row {int(self.rows[index])})"


@dataclass(frozen=True)
class _Column:
    """A tensor in a file, which is opened anew for every read: truncating a mapped file kills the process."""

    name: str
    path: Path
    shape: tuple[int, ...]

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, rows: list[int]) -> Tensor:
        """(rows, ...) as float32, int64 or bool, depending on the file."""
        found = self._stored(rows)
        if found.is_floating_point():
            return found.float()
        return found if found.dtype == torch.bool else found.long()

    def whole(self) -> Tensor:
        """(N, ...), in the dtype of the file."""
        return self._stored(None)

    def _stored(self, rows: list[int] | None) -> Tensor:
        """These rows, or all, in the dtype of the file."""
        if self.path.suffix == ".npy":
            array = _mapped(self.path)
            if array.shape != self.shape:
                raise UserError(f"{self.path}: has changed to shape {array.shape}; put the old one back, or start anew")
            return torch.from_numpy(array[:].copy() if rows is None else array[rows])
        try:
            with safe_open(self.path, framework="pt") as file:
                if rows is None:
                    whole: Tensor = file.get_tensor(self.name)
                    return whole
                part = file.get_slice(self.name)
                return torch.cat([part[row : row + 1] for row in rows])
        except (OSError, SafetensorError) as e:
            raise UserError(f"{self.path}: damaged or cut short ({e}). Copy or make it again") from None


def _columns(path: Path) -> list[_Column]:
    if path.suffix == ".npy":
        return [_Column(path.stem, path, _mapped(path).shape)]
    check_regular(path)
    try:
        with safe_open(path, framework="pt") as file:
            return [_Column(name, path, tuple(file.get_slice(name).get_shape())) for name in file.keys()]  # noqa: SIM118
    except (OSError, SafetensorError) as e:
        raise UserError(f"{path}: damaged or cut short ({e}). Copy or make it again") from None


def _mapped(path: Path) -> np.ndarray[Any, Any]:
    array = map_array(path)
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiub" or not array.ndim:
        raise UserError(f"{path}: holds no array of numbers with a row for each sample")
    return array
