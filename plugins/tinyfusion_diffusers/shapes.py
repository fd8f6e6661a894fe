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
    "joint_attention_dim", "caption_channels", "text_dim", "text_embed_dim", "cap_feat_dim", "context_in_dim",
    "in_text_dim", "text_hidden_dim", "cross_attention_input_dim",
    "cross_attention_dim",
)  # fmt: skip
"""Config keys for the width of `text`, best first."""
TEXT_LENGTH = 77
"""Tokens of a prompt, where neither the recipe nor the config says how many."""
TEXT_BESIDE_IMAGE = 512
"""Tokens of a prompt in Wan 2.1 from images, whose attention takes all before these for those of the image."""
IMAGE_TOKENS = 257
"""Tokens of an image for Wan 2.1: CLIP ViT-H/14 cuts 224 pixels into 16 x 16, and adds one."""


GIVEN = {
    "class_labels": "y",
    "encoder_hidden_states": "text",
    "cap_feats": "text",
    "encoder_attention_mask": "mask",
    "encoder_hidden_states_mask": "mask",
    "encoder_mask": "mask",
    "pooled_projections": "pooled",
    "encoder_hidden_states_image": "image",
    "control_hidden_states": "control",
    "encoder_hidden_states_2": "text_2",
    "encoder_attention_mask_2": "mask_2",
}
"""Arguments of a forward, and the data they take."""
OWN: Mapping[str, Mapping[str, str]] = {"PRXTransformer2DModel": {"attention_mask": "mask"}}
"""The same, of arguments that are something else for others."""
TEXT_WIDTHS_2 = ("text_embed_2_dim",)
"""Config keys for the width of `text_2`."""


def parameters(cls: type[nn.Module]) -> Mapping[str, inspect.Parameter]:
    """Return the arguments of a network's forward."""
    return inspect.signature(cls.forward).parameters


def given(cls: type[nn.Module]) -> dict[str, str]:
    """Return the arguments of a network's forward that the data have, and what they are called there."""
    return {k: v for k, v in {**GIVEN, **OWN.get(cls.__name__, {})}.items() if k in parameters(cls)}


def takes_patches(cls: type[nn.Module]) -> bool:
    """Return whether the network takes squares of latents as tokens, which are packed outside it.

    Such networks are told the positions of their tokens, along several axes.
    """
    if "axes_dims_rope" not in inspect.signature(cls.__init__).parameters:
        return False
    return bool({"img_ids", "img_shapes", "position_ids"} & parameters(cls).keys())


def square(cls: type[nn.Module]) -> int:
    """Return the side of the square of latents that is one token of a network that takes patches.

    Positions of four axes are Flux 2's, whose latents are squares of the autoencoder's already.
    """
    axes = inspect.signature(cls.__init__).parameters.get("axes_dims_rope")
    return 1 if axes is not None and len(axes.default) == 4 else 2


def takes_lists(cls: type[nn.Module]) -> bool:
    """Return whether the network takes lists of images and of texts, one entry for each sample."""
    return "cap_feats" in parameters(cls)


def channels_last(cls: type[nn.Module]) -> bool:
    """Return whether the network takes its channels behind frames, height and width."""
    return "visual_rope_pos" in parameters(cls)


def takes_voxels(cls: type[nn.Module]) -> bool:
    """Return whether the network takes every position of a video's latent as a token."""
    return "num_frames" in parameters(cls)


def takes_image(config: Mapping[str, Any]) -> bool:
    """Return whether the network attends to the embeddings of an image."""
    return bool(config.get("image_dim"))


def frames_first(config: Mapping[str, Any]) -> bool:
    """Return whether latents of a video are (frames, channels, height, width) rather than (channels, frames, ...)."""
    return "temporal_compression_ratio" in config


def beside(config: Mapping[str, Any], x: Tensor, condition: Tensor) -> Tensor:
    """Concatenate noisy latents (batch, ...) and the condition along the channels, as pipelines do: the latents first.

    Packing into tokens keeps channels together, so that this comes before it.
    """
    return torch.cat([x, condition], 2 if frames_first(config) else 1)


def channels(config: Mapping[str, Any], cls: type[nn.Module]) -> tuple[int, int]:
    """Return the channels of the latents, and those that the condition brings: what the network takes, but not gives.

    DiT and PixArt give more than they take: a variance too.
    """
    if channels_last(cls):
        return config["in_visual_dim"], config["in_visual_dim"] + 1 if config["visual_cond"] else 0
    taken, squares = int(config["in_channels"]), square(cls) ** 2 if takes_patches(cls) else 1
    out = (config.get("out_channels") or taken) * (config.get("patch_size", 1) ** 2 if takes_patches(cls) else 1)
    noisy = min(taken, int(out))
    return noisy // squares, (taken - noisy) // squares


def example(
    config: Mapping[str, Any],
    cls: type[nn.Module],
    num_rows: int,
    latent: Sequence[int] | None,
    tokens: tuple[int | None, int | None],
) -> dict[str, Tensor]:
    """Return a batch with the shapes of a network's data, and arbitrary values: tensors by name, each (batch, ...).

    Args:
        config: config of the network.
        cls: its class.
        num_rows: batch size.
        latent: (height, width) or (frames, height, width) of the latents; None: that of the config.
        tokens: number of tokens of the prompts, None: that of the config; of a second encoder's, None: as many.

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
    config: Mapping[str, Any],
    cls: type[nn.Module],
    num_rows: int,
    latent: Sequence[int] | None,
    tokens: tuple[int | None, int | None],
) -> dict[str, Tensor]:
    named, (noisy, condition) = set(given(cls).values()), channels(config, cls)
    size = _size(config, cls, latent)

    def latents(number: int) -> Tensor:
        where = 1 if frames_first(config) else 0
        return torch.zeros(num_rows, *size[:where], number, *size[where:])

    batch = {"x": latents(noisy)}
    if condition:
        batch["condition"] = latents(condition)
    if "y" in named and config.get("num_embeds_ada_norm"):
        batch["y"] = torch.arange(num_rows) % config["num_embeds_ada_norm"]
    length = _text_length(config, cls, tokens[0])
    batch |= _texts(config, cls, num_rows, {"text": length, "text_2": tokens[1] or length})
    if tokens[1] is not None and "text_2" not in batch:
        raise UserError(f"backbone.text_length_2 is {tokens[1]}; {cls.__name__} as configured takes no second text")
    if "control" in named:
        batch["control"] = latents(config["vace_in_channels"])
    if "pooled" in named and (width := config.get("pooled_projection_dim", config.get("in_text_dim2"))):
        batch["pooled"] = torch.zeros(num_rows, width)
    if "image" in named and takes_image(config):
        batch["image"] = torch.zeros(num_rows, config.get("pos_embed_seq_len") or IMAGE_TOKENS, config["image_dim"])
    return batch


def _texts(
    config: Mapping[str, Any], cls: type[nn.Module], num_rows: int, tokens: Mapping[str, int]
) -> dict[str, Tensor]:
    """The prompts that a network takes, and which of their tokens count."""
    named, batch = set(given(cls).values()), {}
    # Some take several layers of the text encoder: of every token (Krea 2), or one text for each (Fibo 2).
    layers = [config["num_text_layers"]] if "num_text_layers" in config else []
    texts = [1 + len(config["injection_layer_ids"])] if "injection_layer_ids" in config else []
    for column, widths in {"text": TEXT_WIDTHS, "text_2": TEXT_WIDTHS_2}.items():
        key = next((key for key in widths if config.get(key)), None)
        if column not in named or (key is None and column != "text"):
            continue
        length = tokens[column]
        batch[column] = torch.zeros(num_rows, *texts, length, *layers, config[key or widths[0]])
        if (mask := column.replace("text", "mask")) in named or takes_lists(cls):
            # Of different lengths, so that whoever looks at shapes sees the masks that real prompts bring.
            lengths = torch.tensor([length if i == 0 else max(1, length // 2) for i in range(num_rows)])
            batch[mask] = torch.arange(length) < lengths[:, None]
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
    side = square(cls) if takes_patches(cls) else config.get("patch_size") or 1
    if isinstance(side, (list, tuple)):
        return tuple(side)
    video = "3D" in cls.__name__
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
