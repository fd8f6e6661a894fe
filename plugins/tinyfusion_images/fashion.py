"""Fashion-MNIST: 70,000 real photographs of clothes, 28x28 grey pixels, ten classes.

Source: H. Xiao, K. Rasul and R. Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning
Algorithms", arXiv:1708.07747, MIT licence. Read from the four original IDX files, compressed or not.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from typing_extensions import override

from tinyfusion_core.errors import MissingFileError, UserError, require
from tinyfusion_core.parsing.records import check_regular
from tinyfusion_core.protocols.data import DataSource, FeatureSpace, Tensors

NUM_TEST = 10_000


@dataclass(frozen=True, kw_only=True)
class Fashion(DataSource):
    """28x28 grey images of clothes, values in [-1, 1], ten classes: 60,000 for training, the others held out.

    Args:
        folder: where the original IDX files are (`train-images-idx3-ubyte`, with or without `.gz`, and so on).
        num_held_out: how many of the 10,000 test images to use, the first ones.
    """

    folder: str = "/usr/share/datasets/fashion-mnist"
    num_held_out: int = 1000

    def __post_init__(self) -> None:
        require(1 <= self.num_held_out <= NUM_TEST, "data.num_held_out", self.num_held_out, f"1 to {NUM_TEST}")

    @override
    def train(self) -> Tensors:
        return self._train

    @override
    def held_out(self) -> Tensors:
        test = self._part("t10k")
        return Tensors({name: column[: self.num_held_out] for name, column in test.columns.items()})

    def pixels(self, x: Tensor) -> Tensor:
        """Map examples, (batch, 1, height, width) in [-1, 1], to images in [0, 1], the same shape."""
        return ((x + 1) / 2).clamp(0, 1)

    @override
    def feature_space(self) -> FeatureSpace:
        from tinyfusion_images.features import shipped

        return shipped("fashion")

    @cached_property
    def _train(self) -> Tensors:
        return self._part("train")

    def _part(self, part: str) -> Tensors:
        images = read_idx(self._file(f"{part}-images-idx3-ubyte"))
        labels = read_idx(self._file(f"{part}-labels-idx1-ubyte"))
        if images.shape[1:] != (28, 28) or labels.shape != images.shape[:1]:
            raise UserError(
                f"data.folder: {self.folder} holds images {tuple(images.shape)} and labels {tuple(labels.shape)} for "
                f"'{part}'; expected (n, 28, 28) and (n,)"
            )
        return Tensors({"x": images[:, None].float() / 127.5 - 1, "y": labels.long()})

    def _file(self, name: str) -> Path:
        for path in (Path(self.folder, name), Path(self.folder, f"{name}.gz")):
            if path.is_file():
                return path
        raise MissingFileError(
            f"data.folder: no {name} or {name}.gz in {self.folder}. Get the four files of Fashion-MNIST with "
            "`apt install dataset-fashion-mnist`, or from https://github.com/zalandoresearch/fashion-mnist, and "
            "give their folder as data.folder"
        )


def read_idx(path: Path) -> Tensor:
    """Read the uint8 array of an IDX file, of any shape.

    The file is: magic 0x000008 and the number of dimensions, big-endian sizes, the values.

    Raises:
        UserError: damaged, or not such a file.
    """
    check_regular(path)
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        magic, dims = raw[:3], raw[3]
        shape = struct.unpack(f">{dims}I", raw[4 : 4 + 4 * dims])
    except (OSError, EOFError, IndexError, struct.error, zlib.error) as e:
        raise UserError(f"{path}: not a readable IDX file ({e})") from None
    values = raw[4 + 4 * dims :]
    if magic != b"\0\0\x08" or len(values) != math.prod(shape):
        raise UserError(f"{path}: not an IDX file of bytes, or cut short; fetch it again")
    return torch.frombuffer(bytearray(values), dtype=torch.uint8).view(shape)
