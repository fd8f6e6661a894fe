"""Converts a DiT to that of diffusers, which keeps a copy of the label and time embedders in every block."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tinyfusion_core.errors import UserError, need
from tinyfusion_dit.model import position_table

_KEYS = (
    (r"x_embedder\.(.*)", r"pos_embed.\1"),
    (r"blocks\.(\d+)\.adaLN_modulation\.1\.(.*)", r"transformer_blocks.\1.norm1.linear.\2"),
    (r"blocks\.(\d+)\.attn\.proj\.(.*)", r"transformer_blocks.\1.attn1.to_out.0.\2"),
    (r"blocks\.(\d+)\.mlp\.fc1\.(.*)", r"transformer_blocks.\1.ff.net.0.proj.\2"),
    (r"blocks\.(\d+)\.mlp\.fc2\.(.*)", r"transformer_blocks.\1.ff.net.2.\2"),
    (r"final_layer\.adaLN_modulation\.1\.(.*)", r"proj_out_1.\1"),
    (r"final_layer\.linear\.(.*)", r"proj_out_2.\1"),
)
_EMBEDDERS = {
    "t_embedder.mlp.0": "timestep_embedder.linear_1",
    "t_embedder.mlp.2": "timestep_embedder.linear_2",
    "y_embedder": "class_embedder",
}
_ACTIVATIONS = {"gelu_tanh": "gelu-approximate", "silu": "linear-silu"}


def to_diffusers(model: nn.Module, settings: Mapping[str, Any]) -> Any:
    """Return the same network as a `DiTTransformer2DModel`.

    The frequencies of the time embedding differ: diffusers spaces them by 1/127 where DiT has 1/128, also for the
    official weights, so predictions differ slightly.

    Raises:
        UserError: diffusers is not installed, or has no such network.
    """
    kind = need("diffusers", "tinyfusion[diffusers]", "--to diffusers").DiTTransformer2DModel
    width, heads = settings["hidden_size"], settings["num_heads"]
    if settings["mlp_ratio"] != 4 or settings["class_dropout_prob"] <= 0:
        raise UserError(
            f"--to diffusers: its DiT has MLPs of 4 times the width and a label for none; this one has "
            f"mlp_ratio {settings['mlp_ratio']} and class_dropout_prob {settings['class_dropout_prob']}"
        )
    table = position_table(width, settings["input_size"] // settings["patch_size"]).float()
    if not torch.allclose(model.pos_embed.cpu().view_as(table), table, atol=1e-4):  # type: ignore[operator]
        raise UserError("--to diffusers: its DiT computes the position table, this network has another one")
    made = kind(
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        in_channels=settings["in_channels"],
        out_channels=settings["in_channels"] * (2 if settings["learn_sigma"] else 1),
        num_layers=settings["depth"],
        sample_size=settings["input_size"],
        patch_size=settings["patch_size"],
        activation_fn=_ACTIVATIONS[settings["mlp_act"]],
        num_embeds_ada_norm=settings["num_classes"],
        norm_type="ada_norm_zero",
        norm_eps=1e-6,
    )
    weights = _renamed(model.state_dict(), settings["depth"])
    made.load_state_dict(weights, strict=True)
    return made.eval()


def _renamed(weights: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, value in weights.items():
        qkv = re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.(.*)", name)
        if qkv:
            for part, piece in zip("qkv", value.chunk(3), strict=True):
                out[f"transformer_blocks.{qkv[1]}.attn1.to_{part}.{qkv[2]}"] = piece
            continue
        for ours, theirs in _EMBEDDERS.items():
            if name.startswith(f"{ours}."):
                for i in range(depth):
                    out[f"transformer_blocks.{i}.norm1.emb.{theirs}{name.removeprefix(ours)}"] = value
        for pattern, replacement in _KEYS:
            if re.fullmatch(pattern, name):
                out[re.sub(pattern, replacement, name)] = value
    return out  # the position table is computed
