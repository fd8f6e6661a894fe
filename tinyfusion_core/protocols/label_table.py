"""Another label table than the checkpoint's, for labels of one's own."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from ..runtime.seeding import generator


def with_label_table(
    weights: dict[str, Tensor], own: Mapping[str, Tensor], table: str, labels: tuple[str, int], new: bool, path: Path
) -> dict[str, Tensor]:
    """Return weights with a label table of the network's size; those of another architecture as they are.

    A new table is drawn with the deviation of the checkpoint's: on the scale of the labels that the network knew. Rows
    behind those of the labels are kept: that of dropped labels.

    Args:
        weights: tensors of the checkpoint by name, of any shape.
        own: those of the network, of which the shapes count.
        table: name of the label table, (labels and further rows, width).
        labels: the setting that says how many labels the network has, and how many.
        new: whether to begin the table anew.
        path: where the checkpoint is, for messages.

    Raises:
        UserError: the checkpoint has another number of labels, and a new table is not asked for.
    """
    others = ((weights.get(name), value.shape) for name, value in own.items() if name != table)
    if table not in weights or any(found is None or found.shape != shape for found, shape in others):
        return weights
    before, size, (key, num) = weights[table], own[table].shape, labels
    if before.shape[1:] != size[1:] or (before.shape == size and not new):
        return weights
    further = size[0] - num
    if not new:
        raise UserError(
            f"{path}: has {len(before) - further} labels, and backbone.{key} is {num}; set it to that, or set "
            "backbone.new_labels: true to begin a label table of your own"
        )
    made = torch.randn(size, generator=generator("new labels", table)).to(before.dtype) * before.std()
    made[num:] = before[len(before) - further :]
    warnings.warn(
        f"backbone.new_labels: the {num} labels of {path} begin anew; the network knows none of them until it is "
        "trained",
        stacklevel=4,
    )
    return {**weights, table: made}
