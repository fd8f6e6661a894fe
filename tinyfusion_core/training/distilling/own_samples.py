"""Distillation on policy: a student learns from what it makes itself (GKD, arXiv:2306.13649)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from ...protocols.backbone import Batch
from ...protocols.task import Task
from ...protocols.undisturbed import evaluating
from ...runtime.seeding import Rng
from ..distillation import OutputKD
from ..trainer import Trainer

Prepare = Callable[[Batch, Rng], dict[str, Tensor]]
"""Turns a batch into inputs, both (batch, ...), and draws all of its randomness."""


def on_policy(kd: OutputKD | None, task: Task, student: nn.Module, trainer: Trainer, prepare: Prepare) -> Prepare:
    """Return what prepares batches, (batch, ...), in some steps with samples of the student's in place of the data's.

    They are made by the weights of the step, in eval mode, without a graph, and from streams of their own.

    Args:
        kd: says in which steps; None: in none.
        task: the objective.
        student: the network in training, whole and on the device.
        trainer: its precision.
        prepare: prepares samples, whoever has made them.
    """
    if kd is None or not kd.on_policy:
        return prepare

    def made(batch: Batch, rng: Rng) -> dict[str, Tensor]:
        if kd.samples_itself(rng):
            # Otherwise a sample would be given the very noise that it was made of.
            making = replace(rng, stage=f"{rng.stage}, own samples")
            with evaluating(student), torch.no_grad(), trainer.accelerator.autocast():
                batch = task.loss.own_samples(student, batch, task.conditions, making)
        return prepare(batch, rng)

    return made
