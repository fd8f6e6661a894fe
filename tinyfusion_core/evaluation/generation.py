"""Generation of examples. Each follows from the seed and its index, on any process and in any batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..protocols.task import Task
from ..runtime.seeding import Rng
from ..training.trainer import Trainer


def training_conditions(task: Task, indices: Sequence[int]) -> Tensor:
    """Return the conditions of the training samples with these indices, (n, ...); indices past the last start over.

    Raises:
        UserError: the data have no such column.
    """
    found = task.train.__getitems__([i % len(task.train) for i in indices])
    if task.conditions not in found:
        raise UserError(f"the data have no `{task.conditions}`, for which examples could be generated")
    return found[task.conditions]


def balanced_labels(task: Task, model: nn.Module, indices: Sequence[int]) -> Tensor:
    """Return the labels of the samples with these indices, (n,): every class in turn.

    If the network does not say how many classes it has, the conditions of the training samples, in order, (n, ...).
    """
    num = task.backbone.num_labels(model)
    return training_conditions(task, indices) if num is None else torch.tensor([i % num for i in indices])


def sample_rows(
    task: Task, model: nn.Module, trainer: Trainer, rows: range, conditions: Tensor, stage: str = "generate"
) -> Tensor:
    """Generate the examples with these indices.

    Args:
        task: objective and data.
        model: the network, in eval mode.
        trainer: device, precision and seed.
        rows: their indices.
        conditions: (n, ...) their conditions.
        stage: whose random streams are drawn from.

    Returns:
        (n, ...) examples on the trainer's device.
    """
    device = trainer.accelerator.device
    like = task.backbone.example(1)["x"].to(device)
    rng = Rng(trainer.seed, stage, first=rows.start)
    with torch.no_grad(), trainer.accelerator.autocast():
        return task.loss.sample(model, like.expand(len(rows), *like.shape[1:]), conditions.to(device), rng)
