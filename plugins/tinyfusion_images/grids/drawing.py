"""Draws images as one grid, with texts below them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from torch import Tensor

from tinyfusion_core.runtime.files import write_atomic

_MARK = {"Software": "tinyfusion"}
"""Text in the header of a grid, which tells it from pictures of the user's."""


def draw_grid(images: Tensor, path: Path, columns: int, below: Sequence[str] | None = None) -> None:
    """Write images as one grid; small images are enlarged.

    Args:
        images: (n, channels, height, width) uint8 on the CPU; 1 or at least 3 channels.
        path: the PNG file.
        columns: images per row.
        below: a text under each image.
    """
    grid = Image.fromarray(_grid(images, columns))
    factor = max(1, 960 // max(grid.size))
    picture = grid.resize((grid.width * factor, grid.height * factor), Image.Resampling.NEAREST)
    if below is not None:
        height, width = (factor * (side + 1) for side in images.shape[2:])
        picture = _with_texts(picture, below, columns, (width, height))
    mark = PngImagePlugin.PngInfo()
    for key, value in _MARK.items():
        mark.add_text(key, value)
    write_atomic(path, lambda file: picture.save(file, format="png", pnginfo=mark))


def _with_texts(grid: Image.Image, texts: Sequence[str], columns: int, cell: tuple[int, int]) -> Image.Image:
    """A grid whose rows are moved apart, with a text under each image; a cell is (width, height) with its gap."""
    (width, height), rows = cell, -(-len(texts) // columns)
    size = max(12, width // 6)
    room = size * 5 // 4
    picture = Image.new(grid.mode, (grid.width, rows * (height + room)))
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(size)
    for row in range(rows):
        top = row * (height + room)
        picture.paste(grid.crop((0, row * height, grid.width, (row + 1) * height)), (0, top))
        for column, text in enumerate(texts[row * columns : (row + 1) * columns]):
            pen.text((column * width + width // 2, top + height), text, "white", font, anchor="mt")
    return picture


def is_grid(path: Path) -> bool:
    """Return whether a file is one that `draw_grid` wrote."""
    try:
        with Image.open(path) as picture:
            return _MARK.items() <= picture.info.items()
    except Exception:  # what is no picture makes its decoder fail in any way it can
        return False


def _grid(images: Tensor, columns: int) -> np.ndarray[Any, Any]:
    """(n, channels, height, width) uint8 images -> one (rows, width[, 3]) image with a gap of one pixel."""
    n, channels, height, width = images.shape
    rows = -(-n // columns)
    canvas = np.zeros((rows * (height + 1) - 1, columns * (width + 1) - 1, channels), dtype=np.uint8)
    for i, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        top, left = (i // columns) * (height + 1), (i % columns) * (width + 1)
        canvas[top : top + height, left : left + width] = image
    return canvas[..., 0] if channels == 1 else canvas[..., :3]
