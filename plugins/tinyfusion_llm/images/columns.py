"""What a processor makes of single samples, as columns of a batch, and back.

Samples have as many images, and images as many patches, as they like: a column holds them padded with zeros, and
another how many there are. What a processor says of each token is a column of the text's length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

IMAGES, TOKENS, COUNT = "images.", "tokens.", "count."
"""What names of columns begin with: of images, of tokens, and of how many there are of the first."""


def columns(samples: Sequence[Mapping[str, Tensor]], num_tokens: int) -> dict[str, Tensor]:
    """Return what a processor made of samples as columns of a batch.

    Args:
        samples: what it made of each: (1, tokens) of its tokens, `input_ids` among them, and (n, ...) of its images,
            of any sizes.
        num_tokens: T; what is said of tokens is padded with zeros to it.

    Returns:
        By name, `tokens.NAME` (batch, T), `images.NAME` (batch, n, ...) and `count.NAME` (batch,), their number.
    """
    of_tokens: dict[str, list[Tensor]] = {}
    of_images: dict[str, list[Tensor | None]] = {}
    for i, sample in enumerate(samples):
        for name, value in sample.items():
            if value.shape == sample["input_ids"].shape:
                empty = [value.new_zeros(num_tokens)] * len(samples)
                of_tokens.setdefault(name, empty)[i] = _padded(value[0, :num_tokens], [num_tokens])
            else:
                of_images.setdefault(name, [None] * len(samples))[i] = value
    found = {f"{TOKENS}{name}": torch.stack(rows) for name, rows in of_tokens.items() if name != "input_ids"}
    for name, values in of_images.items():
        like = next(value for value in values if value is not None)
        full = [like[:0] if value is None else value for value in values]
        largest = [max(sizes) for sizes in zip(*(value.shape for value in full), strict=True)]
        found[f"{IMAGES}{name}"] = torch.stack([_padded(value, largest) for value in full])
        found[f"{COUNT}{name}"] = torch.tensor([len(value) for value in full])
    return found


def model_inputs(batch: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return what a network is given beside the tokens, as its processor makes it of all samples at once.

    Args:
        batch: the columns, among others.
        dtype: dtype of the network, in which it takes numbers with a point.

    Returns:
        By name, (batch, tokens) of tokens and (n, ...) of all images, one after the other.
    """
    given = {}
    for column, value in batch.items():
        if column.startswith(TOKENS):
            given[column.removeprefix(TOKENS)] = value
        elif column.startswith(IMAGES):
            name = column.removeprefix(IMAGES)
            there = torch.arange(value.shape[1], device=value.device) < batch[f"{COUNT}{name}"][:, None]
            if len(images := value[there]):
                given[name] = images.to(dtype) if images.is_floating_point() else images
    return given


def _padded(value: Tensor, sizes: Sequence[int]) -> Tensor:
    missing = [size - have for size, have in zip(sizes, value.shape, strict=True)]
    return F.pad(value, [n for size in reversed(missing) for n in (0, size)])
