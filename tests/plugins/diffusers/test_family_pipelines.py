"""Networks of the sweep are fed as their published pipelines feed them: both sample the same latents."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

import tinyfusion_core as tiny
from diffusers_families import FAMILIES
from diffusers_sweep import LOSSES, PAGE, config, objective, options, recipe_of
from diffusers_tasks import check_samples, sampled
from marks import slow_but
from tinyfusion_core.pipeline.planning.plan import make_plan
from tinyfusion_core.protocols.checkpoint_backbone import randomise
from tinyfusion_core.runtime.seeding import generator
from tinyfusion_diffusers import DiffusersTransformer
from tinyfusion_diffusers.calls.compared import COMPARED

pytestmark = [pytest.mark.numerics, pytest.mark.filterwarnings("ignore")]  # of other libraries


@dataclass(frozen=True)
class Beside:
    """A published pipeline, and how it is made to sample what the objective does.

    Attributes:
        pipeline: its class.
        told: options of its call.
        asked: further ones that the batch decides.
        parts: what it has beside the transformer and the scheduler.
        config: what the transformer's config has in place of the sweep's.
        loss: options of the objective besides.
        scheduler: options of its scheduler.
        made: columns that the pipeline makes itself, of how it calls the network.
        rows: how many samples it makes at once.
        latent: the size of the latents, where it is not the sweep's.
    """

    pipeline: str
    told: Mapping[str, Any]
    asked: Callable[[dict[str, Tensor]], Mapping[str, Any]] = lambda batch: {}
    parts: Callable[[], Mapping[str, Any]] = dict
    config: Mapping[str, Any] = field(default_factory=dict)
    loss: Mapping[str, Any] = field(default_factory=dict)
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    made: Mapping[str, Callable[[Mapping[str, Any]], Tensor]] = field(default_factory=dict)
    rows: int = 2
    latent: list[int] | None = None


def images(**sizes: Any) -> dict[str, Any]:
    """An autoencoder of images, 8 times smaller, or 16."""
    depth = sizes.pop("depth", 4)
    return {
        "vae": diffusers.AutoencoderKL(
            block_out_channels=(8,) * depth, norm_num_groups=2, latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * depth, up_block_types=("UpDecoderBlock2D",) * depth, **sizes,
        )
    }  # fmt: skip


def videos() -> dict[str, Any]:
    sizes = {"base_dim": 4, "z_dim": 4, "dim_mult": [1] * 4, "num_res_blocks": 1}
    vae: Any = diffusers.AutoencoderKLWan(
        **sizes, temperal_downsample=[False, True, True], latents_mean=[0.1] * 4, latents_std=[2.0] * 4
    )
    randomise(vae, generator(0, "videos"))
    return {"vae": vae.eval()}


def seen_by_clip() -> dict[str, Any]:
    sizes = {"hidden_size": 6, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2}
    encoder = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=224, patch_size=14)).eval()
    return {"image_encoder": encoder, "image_processor": CLIPImageProcessor()}


def unguided(**parts: Any) -> dict[str, Any]:
    return {"guider": diffusers.ClassifierFreeGuidance(enabled=False), **parts}


def texts(batch: dict[str, Tensor]) -> dict[str, Any]:
    return {
        "prompt_embeds_2": batch["text_2"],
        "prompt_embeds_mask": batch["mask"],
        "prompt_embeds_mask_2": batch["mask_2"],
    }


def behind_the_latents(call: Mapping[str, Any]) -> Tensor:
    found: Tensor = call["hidden_states"][:, 4:]
    return found


IMAGE = {"guidance_scale": 1.0, "height": 32, "width": 32}
LARGER = {**IMAGE, "height": 64, "width": 64}
VIDEO = {**IMAGE, "num_frames": 5}
PIPELINES: dict[str, Beside] = {
    "AllegroTransformer3DModel": Beside("AllegroPipeline", {**VIDEO, "num_frames": 8}),
    "BriaFibo2Transformer2DModel": Beside("BriaFibo2Pipeline", IMAGE),
    "BriaTransformer2DModel": Beside("BriaPipeline", IMAGE, parts=images),
    "ChronoEditTransformer3DModel": Beside(
        "ChronoEditPipeline",
        {**VIDEO, "image": torch.linspace(0, 1, 3 * 32 * 32).view(1, 3, 32, 32)},
        parts=lambda: {**videos(), **seen_by_clip()},
        config={"in_channels": 12, "out_channels": 4, "image_dim": 6, "added_kv_proj_dim": 16},
        made={"condition": behind_the_latents, "image": lambda call: call["encoder_hidden_states_image"]},
        rows=1,
    ),
    "CogView3PlusTransformer2DModel": Beside("CogView3PlusPipeline", LARGER),
    # The pipeline shifts by sqrt(tokens / 256) * 0.75 + 0.25, and there are 16 tokens.
    "CogView4Transformer2DModel": Beside(
        "CogView4Pipeline",
        LARGER,
        loss={"shift": 0.25 * 0.75 + 0.25},
        scheduler={
            "use_dynamic_shifting": True, "time_shift_type": "linear", "base_shift": 0.25, "max_shift": 0.75,
            "base_image_seq_len": 256,
        },
    ),
    "EasyAnimateTransformer3DModel": Beside(
        "EasyAnimatePipeline",
        VIDEO,
        parts=lambda: {
            "vae": diffusers.AutoencoderKLMagvit(latent_channels=4, block_out_channels=(8,) * 4, norm_num_groups=2)
        },
    ),
    "Flux2Transformer2DModel": Beside(
        "Flux2Pipeline", {**LARGER, "guidance_scale": 3.5}, asked=lambda batch: {"latents": batch["x"]}  # it packs them
    ),
    "HunyuanImageTransformer2DModel": Beside(
        "HunyuanImagePipeline", {"height": 128, "width": 128}, asked=texts, config={"text_embed_2_dim": 10}
    ),
    "HunyuanVideo15Transformer3DModel": Beside(
        "HunyuanVideo15Pipeline",
        {"height": 64, "width": 64, "num_frames": 5},
        asked=texts,
        parts=lambda: unguided(
            vae=diffusers.AutoencoderKLHunyuanVideo15(
                latent_channels=4, block_out_channels=(8,) * 5, layers_per_block=1
            )
        ),
        config={"in_channels": 9},
        made={"condition": behind_the_latents},
    ),
    "HunyuanVideoTransformer3DModel": Beside("HunyuanVideoPipeline", {**VIDEO, "guidance_scale": 3.5}),
    "JoyImageEditTransformer3DModel": Beside(
        "JoyImageEditPipeline",
        IMAGE,
        asked=lambda batch: {
            "latents": batch["x"].unsqueeze(1).clone(), "prompt_embeds_mask": torch.ones(batch["text"].shape[:2]),
        },
        parts=videos,
        latent=[1, 4, 4],
    ),
    "Kandinsky5Transformer3DModel": Beside(
        "Kandinsky5T2VPipeline",
        VIDEO,
        asked=lambda batch: {
            "prompt_embeds_qwen": batch["text"], "prompt_embeds_clip": batch["pooled"],
            "prompt_cu_seqlens": torch.tensor([0, 5, 10]),
            "latents": torch.cat([batch["x"], torch.zeros_like(batch["condition"])], 1).movedim(1, -1).clone(),
        },
        config={"visual_cond": True},
        made={"condition": lambda call: call["hidden_states"][..., 4:].movedim(-1, 1)},
    ),
    "Krea2Transformer2DModel": Beside("Krea2Pipeline", {**IMAGE, "guidance_scale": 0.0}),
    "LongCatImageTransformer2DModel": Beside(
        "LongCatImagePipeline", {**IMAGE, "enable_prompt_rewrite": False, "prompt": ["", ""], "prompt_embeds": None}
    ),
    "LuminaNextDiT2DModel": Beside("LuminaPipeline", LARGER),
    "MochiTransformer3DModel": Beside("MochiPipeline", {**VIDEO, "num_frames": 7}),
    "MotifVideoTransformer3DModel": Beside(
        "MotifVideoPipeline",
        {"height": 32, "width": 32, "num_frames": 5},
        parts=lambda: unguided(**videos()),
        config={"in_channels": 9},
        made={"condition": behind_the_latents},
    ),
    "NucleusMoEImageTransformer2DModel": Beside("NucleusMoEImagePipeline", IMAGE),
    "OvisImageTransformer2DModel": Beside("OvisImagePipeline", IMAGE),
    "PRXTransformer2DModel": Beside("PRXPipeline", {**IMAGE, "use_resolution_binning": False}),
    "SanaVideoTransformer3DModel": Beside("SanaVideoPipeline", {**IMAGE, "frames": 5, "use_resolution_binning": False}),
    "SkyReelsV2Transformer3DModel": Beside("SkyReelsV2Pipeline", VIDEO),
    "WanVACETransformer3DModel": Beside(
        "WanVACEPipeline",
        VIDEO,
        parts=videos,
        config={"vace_in_channels": 72},
        made={"control": lambda call: call["control_hidden_states"]},
        rows=1,
    ),
    "ZImageTransformer2DModel": Beside(
        "ZImagePipeline",
        {**IMAGE, "guidance_scale": 0.0},
        asked=lambda batch: {
            "latents": batch["x"],
            "prompt_embeds": [text[real] for text, real in zip(batch["text"], batch["mask"], strict=True)],
        },
    ),
}  # fmt: skip
REVERSED = {"MochiTransformer3DModel"}
"""Those whose schedulers count from noise to data."""


def made_from(name: str, beside: Beside) -> tuple[Any, dict[str, Tensor]]:
    """A random network, and noise with prompts."""
    told = {**options(name), **({"text_length": None} if "image_dim" in beside.config else {})}
    told |= {"latent": beside.latent} if beside.latent else {}
    backbone = DiffusersTransformer.random({**config(name), **beside.config}, **told)
    batch = backbone.example(beside.rows)
    for key, value in batch.items():
        if value.is_floating_point():
            value.normal_(generator=generator("pipelines", key))
    return backbone.build(), batch


@pytest.mark.parametrize("name", slow_but(PIPELINES, "Flux2Transformer2DModel", "CogView4Transformer2DModel"))
def test_the_objective_samples_what_the_pipeline_samples(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    beside = PIPELINES[name]
    model, batch = made_from(name, beside)
    known = objective(name)
    loss: Any = LOSSES[known["class_path"]](**known["init_args"], **beside.loss)
    if flow := known["class_path"] == "RectifiedFlow":
        more = {"invert_sigmas": True} if name in REVERSED else beside.scheduler
        scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler(**more)
    else:
        scheduler = getattr(diffusers, loss.scheduler)(**loss.settings)
        scheduler = diffusers.DDIMScheduler.from_config(scheduler.config) if "DDPM" in loss.scheduler else scheduler
    # It takes embeddings of prompts, and counts prompts where there are none.
    monkeypatch.setattr(diffusers.LongCatImagePipeline, "_encode_prompt", lambda _self, prompt: batch["text"])
    calls: list[Mapping[str, Any]] = []
    handle = model.register_forward_pre_hook(lambda _model, _args, call: calls.append(call), with_kwargs=True)
    found = sampled(model, batch, beside.pipeline, scheduler, {**beside.told, **beside.asked(batch)}, **beside.parts())
    handle.remove()
    for column, seen in beside.made.items():
        assert seen(calls[0]).shape == batch[column].shape
        batch[column] = seen(calls[0])
    x = batch["x"]
    with torch.no_grad():
        if flow:
            levels = 1 - scheduler.sigmas if name in REVERSED else scheduler.sigmas
            for now, later in pairwise(levels):
                t = torch.full((len(x),), float(now))
                x = x + (later - now) * loss.predict(model, {**batch, "x_t": x, "t": t})[:, : x.shape[1]]
        else:
            for t in scheduler.timesteps:
                out = loss.predict(model, {**batch, "x_t": x, "t": t.expand(len(x))})
                x = scheduler.step(out[:, : x.shape[1]], t, x, return_dict=False)[0]
    check_samples(found.reshape(x.shape), x, batch["x"])  # of an image some give no frames


def test_plans_say_what_is_not_compared(tmp_path: Path) -> None:
    for name in ("BriaTransformer2DModel", "DreamLiteTransformer2DModel"):
        (tmp_path / name).mkdir()
        rows = dict(make_plan(tiny.load_recipe(str(recipe_of(name, tmp_path / name)))).rows)
        assert ("objective" in rows) == (name not in COMPARED)
    assert rows["objective"].startswith(
        "ScheduledDiffusion: no test compares what it feeds DreamLiteTransformer2DModel"
    )


def test_the_page_says_which_are_compared() -> None:
    assert FAMILIES.keys() | PIPELINES.keys() == COMPARED
    rows = re.findall(r"^\| `(\w+)` \|.*\| same \|$", PAGE.read_text(), re.MULTILINE)
    assert set(rows) == COMPARED
