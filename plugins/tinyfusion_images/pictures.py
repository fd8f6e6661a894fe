"""Examples as pictures, and the ones that every run shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tinyfusion_core.evaluation.generation import generate, training_conditions
from tinyfusion_core.evaluation.metrics import EXHIBITS, Measurement, Metric, Models
from tinyfusion_core.protocols.task import Task
from tinyfusion_core.runtime.distributed import on_main_process
from tinyfusion_core.runtime.files import save_tensors
from tinyfusion_core.training.trainer import Trainer

NUM_SHOWN = 40


@dataclass(frozen=True)
class Pictures(Metric):
    """Measures nothing, but lets every run show what its networks generate, if its data can be shown.

    `samples.safetensors` in the run folder has (n, C, H, W) uint8 pictures of each network, from the same noise, and
    the (n,) `labels` that they were generated for.
    """

    together = True
    standing = True
    column = None

    def __call__(self, task: Task, models: Models, trainer: Trainer) -> list[Measurement]:
        return []

    def resume(self, task: Task, models: Models, trainer: Trainer, folder: Path) -> list[Measurement]:
        if not has_pictures(task) or not task.loss.generates:
            return []
        made: dict[str, Tensor] = {}
        for name, model in models.items():
            made[name], labels = generate(task, model, trainer, NUM_SHOWN, NUM_SHOWN, f"pictures of {name}")

        def keep() -> None:
            images = {name: pictures(task, x.to(trainer.accelerator.device)) for name, x in made.items()}
            save_tensors(folder / EXHIBITS / "samples.safetensors", {**images, "labels": labels})

        on_main_process(keep)
        return []


def has_pictures(task: Task) -> bool:
    """Whether its examples can be shown."""
    x = task.backbone.example(1).get("x")
    return x is not None and task.pixels(x) is not None


def pictures(task: Task, x: Tensor) -> Tensor:
    """(n, ...) examples as (n, C, H, W) uint8 images on the CPU; black where a network has diverged.

    Latents are decoded on the device that they are on.
    """
    pixels = task.pixels(x)
    assert pixels is not None
    return (255 * pixels.nan_to_num()).round().to(torch.uint8).cpu()


def balanced_labels(task: Task, model: nn.Module, indices: Sequence[int]) -> Tensor:
    """(n,) labels of the samples with these indices: every class in turn.

    Those of the training samples, in their order, where the network does not say how many classes it knows.
    """
    num = task.backbone.num_labels(model)
    return training_conditions(task, indices) if num is None else torch.tensor([i % num for i in indices])
