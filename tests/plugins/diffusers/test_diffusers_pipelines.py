"""What the objectives feed to a transformer is what its published pipeline feeds: both sample the same latents.

The packing of tokens, their positions, how time is counted, masks, guidance and the sign of the prediction all show.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from diffusers_families import FAMILIES
from diffusers_tasks import PIPELINE_STEPS, check_samples, sampled
from tinyfusion_core.protocols.loss import LossAdapter
from tinyfusion_core.runtime.seeding import Rng, generator
from tinyfusion_diffusers import RectifiedFlow

pytestmark = [pytest.mark.numerics, pytest.mark.filterwarnings("ignore")]  # of other libraries

ROWS = 2
SQUARE = {"guidance_scale": 1.0, "height": 64, "width": 64}
FLOWS: dict[str, tuple[str, dict[str, Any]]] = {
    "FluxTransformer2DModel": ("FluxPipeline", {"guidance_scale": 3.5, "height": 32, "width": 32}),
    "SD3Transformer2DModel": ("StableDiffusion3Pipeline", SQUARE),
    "AuraFlowTransformer2DModel": ("AuraFlowPipeline", SQUARE),
    "SanaTransformer2DModel": ("SanaPipeline", {**SQUARE, "use_resolution_binning": False}),
    "WanTransformer3DModel": ("WanPipeline", {"guidance_scale": 1.0, "height": 32, "width": 32, "num_frames": 5}),
    "QwenImageTransformer2DModel": ("QwenImagePipeline", {"true_cfg_scale": 1.0, "height": 32, "width": 32}),
    "LTXVideoTransformer3DModel": (
        "LTXPipeline",
        {"guidance_scale": 1.0, "height": 128, "width": 128, "num_frames": 9},
    ),
    "Lumina2Transformer2DModel": ("Lumina2Pipeline", SQUARE),
}
VIDEO = {"guidance_scale": 1.0, "height": 64, "width": 64, "num_frames": 5}
SCHEDULED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "PixArtTransformer2DModel": ("PixArtAlphaPipeline", {}, {**SQUARE, "use_resolution_binning": False}),
    "PixArtTransformer2DModel with sizes": (
        "PixArtAlphaPipeline",
        {"sample_size": 128, "num_attention_heads": 3, "cross_attention_dim": 24},
        {**SQUARE, "use_resolution_binning": False},
    ),
    "CogVideoXTransformer3DModel": ("CogVideoXPipeline", {}, VIDEO),
    "CogVideoXTransformer3DModel with rotary positions": (
        "CogVideoXPipeline",
        {"use_rotary_positional_embeddings": True, "attention_head_dim": 16},
        VIDEO,
    ),
    "CogVideoXTransformer3DModel 1.5": (
        "CogVideoXPipeline",
        {
            "use_rotary_positional_embeddings": True,
            "attention_head_dim": 16,
            "patch_size_t": 2,
            "patch_bias": False,
        },
        VIDEO,
    ),
}


def network(name: str, changes: dict[str, Any]) -> tuple[Any, LossAdapter, dict[str, Tensor]]:
    """A random network, its objective, and noise with two prompts."""
    backbone = FAMILIES[name].backbone(name, **changes)
    batch = replace(backbone, latent=[8, 8] if "sample_size" in changes else backbone.latent).example(ROWS)
    for key, value in batch.items():
        if value.is_floating_point():
            value.normal_(generator=generator("pipelines", key))
    return backbone.build(), FAMILIES[name].loss, batch


@pytest.mark.parametrize("name", FLOWS)
def test_flows(name: str) -> None:
    model, loss, batch = network(name, {})
    pipeline, options = FLOWS[name]
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    found = sampled(model, batch, pipeline, scheduler, options)
    x = batch["x"]
    with torch.no_grad():
        for now, later in zip(scheduler.sigmas[:-1], scheduler.sigmas[1:], strict=True):
            t = torch.full((ROWS,), float(now))
            x = x + (later - now) * loss.predict(model, {**batch, "x_t": x, "t": t})
    check_samples(found, x, batch["x"])


@pytest.mark.parametrize("name", SCHEDULED)
def test_scheduled_processes(name: str) -> None:
    pipeline, changes, options = SCHEDULED[name]
    model, loss, batch = network(name.split()[0], changes)
    scheduler = getattr(diffusers, loss.scheduler)(**loss.settings)
    scheduler = diffusers.DDIMScheduler.from_config(scheduler.config) if "DDPM" in loss.scheduler else scheduler
    found = sampled(model, batch, pipeline, scheduler, options)
    x = batch["x"]
    with torch.no_grad():
        for t in scheduler.timesteps:
            out = loss.predict(model, {**batch, "x_t": x, "t": t.expand(ROWS)})
            x = scheduler.step(out[:, : x.shape[1]], t, x, return_dict=False)[0]
    check_samples(found, x, batch["x"])


class Given(Rng):
    """Draws what it is given."""

    def normal(self, purpose: str, like: Tensor) -> Tensor:
        assert purpose == "noise"
        return like


def generated(model: Any, loss: Any, batch: dict[str, Tensor]) -> Tensor:
    """What `tinyfusion generate-data` makes, from the noise that the batch has in the place of latents."""
    with torch.no_grad():
        made = replace(loss, sampling_steps=PIPELINE_STEPS).generated(model, batch, "y", Given(0, "test"))
    assert made.keys() == batch.keys()
    assert all(torch.equal(t, batch[name]) for name, t in made.items() if name != "x")
    return made["x"]


@pytest.mark.parametrize("name", FLOWS)
def test_flows_make_data(name: str) -> None:
    model, loss, batch = network(name, {})
    pipeline, options = FLOWS[name]
    loss = replace(loss, shift=1.0)
    made = generated(model, loss, batch)
    times = [1 - i / PIPELINE_STEPS for i in range(PIPELINE_STEPS)]
    if "sigmas" in inspect.signature(getattr(diffusers, pipeline).__call__).parameters:
        given = {**options, "sigmas": times}
        check_samples(
            sampled(model, batch, pipeline, diffusers.FlowMatchEulerDiscreteScheduler(), given), made, batch["x"]
        )
    x = batch["x"]
    with torch.no_grad():
        for t in times:
            x = x - loss.predict(model, {**batch, "x_t": x, "t": torch.full((ROWS,), t)}) / PIPELINE_STEPS
    check_samples(x, made, batch["x"])


@pytest.mark.parametrize("name", SCHEDULED)
def test_scheduled_processes_make_data(name: str) -> None:
    pipeline, changes, options = SCHEDULED[name]
    model, loss, batch = network(name.split()[0], changes)
    scheduler = getattr(diffusers, loss.scheduler)(**loss.settings)
    scheduler = diffusers.DDIMScheduler.from_config(scheduler.config) if "DDPM" in loss.scheduler else scheduler
    found = sampled(model, batch, pipeline, scheduler, options)
    check_samples(found, generated(model, loss, batch), batch["x"])


def test_a_shift_moves_the_steps() -> None:
    loss = RectifiedFlow(shift=3.0, sampling_steps=4)
    asked = []

    def run(x: Tensor, t: Tensor) -> Tensor:
        asked.append(float(t[0]))
        return torch.ones_like(x)

    made = loss._denoised(torch.zeros(2, 1), run)
    assert asked == pytest.approx([1, 0.9, 0.75, 0.5])
    torch.testing.assert_close(made, -torch.ones(2, 1))
