"""Generated examples. Each is a function of the seed and its index, whichever process makes it in whatever batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..protocols.task import Task
from ..runtime.distributed import batches, local_share, map_sharded
from ..runtime.progress import track
from ..runtime.seeding import Rng
from ..training.trainer import Trainer


def training_conditions(task: Task, indices: Sequence[int]) -> Tensor:
    """(n, ...) conditions of the training samples with these indices, again from the first after the last."""
    found = task.train.__getitems__([i % len(task.train) for i in indices])
    if task.conditions not in found:
        raise UserError(f"the data have no `{task.conditions}`, for which examples could be generated")
    return found[task.conditions]


def sample_rows(task: Task, model: nn.Module, trainer: Trainer, rows: range, conditions: Tensor) -> Tensor:
    """(n, ...) examples with these indices and (n, ...) conditions, on the trainer's device."""
    device = trainer.accelerator.device
    like = task.backbone.example(1)["x"].to(device)
    rng = Rng(trainer.seed, "generate", first=rows.start)
    with torch.no_grad(), trainer.accelerator.autocast():
        return task.loss.sample(model, like.expand(len(rows), *like.shape[1:]), conditions.to(device), rng)


def generate(
    task: Task, model: nn.Module, trainer: Trainer, num_samples: int, batch_size: int, name: str = "samples"
) -> tuple[Tensor, Tensor]:
    """Generate examples for the conditions of the first training samples; the same noise for every model.

    All processes must call it alike; they share the work.

    Returns:
        (n, ...) examples and (n, ...) conditions, on the CPU of every process.
    """
    conditions = training_conditions(task, range(num_samples))
    parts = batches(num_samples, batch_size)
    total, show = sum(map(len, local_share(parts))), trainer.accelerator.is_main_process
    with track(name, total, show=show) as progress:

        def work(rows: range) -> Tensor:
            x = sample_rows(task, model, trainer, rows, conditions[rows.start : rows.stop]).cpu()
            progress.advance(len(rows))
            return x

        return torch.cat(map_sharded(parts, work)), conditions
