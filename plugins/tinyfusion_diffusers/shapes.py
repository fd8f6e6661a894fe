"""What the data of a transformer of diffusers look like, by its class and config."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tinyfusion_core.errors import UserError

TEXT_WIDTHS = (
    "joint_attention_dim", "caption_channels", "text_dim", "text_embed_dim", "cap_feat_dim", "cross_attention_dim",
)  # fmt: skip
"""Config keys for the width of `text`, best first."""
TEXT_LENGTH = 77
"""Tokens of a prompt, where neither the recipe nor the config says how many."""
TEXT_BESIDE_IMAGE = 512
"""Tokens of a prompt in Wan 2.1 from images, whose attention takes all before these for those of the image."""
IMAGE_TOKENS = 257
"""Tokens of an image for Wan 2.1: CLIP ViT-H/14 cuts 224 pixels into 16 x 16, and adds one."""


def parameters(cls: type[nn.Module]) -> Mapping[str, inspect.Parameter]:
    """Return the arguments of a network's forward."""
    return inspect.signature(cls.forward).parameters


def takes_patches(cls: type[nn.Module]) -> bool:
    """Return whether the network takes squares of 2 x 2 latents as tokens, which are packed outside it."""
    return bool({"img_ids", "img_shapes"} & parameters(cls).keys())


def takes_voxels(cls: type[nn.Module]) -> bool:
    """Return whether the network takes every position of a video's latent as a token."""
    return "num_frames" in parameters(cls)


def takes_image(config: Mapping[str, Any]) -> bool:
    """Return whether the network attends to the embeddings of an image."""
    return bool(config.get("image_dim"))


def frames_first(config: Mapping[str, Any]) -> bool:
    """Return whether latents of a video are (frames, channels, height, width) rather than (channels, frames, ...)."""
    return "sample_frames" in config


def beside(config: Mapping[str, Any], x: Tensor, condition: Tensor) -> Tensor:
    """Concatenate noisy latents (batch, ...) and the condition along the channels, as pipelines do: the latents first.

    Packing into tokens keeps channels together, so that this comes before it.
    """
    return torch.cat([x, condition], 2 if frames_first(config) else 1)


def channels(config: Mapping[str, Any], cls: type[nn.Module]) -> tuple[int, int]:
    """Return the channels of the latents, and those that the condition brings: what the network takes, but not gives.

    DiT and PixArt give more than they take: a variance too.
    """
    taken, squares = int(config["in_channels"]), 4 if takes_patches(cls) else 1
    given = (config.get("out_channels") or taken) * (config["patch_size"] ** 2 if takes_patches(cls) else 1)
    noisy = min(taken, int(given))
    return noisy // squares, (taken - noisy) // squares


def example(
    config: Mapping[str, Any], cls: type[nn.Module], num_rows: int, latent: Sequence[int] | None, tokens: int | None
) -> dict[str, Tensor]:
    """Return a batch with the shapes of a network's data, and arbitrary values: tensors by name, each (batch, ...).

    Args:
        config: config of the network.
        cls: its class.
        num_rows: batch size.
        latent: (height, width) or (frames, height, width) of the latents; None: that of the config.
        tokens: number of tokens of the prompts; None: that of the config.

    Raises:
        UserError: the size of the latents is needed, or the network does not take such latents or texts; or the config
            does not say what the network takes.
    """
    try:
        return _example(config, cls, num_rows, latent, tokens)
    except KeyError as e:
        raise UserError(
            f"backbone: the config of {cls.__name__} has no {e}; it is not known what its data look like"
        ) from None


def _example(
    config: Mapping[str, Any], cls: type[nn.Module], num_rows: int, latent: Sequence[int] | None, tokens: int | None
) -> dict[str, Tensor]:
    takes, (noisy, condition) = parameters(cls), channels(config, cls)
    size = _size(config, cls, latent)

    def latents(number: int) -> Tensor:
        where = 1 if frames_first(config) else 0
        return torch.zeros(num_rows, *size[:where], number, *size[where:])

    batch = {"x": latents(noisy)}
    if condition:
        batch["condition"] = latents(condition)
    if "class_labels" in takes:
        batch["y"] = torch.arange(num_rows) % config["num_embeds_ada_norm"]
    length = _text_length(config, cls, tokens)
    if "encoder_hidden_states" in takes:
        key = next((key for key in TEXT_WIDTHS if config.get(key)), TEXT_WIDTHS[0])
        batch["text"] = torch.zeros(num_rows, length, config[key])
    if {"encoder_attention_mask", "encoder_hidden_states_mask"} & takes.keys():
        # Of different lengths, so that whoever looks at shapes sees the masks that real prompts bring.
        lengths = torch.tensor([length if i == 0 else max(1, length // 2) for i in range(num_rows)])
        batch["mask"] = torch.arange(length) < lengths[:, None]
    if "pooled_projections" in takes:
        batch["pooled"] = torch.zeros(num_rows, config["pooled_projection_dim"])
    if "encoder_hidden_states_image" in takes and takes_image(config):
        batch["image"] = torch.zeros(num_rows, config.get("pos_embed_seq_len") or IMAGE_TOKENS, config["image_dim"])
    return batch


def _size(config: Mapping[str, Any], cls: type[nn.Module], latent: Sequence[int] | None) -> tuple[int, ...]:
    """The size of the latents. Raises UserError if the network takes no such size."""
    size, steps = tuple(latent or _latent(config)), _patch(config, cls)
    if len(size) != len(steps):
        wanted = "[frames, height, width]" if len(steps) == 3 else "[height, width]"
        found = list(size) or "not set, and the config does not say"
        raise UserError(f"backbone.latent: {found}; {cls.__name__} takes {wanted} of the latents")
    if any(n % step for n, step in zip(size, steps, strict=True)):
        raise UserError(
            f"backbone.latent: {list(size)}; {cls.__name__} cuts latents into patches of {list(steps)}, and the sizes "
            "have to be multiples of these"
        )
    most = size
    lengths = config.get("axes_lens") or ()  # of the tables of positions: of text, rows and columns
    if len(lengths) == len(steps) + 1:
        most = tuple(step * n for step, n in zip(steps, lengths[1:], strict=True))
    elif length := config.get("rope_max_seq_len"):
        most = tuple(step * length for step in steps)
    if any(n > m for n, m in zip(size, most, strict=True)):
        raise UserError(f"backbone.latent: {list(size)}; {cls.__name__} as configured takes at most {list(most)}")
    return size


def _patch(config: Mapping[str, Any], cls: type[nn.Module]) -> tuple[int, ...]:
    """The patch that becomes one token: (height, width), for a video (frames, height, width)."""
    side = 2 if takes_patches(cls) else config.get("patch_size", 1)
    if isinstance(side, (list, tuple)):
        return tuple(side)
    video = takes_voxels(cls) or frames_first(config)
    return (config.get("patch_size_t") or 1, side, side) if video else (side, side)


def _latent(config: Mapping[str, Any]) -> tuple[int, ...]:
    """The size of the latents that a network was made for, as far as its config says."""
    if frames_first(config):
        frames = (config["sample_frames"] - 1) // config["temporal_compression_ratio"] + 1
        step = config.get("patch_size_t") or 1
        return step * math.ceil(frames / step), config["sample_height"], config["sample_width"]
    side = config.get("sample_size")
    return (side, side) if isinstance(side, int) else ()


def _text_length(config: Mapping[str, Any], cls: type[nn.Module], tokens: int | None) -> int:
    """The number of tokens of the prompts. Raises UserError if the network takes no such number."""
    least, most, default = 1, None, TEXT_LENGTH
    if most := config.get("max_text_seq_length"):
        # Positions are added to text and video in one table, unless attention rotates them.
        rotated = config.get("use_rotary_positional_embeddings") and not config.get("use_learned_positional_embeddings")
        least, default = 1 if rotated else most, most
    elif takes_image(config):
        least, most, default = TEXT_BESIDE_IMAGE, TEXT_BESIDE_IMAGE, TEXT_BESIDE_IMAGE
    elif lengths := config.get("axes_lens"):
        most = lengths[0] - 1  # the image stands behind the text
    length = default if tokens is None else tokens
    if most is not None and not least <= length <= most:
        wanted = f"at most {most}" if least < most else f"{most}"
        raise UserError(f"backbone.text_length is {length}; {cls.__name__} as configured takes {wanted}")
    return length
