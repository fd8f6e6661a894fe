"""Sets of 8-bit images in common formats: folders of image files, and the .npz archives of ADM."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import torch
from numpy.lib import format as npy
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tinyfusion_core.errors import MissingFileError, UserError
from tinyfusion_core.parsing.records import check_regular
from tinyfusion_core.runtime.files import write_atomic

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff")
_SUFFIXES = {"FID": "", "sFID": "_s"}
"""What ends the names of an archive's statistics, by the distance that they are for."""
_DAMAGES = (KeyError, ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error)
"""Exceptions of reading a damaged archive."""


class Images(Protocol):
    """Images that are read a few at a time."""

    def __len__(self) -> int: ...

    def read(self, rows: range) -> Tensor:
        """Return images, (n, 3, height, width) uint8.

        Raises:
            UserError: one cannot be read; names the file.
        """
        ...


@dataclass(frozen=True)
class ImageSet:
    """A set of images.

    Attributes:
        images: the images, if available.
        statistics: by the distance that they are for, `FID` or `sFID`, mean `mu` (features,) and covariance `sigma`
            (features, features) of the Inception features of the set, or of a larger set that it was taken from;
            ADM's archives contain them.
    """

    images: Images | None
    statistics: dict[str, dict[str, Any]] | None = None


def open_images(path: Path, key: str) -> ImageSet:
    """Open the images in a folder, at any depth, or in an .npz archive.

    Args:
        path: folder or archive.
        key: the setting that named it, for messages.

    Raises:
        UserError: it does not exist, or holds neither images nor statistics.
    """
    if path.is_dir():
        return ImageSet(_Folder(path, key))
    if not path.exists():
        raise MissingFileError(f"{key}: '{path}' does not exist; expected a folder of pictures, or an .npz of ADM's")
    try:
        with zipfile.ZipFile(path) as archive:
            names = set(archive.namelist())
            statistics = {
                what: {name: _array(archive, f"{name}{suffix}.npy") for name in ("mu", "sigma")}
                for what, suffix in _SUFFIXES.items()
                if {f"mu{suffix}.npy", f"sigma{suffix}.npy"} <= names
            }
    except _DAMAGES as e:
        raise UserError(f"{path}: not an .npz of numbers ({e})") from None
    return ImageSet(_Archive(path) if not statistics or "arr_0.npy" in names else None, statistics or None)


def _array(archive: zipfile.ZipFile, name: str) -> NDArray[np.float64]:
    with archive.open(name) as member:
        return np.asarray(npy.read_array(member, allow_pickle=False), dtype=np.float64)


def rgb(images: Tensor) -> Tensor:
    """Convert images (n, 1 or 3, height, width) to three channels; grey ones are repeated.

    Raises:
        UserError: there are neither 1 nor 3 channels.
    """
    if images.shape[1] not in (1, 3):
        raise UserError(f"pictures have {images.shape[1]} channels; expected 1 (grey) or 3 (red, green, blue)")
    return images.expand(-1, 3, -1, -1)


def open_picture(path: Path) -> Image.Image:
    """Open an image as RGB.

    Raises:
        UserError: it cannot be read; names the file.
    """
    check_regular(path)
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as e:  # a damaged picture makes its decoder fail in any way it can
        raise UserError(f"{path}: not a readable picture ({type(e).__name__}: {e})") from None


class _Folder:
    def __init__(self, folder: Path, key: str) -> None:
        self._paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
        if not self._paths:
            raise UserError(f"{key}: '{folder}' holds no pictures ({', '.join(SUFFIXES)})")

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, rows: range) -> Tensor:
        pictures = [np.asarray(open_picture(self._paths[i])) for i in rows]
        for i, picture in zip(rows, pictures, strict=True):
            if picture.shape != pictures[0].shape:
                sizes = [f"{p.shape[1]}x{p.shape[0]}" for p in (picture, pictures[0])]
                raise UserError(
                    f"{self._paths[i]}: {sizes[0]} pixels, {self._paths[rows[0]].name} has {sizes[1]}; "
                    "crop all pictures to one size"
                )
        return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


class _Archive:
    """`arr_0` of an .npz, read sequentially: unpacked whole it would take gigabytes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._member: Any = zipfile.ZipFile(path).open("arr_0.npy")  # noqa: SIM115  # read as long as this lives
            version = npy.read_magic(self._member)
            read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            self._shape, fortran, dtype = read(self._member)
        except _DAMAGES as e:
            raise UserError(f"{path}: not an .npz with pictures in `arr_0` ({e})") from None
        if len(self._shape) != 4 or self._shape[3] != 3 or fortran or dtype != np.uint8:
            raise UserError(f"{path}: `arr_0` is {dtype} {self._shape}, expected uint8 (pictures, height, width, 3)")
        self._begin: int = self._member.tell()

    def __len__(self) -> int:
        return int(self._shape[0])

    def read(self, rows: range) -> Tensor:
        size = int(np.prod(self._shape[1:]))
        try:
            self._member.seek(self._begin + rows.start * size)
            content = self._member.read(len(rows) * size)
        except _DAMAGES as e:
            raise UserError(f"{self.path}: damaged ({e}); copy or download it again") from None
        if len(content) != len(rows) * size:
            raise UserError(f"{self.path}: cut short; copy or download it again")
        array = np.frombuffer(bytearray(content), dtype=np.uint8).reshape(len(rows), *self._shape[1:])
        return torch.from_numpy(array).permute(0, 3, 1, 2)


def write_archive(path: Path, parts: Iterator[Tensor], labels: Tensor) -> None:
    """Write an .npz in the layout of ADM: `arr_0` uint8 (N, H, W, 3), `arr_1` int64 (N,) labels.

    Args:
        path: where; written atomically.
        parts: (n, 3, H, W) uint8 images, N in total; only one part is in memory at a time.
        labels: (N,) class labels.
    """

    def write(file: BinaryIO) -> None:
        first = next(parts)
        shape = (len(labels), *first.shape[2:], first.shape[1])
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as member:
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                npy.write_array_header_1_0(member, header)
                for part in chain([first], parts):
                    member.write(part.permute(0, 2, 3, 1).contiguous().numpy().tobytes())
            with archive.open("arr_1.npy", "w") as member:
                npy.write_array(member, labels.long().numpy(), allow_pickle=False)

    write_atomic(path, write)


def write_png(path: Path, picture: Tensor) -> None:
    """Write an image (1 or 3, height, width) uint8 as a PNG file, atomically."""
    array = picture.permute(1, 2, 0).contiguous().numpy()
    image = Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
    write_atomic(path, lambda file: image.save(file, format="png"))
