"""Whole pipelines of diffusers in folders: tiny, and random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

import diffusers_prompts
from diffusers_families import FAMILIES

PROMPTS = ["a cat", "two dogs in a garden", "the sea", "a long walk"]


def autoencoder() -> Any:
    """Twice as high and wide as its latents, which have 4 channels."""
    return diffusers.AutoencoderKL(
        latent_channels=4, block_out_channels=[8, 8], norm_num_groups=4, scaling_factor=0.5, shift_factor=0.1,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
    )  # fmt: skip


def video_autoencoder() -> Any:
    return diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.1] * 4, latents_std=[1.5] * 4,
    )  # fmt: skip


FLOW, PARTS = diffusers.FlowMatchEulerDiscreteScheduler, {"PixArtSigmaPipeline": diffusers.DPMSolverMultistepScheduler}
SMALL: dict[str, dict[str, Any]] = {
    "FluxPipeline": {"num_inference_steps": 2, "height": 16, "width": 16, "max_sequence_length": 16},
    "StableDiffusion3Pipeline": {"num_inference_steps": 2, "height": 16, "width": 16, "max_sequence_length": 16},
    "PixArtSigmaPipeline": {
        "num_inference_steps": 2, "height": 16, "width": 16, "use_resolution_binning": False, "max_sequence_length": 16,
    },
    "WanPipeline": {
        "num_inference_steps": 2, "height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 16,
    },
    "DiTPipeline": {"num_inference_steps": 2, "guidance_scale": 1.0},
}  # fmt: skip
"""Pipelines, and options with which they take little time."""
NETWORKS = {name: told[0] for name, told in diffusers_prompts.ENCODERS.items()} | {
    "DiTPipeline": "DiTTransformer2DModel"
}


def whole(name: str, folder: Path) -> Path:
    """A pipeline with all of its parts, in a folder."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name == "DiTPipeline":
            network = FAMILIES[NETWORKS[name]].backbone(NETWORKS[name]).build()
            plain = diffusers.DiTTransformer2DModel.from_config(network.config)
            plain.load_state_dict(network.state_dict())
            pipeline = diffusers.DiTPipeline(plain, autoencoder(), diffusers.DDIMScheduler())
        else:
            pipeline = diffusers_prompts.pipeline(name)
            vae = video_autoencoder() if name == "WanPipeline" else autoencoder()
            pipeline.register_modules(vae=vae, scheduler=PARTS.get(name, FLOW)())
        pipeline.save_pretrained(folder)
    return folder


def clip_model(folder: Path) -> Path:
    """A CLIP model with its processor, in a folder; it knows the letters of `PROMPTS`."""
    tokenizer, text = diffusers_prompts.clip(16)
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8,
        "patch_size": 4,
    }  # fmt: skip
    config = transformers.CLIPConfig(text_config=text.config.to_dict(), vision_config=vision, projection_dim=8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.CLIPModel(config)
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(p.numel()))
    model.save_pretrained(folder)
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    transformers.CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder
