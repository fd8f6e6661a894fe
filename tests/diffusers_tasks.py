"""Tiny networks of diffusers as tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
from torch import Tensor

import tinyfusion_core as tiny
from diffusers_families import FAMILIES
from tinyfusion_core.protocols.data import Tensors
from tinyfusion_core.runtime.seeding import Rng, generator

# As many as the tiny Flux has tokens, whose tables of positions have no batch dimension.
ROWS = 9


def make(name: str, **changes: Any) -> tuple[tiny.Task, dict[str, Tensor]]:
    """A task on a random network, and prepared inputs."""
    backbone, loss = FAMILIES[name].backbone(name, **changes), FAMILIES[name].loss
    batch = backbone.example(ROWS)
    for key, value in batch.items():
        if value.is_floating_point():
            value.normal_(generator=generator("diffusers", key))
    data = Tensors(batch)
    task = tiny.Task(backbone=backbone, loss=loss, train=data, held_out=data)
    return task, loss.prepare(batch, Rng(0, "test"))


def published(task: tiny.Task) -> Any:
    """DiT as diffusers has it, with a copy of the embedder for every block."""
    plain = diffusers.DiTTransformer2DModel.from_config(task.teacher.config)
    plain.load_state_dict(task.teacher.state_dict())
    return plain.eval()


def saved(task: tiny.Task, folder: Path) -> Path:
    """The full network in a folder, as diffusers itself saves it."""
    task.teacher.save_pretrained(folder)
    return folder
