"""Reads and crops folders of images for encoding."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tinyfusion_core.errors import MissingFileError, UserError
from tinyfusion_images.image_sets import SUFFIXES, open_picture


@dataclass(frozen=True)
class ImageFolder:
    """Images in one folder per class, as in ImageNet.

    Attributes:
        root: the folder of the classes.
        classes: names of their folders, sorted; a label is a position in this list.
        files: paths within `root`, sorted by class and then by path; images may lie deeper in a class.
        labels: label of each file.
    """

    root: Path
    classes: list[str]
    files: list[str]
    labels: list[int]


def list_images(root: Path) -> ImageFolder:
    """List the images of a folder.

    Raises:
        UserError: it is missing, or has no images in class folders.
    """
    if not root.is_dir():
        raise MissingFileError(f"{root}: no such folder; expected a folder with one folder of pictures for each class")
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    files: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(
            os.path.relpath(os.path.join(folder, file), root)  # noqa: PTH118  # a million times
            for folder, _, names in os.walk(root / name)
            for file in names
            if file.lower().endswith(SUFFIXES) and not file.startswith(".")
        )
        if not found:
            raise UserError(
                f"{root / name}: no pictures ({', '.join(SUFFIXES)}) in this class; fill or remove the folder"
            )
        files += found
        labels += [label] * len(found)
    if not classes:
        raise UserError(
            f"{root}: no folders in it; expected one folder of pictures for each class, sorted as the labels"
        )
    return ImageFolder(root, classes, files, labels)


@dataclass(frozen=True)
class Crops:
    """Cropped images of a folder, for a data loader.

    Args:
        folder: the images.
        size: side of the crops in pixels.
    """

    folder: ImageFolder
    size: int

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, list[tuple[int, str]]]:
        """Return crops, (n, 3, size, size) uint8, and index and reason of every image that cannot be read.

        Errors are returned rather than raised: a loader's worker would bury the message in a traceback.
        """
        crops, bad = [], []
        for index in indices:
            path = self.folder.root / self.folder.files[index]
            try:
                crop = centre_crop(open_picture(path), self.size)
            except UserError as e:
                bad.append((index, str(e)))
            else:
                crops.append(torch.from_numpy(np.array(crop)))
        shape = (0, self.size, self.size, 3)
        stacked = torch.stack(crops) if crops else torch.empty(shape, dtype=torch.uint8)
        return stacked.permute(0, 3, 1, 2), bad


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """Crop the central square, as ADM (arXiv:2105.05233) prepares its training images.

    The image is halved by averaging while its shorter side stays at least `size`, then scaled by bicubic
    interpolation until the shorter side is `size`, then cropped.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    factor = size / min(image.size)
    image = image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
