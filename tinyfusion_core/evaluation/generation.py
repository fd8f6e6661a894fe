"""Generation of examples. Each follows from the seed and its index, on any process and in any batch."""

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


def balanced_labels(task: Task, model: nn.Module, indices: Sequence[int]) -> Tensor:
    """Return the labels of the samples with these indices, (n,): every class in turn.

    If the network does not say how many classes it has, the labels of the training samples, in order.
    """
    num = task.backbone.num_labels(model)
    return training_labels(task, indices) if num is None else torch.tensor([i % num for i in indices])


def training_labels(task: Task, indices: Sequence[int]) -> Tensor:
    """Return the labels of the training samples with these indices, (n,); indices past the last start over.

    Raises:
        UserError: the data have no labels `y`.
    """
    found = task.train.__getitems__([i % len(task.train) for i in indices])
    if "y" not in found:
        raise UserError("the data have no labels `y`, for which examples could be generated")
    return found["y"]


def sample_rows(task: Task, model: nn.Module, trainer: Trainer, rows: range, labels: Tensor) -> Tensor:
    """Generate the examples with these indices.

    Args:
        task: objective and data.
        model: the network, in eval mode.
        trainer: device, precision and seed.
        rows: their indices.
        labels: (n,) their labels.

    Returns:
        (n, ...) examples on the trainer's device.
    """
    device = trainer.accelerator.device
    like = task.backbone.example(1)["x"].to(device)
    rng = Rng(trainer.seed, "generate", first=rows.start)
    with torch.no_grad(), trainer.accelerator.autocast():
        return task.loss.sample(model, like.expand(len(rows), *like.shape[1:]), labels.to(device), rng)


def generate(
    task: Task, model: nn.Module, trainer: Trainer, num_samples: int, batch_size: int, name: str = "samples"
) -> tuple[Tensor, Tensor]:
    """Generate examples for the labels of the first training samples, with the same noise for every model.

    A collective call; the processes share the work.

    Args:
        task: objective and data.
        model: the network, in eval mode.
        trainer: device, precision and seed.
        num_samples: how many examples, n.
        batch_size: examples per batch.
        name: label of the progress bar.

    Returns:
        Examples (n, ...) and labels (n,), on the CPU of every process.

    Raises:
        UserError: the data have no labels, or the objective cannot generate.
    """
    labels = training_labels(task, range(num_samples))
    parts = batches(num_samples, batch_size)
    total, show = sum(map(len, local_share(parts))), trainer.accelerator.is_main_process
    with track(name, total, show=show) as progress:

        def work(rows: range) -> Tensor:
            x = sample_rows(task, model, trainer, rows, labels[rows.start : rows.stop]).cpu()
            progress.advance(len(rows))
            return x

        return torch.cat(map_sharded(parts, work)), labels


def has_pictures(task: Task) -> bool:
    """Return whether the task's examples can be shown as images."""
    x = task.backbone.example(1).get("x")
    return x is not None and task.pixels(x) is not None


def pictures(task: Task, x: Tensor) -> Tensor:
    """Convert examples to images.

    Args:
        task: knows how to decode them.
        x: (n, ...) examples.

    Returns:
        (n, channels, height, width) uint8 on the CPU; black where a network has diverged.
    """
    pixels = task.pixels(x)
    assert pixels is not None
    return (255 * pixels.nan_to_num()).round().to(torch.uint8).cpu()
