"""Examples as images, and the ones that every run shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from torch import Tensor
from typing_extensions import override

from tinyfusion_core.dataloading.mixture import Mixture
from tinyfusion_core.errors import UserError
from tinyfusion_core.evaluation.generation import generate
from tinyfusion_core.evaluation.metrics import Measurement, Metric, Models
from tinyfusion_core.parsing.weights import read_weights
from tinyfusion_core.protocols.data import DataSource
from tinyfusion_core.protocols.task import Task
from tinyfusion_core.reporting.measured import results
from tinyfusion_core.reporting.page import Figures, Picture
from tinyfusion_core.runtime.distributed import on_main_process
from tinyfusion_core.runtime.files import save_tensors, write_atomic
from tinyfusion_core.runtime.run_folder import RunFolder
from tinyfusion_core.training.trainer import Trainer

SAMPLES = "samples.safetensors"
"""File in the run folder with the images that the report shows."""
NUM_SHOWN = 40
"""Images of each network, in the file."""
NUM_IN_REPORT = 12
"""Images of each network in the report, of labels as different as there are."""
_MARK = {"Software": "tinyfusion"}
"""Text in the header of a grid, which tells it from pictures of the user's."""


@runtime_checkable
class Shown(Protocol):
    """The method of a data source whose examples can be shown as images; it need not derive from this class.

    If that depends on its settings, it also has a property `has_pixels`: whether `pixels` returns images; known before
    any file is read.
    """

    def pixels(self, x: Tensor) -> Tensor | None:
        """Convert examples to images that can be shown.

        Args:
            x: (batch, ...) examples.

        Returns:
            (batch, channels, height, width) values in [0, 1]; None if examples cannot be shown.
        """
        ...


def shown_by(data: DataSource | None) -> Shown | None:
    """Return what shows examples as images, of a mixture its first part; None if it cannot. Reads no file."""
    while isinstance(data, Mixture):
        data = next(iter(data.parts.values()))
    return data if isinstance(data, Shown) and bool(getattr(data, "has_pixels", True)) else None


def has_pictures(task: Task) -> bool:
    """Return whether the task's examples can be shown as images."""
    x, data = task.backbone.example(1).get("x"), shown_by(task.data)
    return x is not None and data is not None and data.pixels(x) is not None


def pictures(task: Task, x: Tensor) -> Tensor:
    """Convert examples to images.

    Args:
        task: its data source decodes them.
        x: (n, ...) examples; latents are decoded on their device.

    Returns:
        (n, channels, height, width) uint8 on the CPU; black where a network has diverged.

    Raises:
        UserError: the data cannot be shown.
    """
    data = shown_by(task.data)
    pixels = None if data is None else data.pixels(x)
    if pixels is None:
        raise UserError(f"data: {type(task.data).__name__} cannot show its examples as pictures")
    return (255 * pixels.nan_to_num()).round().to(torch.uint8).cpu()


def by_label(images: Tensor, labels: Tensor) -> Tensor:
    """Sort images, (n, ...), by their labels, (n,). Unchanged if the labels are not single numbers."""
    return images[labels.argsort(stable=True)] if labels.ndim == 1 else images


@dataclass(frozen=True)
class Pictures(Metric):
    """Measures nothing; shows in every run what the networks generate, if the data can be shown as images.

    `samples.safetensors` in the run folder contains images of each network from the same noise, (n, channels, height,
    width) uint8, and the conditions that they were generated for, `labels` (n, ...).
    """

    together = True
    standing = True
    exhibits = (SAMPLES,)
    column = None

    @override
    def __call__(self, task: Task, models: Models, trainer: Trainer) -> list[Measurement]:
        return []

    @override
    def resume(self, task: Task, models: Models, trainer: Trainer, folder: Path) -> list[Measurement]:
        if not has_pictures(task) or not task.loss.generates:
            return []
        made: dict[str, Tensor] = {}
        for name, model in models.items():
            made[name], labels = generate(task, model, trainer, NUM_SHOWN, NUM_SHOWN, f"pictures of {name}")

        def keep() -> None:
            images = {name: pictures(task, x.to(trainer.accelerator.device)) for name, x in made.items()}
            save_tensors(folder / SAMPLES, {**images, "labels": labels})

        on_main_process(keep)
        return []

    @override
    def show(self, folder: RunFolder) -> list[Figures]:
        if not (folder / SAMPLES).exists():
            return []
        images, grids = read_weights(folder / SAMPLES), []
        labels = images.pop("labels")
        chosen = _spread_over(labels, NUM_IN_REPORT)
        below = [str(label) for label in labels[chosen].tolist()] if labels.ndim == 1 else None
        for name in [n for n in results(folder)[0] if n in images]:
            path = folder / "figures" / f"samples_{name.replace(' ', '_')}.png"
            draw_grid(images[name][chosen], path, columns=4, below=below)
            grids.append(Picture(path, name))
        caption = "The same noise and label at the same place in every grid."
        if below:
            caption += " The labels are below the images."
        return [Figures("Samples", caption, grids, command="tinyfusion sample {run} --num 64")]


def _spread_over(labels: Tensor, num: int) -> Tensor:
    """Return the indices of at most `num` samples, of every label in turn; the first ones if labels are no numbers."""
    if labels.ndim != 1:
        return torch.arange(min(num, len(labels)))
    order = labels.argsort(stable=True)
    turn = torch.cat([torch.arange(count) for count in Counter(labels[order].tolist()).values()])
    first = order[turn.argsort(stable=True)][:num]  # the first of every label, then the second
    return first[labels[first].argsort(stable=True)]


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
