"""Networks of the sweep are fed as their published pipelines feed them: both sample the same latents."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

import diffusers
import pytest
import torch

from diffusers_families import FAMILIES
from diffusers_sweep import LOSSES, config, objective, options
from diffusers_tasks import check_samples, sampled
from marks import slow_but
from places import ROOT
from tinyfusion_core.runtime.seeding import generator
from tinyfusion_diffusers import DiffusersTransformer

pytestmark = [pytest.mark.numerics, pytest.mark.filterwarnings("ignore")]  # of other libraries

ROWS = 2
IMAGE = {"guidance_scale": 1.0, "height": 32, "width": 32}
VIDEO = {**IMAGE, "num_frames": 5}
PIPELINES: dict[str, tuple[str, dict[str, Any]]] = {
    "Flux2Transformer2DModel": ("Flux2Pipeline", {**IMAGE, "guidance_scale": 3.5, "height": 64, "width": 64}),
    "HunyuanVideoTransformer3DModel": ("HunyuanVideoPipeline", {**VIDEO, "guidance_scale": 3.5}),
    "Krea2Transformer2DModel": ("Krea2Pipeline", {**IMAGE, "guidance_scale": 0.0}),
    "LuminaNextDiT2DModel": ("LuminaPipeline", {**IMAGE, "height": 64, "width": 64}),
    "MochiTransformer3DModel": ("MochiPipeline", {**VIDEO, "num_frames": 7}),
    "NucleusMoEImageTransformer2DModel": ("NucleusMoEImagePipeline", IMAGE),
    "OvisImageTransformer2DModel": ("OvisImagePipeline", IMAGE),
    "PRXTransformer2DModel": ("PRXPipeline", {**IMAGE, "use_resolution_binning": False}),
    "SanaVideoTransformer3DModel": ("SanaVideoPipeline", {**IMAGE, "frames": 5, "use_resolution_binning": False}),
    "ZImageTransformer2DModel": ("ZImagePipeline", {**IMAGE, "guidance_scale": 0.0}),
}
REVERSED = {"MochiTransformer3DModel"}
"""Those whose schedulers count from noise to data."""


@pytest.mark.parametrize("name", slow_but(PIPELINES, "Flux2Transformer2DModel", "MochiTransformer3DModel"))
def test_flows(name: str) -> None:
    backbone = DiffusersTransformer.random(config(name), **options(name))
    batch = backbone.example(ROWS)
    for key, value in batch.items():
        if value.is_floating_point():
            value.normal_(generator=generator("pipelines", key))
    model, x, (pipeline, told) = backbone.build(), batch["x"], PIPELINES[name]
    if name.startswith("Flux2"):
        told = {**told, "latents": x}  # it packs them itself
    if name.startswith("ZImage"):
        texts = zip(batch["text"], batch["mask"], strict=True)
        told = {**told, "latents": x, "prompt_embeds": [text[real] for text, real in texts]}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=name in REVERSED)
    found = sampled(model, batch, pipeline, scheduler, told)
    known = objective(name)
    loss = LOSSES[known["class_path"]](**known["init_args"])
    levels = 1 - scheduler.sigmas if name in REVERSED else scheduler.sigmas
    with torch.no_grad():
        for now, later in pairwise(levels):
            t = torch.full((ROWS,), float(now))
            velocity = loss.predict(model, {**batch, "x_t": x, "t": t})[:, : x.shape[1]]
            x = x + (later - now) * velocity
    check_samples(found, x, batch["x"])


def test_the_guide_names_what_is_compared_with_pipelines() -> None:
    text = (ROOT / "docs" / "diffusers.md").read_text().split("## Families")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)`", text, re.MULTILINE)) == FAMILIES.keys() | PIPELINES.keys()
