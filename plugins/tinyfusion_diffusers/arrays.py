"""Tensors with a row for each sample, in files that are read by rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tinyfusion_core.errors import UserError
from tinyfusion_core.parsing.records import check_regular
from tinyfusion_core.runtime.files import map_array


@dataclass(frozen=True)
class EncodedSamples:
    """Some rows of the files.

    Args:
        columns: the files by name.
        rows: (rows,) their indices, sorted.
    """

    columns: Mapping[str, Column]
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
class Column:
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


def columns_in(path: Path) -> list[Column]:
    """Return the tensors of a file.

    Raises:
        UserError: it is damaged, or holds none that has rows.
    """
    if path.suffix == ".npy":
        return [Column(path.stem, path, _mapped(path).shape)]
    check_regular(path)
    try:
        with safe_open(path, framework="pt") as file:
            return [Column(name, path, tuple(file.get_slice(name).get_shape())) for name in file.keys()]  # noqa: SIM118
    except (OSError, SafetensorError) as e:
        raise UserError(f"{path}: damaged or cut short ({e}). Copy or make it again") from None


def _mapped(path: Path) -> np.ndarray[Any, Any]:
    array = map_array(path)
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiub" or not array.ndim:
        raise UserError(f"{path}: holds no array of numbers with a row for each sample")
    return array
