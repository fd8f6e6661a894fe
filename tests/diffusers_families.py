"""A small random instance of every transformer of diffusers that `docs/diffusers.md` says is tested."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tinyfusion_core.protocols.loss import LossAdapter
from tinyfusion_diffusers import DiffusersTransformer, RectifiedFlow, ScheduledDiffusion


@dataclass(frozen=True)
class Family:
    config: dict[str, Any]
    loss: LossAdapter
    latent: list[int] | None = None

    def backbone(self, name: str, **changes: Any) -> DiffusersTransformer:
        config = {"_class_name": name, **self.config, **changes}
        # Wan's attention to images counts on 512 tokens of text, which it has by default.
        text_length = None if "image_dim" in changes else 5
        return DiffusersTransformer.random(config, latent=self.latent, text_length=text_length)


HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
V_PREDICTION = ScheduledDiffusion(
    scheduler="CogVideoXDDIMScheduler", settings={"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
)

FAMILIES = {
    "DiTTransformer2DModel": Family(
        {**HEADS, "in_channels": 4, "out_channels": 8, "num_layers": 4, "sample_size": 8, "num_embeds_ada_norm": 10},
        ScheduledDiffusion(label_drop=0.3),
    ),
    "PixArtTransformer2DModel": Family(
        {
            **HEADS, "in_channels": 4, "out_channels": 8, "num_layers": 4, "sample_size": 8, "cross_attention_dim": 16,
            "caption_channels": 12,
        },
        ScheduledDiffusion(),
    ),
    "SD3Transformer2DModel": Family(
        {
            **HEADS, "sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 5, "joint_attention_dim": 12,
            "caption_projection_dim": 16, "pooled_projection_dim": 10, "pos_embed_max_size": 8, "qk_norm": "rms_norm",
            "dual_attention_layers": [0, 1, 2],
        },
        RectifiedFlow(shift=3.0),
    ),
    "FluxTransformer2DModel": Family(
        {
            **HEADS, "patch_size": 1, "in_channels": 16, "num_layers": 3, "num_single_layers": 3,
            "joint_attention_dim": 12, "pooled_projection_dim": 10, "axes_dims_rope": [2, 2, 4],
            "guidance_embeds": True,
        },
        RectifiedFlow(guidance=3.5),
        [4, 4],
    ),
    "AuraFlowTransformer2DModel": Family(
        {
            **HEADS, "sample_size": 8, "in_channels": 4, "num_mmdit_layers": 3, "num_single_dit_layers": 3,
            "joint_attention_dim": 12, "caption_projection_dim": 16, "out_channels": 4, "pos_embed_max_size": 16,
        },
        RectifiedFlow(),
    ),
    "SanaTransformer2DModel": Family(
        {
            **HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 4, "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 8, "cross_attention_dim": 16, "caption_channels": 12, "sample_size": 8,
        },
        RectifiedFlow(),
    ),
    "WanTransformer3DModel": Family(
        {**HEADS, "in_channels": 4, "out_channels": 4, "text_dim": 12, "freq_dim": 16, "ffn_dim": 24, "num_layers": 4},
        RectifiedFlow(time="uniform"),
        [2, 4, 4],
    ),
    "QwenImageTransformer2DModel": Family(
        {
            **HEADS, "in_channels": 16, "out_channels": 4, "num_layers": 4, "joint_attention_dim": 12,
            "axes_dims_rope": [2, 2, 4],
        },
        RectifiedFlow(),
        [4, 4],
    ),
    "LTXVideoTransformer3DModel": Family(
        {
            **HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 4, "cross_attention_dim": 16,
            "caption_channels": 12,
        },
        RectifiedFlow(),
        [2, 4, 4],
    ),
    "CogVideoXTransformer3DModel": Family(
        {
            **HEADS, "in_channels": 4, "out_channels": 4, "time_embed_dim": 12, "text_embed_dim": 12, "num_layers": 4,
            "sample_width": 8, "sample_height": 8, "sample_frames": 5, "max_text_seq_length": 5,
        },
        V_PREDICTION,
    ),
    "Lumina2Transformer2DModel": Family(
        {
            "sample_size": 8, "in_channels": 4, "hidden_size": 24, "num_layers": 4, "num_refiner_layers": 1,
            "num_attention_heads": 3, "num_kv_heads": 1, "multiple_of": 8, "axes_dim_rope": [4, 2, 2],
            "axes_lens": [16, 8, 8], "cap_feat_dim": 12,
        },
        RectifiedFlow(),
    ),
}  # fmt: skip

CONDITIONED: dict[str, tuple[str, dict[str, Any]]] = {
    "Wan 2.2 from images": ("WanTransformer3DModel", {"in_channels": 12}),
    "Wan 2.1 from images": ("WanTransformer3DModel", {"in_channels": 12, "image_dim": 6, "added_kv_proj_dim": 16}),
    "CogVideoX from images": ("CogVideoXTransformer3DModel", {"in_channels": 8}),
    "CogVideoX from images, learned positions": (
        "CogVideoXTransformer3DModel",
        {
            "in_channels": 8, "use_rotary_positional_embeddings": True, "use_learned_positional_embeddings": True,
            "attention_head_dim": 16,
        },
    ),
    "CogVideoX 1.5 from images": (
        "CogVideoXTransformer3DModel",
        {
            "in_channels": 8, "use_rotary_positional_embeddings": True, "attention_head_dim": 16, "patch_size_t": 2,
            "patch_bias": False, "ofs_embed_dim": 12,
        },
    ),
    "Flux Fill": ("FluxTransformer2DModel", {"in_channels": 288, "out_channels": 16}),
    "Flux Control": ("FluxTransformer2DModel", {"in_channels": 32, "out_channels": 16}),
}  # fmt: skip
"""Variants that take channels beside the noisy latents: their class, and what its config has in place of the above."""

HUNYUAN = {
    **HEADS, "in_channels": 4, "patch_size": 2, "hidden_size": 16, "num_layers": 4, "cross_attention_dim": 12,
    "cross_attention_dim_t5": 12, "pooled_projection_dim": 12, "text_len": 4, "text_len_t5": 4, "sample_size": 8,
}  # fmt: skip
