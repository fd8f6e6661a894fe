"""Tiny networks of diffusers as tasks."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

import tinyfusion_core as tiny
from diffusers_families import FAMILIES
from tinyfusion_core.protocols.blocks.streams import streams_of
from tinyfusion_core.protocols.data import Tensors
from tinyfusion_core.runtime.seeding import Rng, generator
from tinyfusion_diffusers import calling

# As many as the tiny Flux has tokens, whose tables of positions have no batch dimension.
ROWS = 9
PIPELINE_STEPS = 3


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


def dense(task: tiny.Task, mask: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """The published formula by forward hooks, for every stream of a block."""
    hooks = []
    for j, path in enumerate(task.blocks):
        block, streams = task.teacher.get_submodule(path), streams_of(task.backbone.streams, path)

        def hook(module, args, kwargs, output, gate=mask[:, j], streams=streams):
            after = list(output) if isinstance(output, tuple) else [output]
            told = inspect.signature(module.forward).bind(*args, **kwargs).arguments
            for stream in streams:
                x = told[stream.argument]
                i = stream.output or 0
                m = gate.view(-1, *[1] * (x.ndim - 1))
                after[i] = after[i] * m + x * (1 - m)
            return tuple(after) if isinstance(output, tuple) else after[0]

        hooks.append(block.register_forward_hook(hook, with_kwargs=True))
    try:
        return task.loss.predict(task.teacher, inputs)
    finally:
        for h in hooks:
            h.remove()


def relative(a: Tensor, b: Tensor) -> float:
    """Largest difference, beside the largest value; gradients that are zero but for rounding do not count."""
    return float((a - b).abs().max()) / max(1e-4, float(b.abs().max()))


def published(task: tiny.Task) -> Any:
    """DiT as diffusers has it, with a copy of the embedder for every block."""
    plain = diffusers.DiTTransformer2DModel.from_config(task.teacher.config)
    plain.load_state_dict(task.teacher.state_dict())
    return plain.eval()


def taught(task: tiny.Task, batch_size: int) -> tuple[tiny.Task, dict[str, Tensor]]:
    """The task with a teacher that knows its objective, as a run demands, and the batch that it was taught."""
    batch = {name: column.repeat(4, *[1] * (column.ndim - 1)) for name, column in task.train.columns.items()}
    batch["x"] *= 0.45
    task = replace(task, train=Tensors(batch), model=task.teacher)
    tiny.Recover(steps=80, lr=1e-2, ema=0)(task, task.teacher, None, tiny.Trainer(batch_size=batch_size))
    return task, batch


def saved(task: tiny.Task, folder: Path) -> Path:
    """The full network in a folder, as diffusers itself saves it."""
    task.teacher.save_pretrained(folder)
    return folder


def sampled(
    model: Any, batch: dict[str, Tensor], pipeline: str, scheduler: Any, options: dict[str, Any], **more: Any
) -> Tensor:
    """What the published pipeline samples; it has its transformer and scheduler, and of its other parts only these."""
    cls = getattr(diffusers, pipeline)
    parts = {k: p for k, p in inspect.signature(cls.__init__).parameters.items() if k != "self"}
    given = {k: None if p.default is p.empty else p.default for k, p in parts.items()}
    pipe = cls(**{**given, "transformer": model, "scheduler": scheduler, **more})
    pipe.set_progress_bar_config(disable=True)
    mask = batch.get("mask", torch.ones(batch["text"].shape[:2], dtype=torch.bool))
    told = {
        "latents": calling.pack(type(model), batch["x"]),
        "prompt_embeds": batch["text"],
        "prompt_attention_mask": mask,
        "prompt_embeds_mask": mask,
        "pooled_prompt_embeds": batch.get("pooled"),
    }
    takes = inspect.signature(cls.__call__).parameters
    told = {name: value for name, value in told.items() if name in takes}
    if "negative_prompt" in takes and takes["negative_prompt"].default == "":  # without guidance it is never looked at
        told["negative_prompt"] = None
    out = pipe(**{**told, **options}, num_inference_steps=PIPELINE_STEPS, output_type="latent")
    found: Tensor = next(iter(out.__dict__.values()))
    return found if found.shape == batch["x"].shape else calling.unpack(type(model), found, batch["x"])


def check_samples(found: Tensor, x: Tensor, start: Tensor) -> None:
    """Raise AssertionError unless samples agree that came a way from the noise."""
    assert (x - start).abs().max() > 0.1
    assert torch.allclose(found, x, atol=1e-4 * float(x.abs().max()))
