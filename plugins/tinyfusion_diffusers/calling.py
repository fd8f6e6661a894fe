"""Calls transformers of diffusers, by the arguments of their forward as far as these tell.

Data have short names: `x` latents as the autoencoder gives them, `y` class labels, `text` token embeddings of a
prompt, `mask` which of its tokens count, `pooled` the pooled embedding, `condition` the channels that stand beside the
noisy latents, `image` token embeddings of an image. Networks that take tokens get them here, and their predictions are
returned in the shape of `x`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tinyfusion_core.errors import UserError
from tinyfusion_core.protocols.backbone import Batch
from tinyfusion_diffusers.shapes import beside, channels, parameters, takes_image, takes_patches, takes_voxels
from tinyfusion_diffusers.structure import class_of, settings

GIVEN = {
    "class_labels": "y",
    "encoder_hidden_states": "text",
    "encoder_attention_mask": "mask",
    "encoder_hidden_states_mask": "mask",
    "pooled_projections": "pooled",
    "encoder_hidden_states_image": "image",
}
"""Arguments of a forward, and the data they take."""


@dataclass(frozen=True)
class Flow:
    """The time convention of a rectified flow.

    Attributes:
        most: what the network is given at pure noise.
        reverse: whether time runs from noise (0) to data, and the prediction points there.
    """

    most: float
    reverse: bool = False


FLOWS: Mapping[str, Flow] = {
    "AuraFlowTransformer2DModel": Flow(1.0),
    "FluxTransformer2DModel": Flow(1.0),
    "LTXVideoTransformer3DModel": Flow(1000.0),
    "Lumina2Transformer2DModel": Flow(1.0, reverse=True),
    "QwenImageTransformer2DModel": Flow(1.0),
    "SD3Transformer2DModel": Flow(1000.0),
    "SanaTransformer2DModel": Flow(1000.0),
    "WanTransformer3DModel": Flow(1000.0),
}
"""Taken from diffusers' pipelines; no signature and no config says it."""


def flow_of(model: nn.Module, scale: float | None) -> Flow:
    """Return the time convention of a network; `scale` is the user's setting for pure noise.

    Raises:
        UserError: it is not known.
    """
    name = class_of(model).__name__
    if name not in FLOWS and scale is None:
        raise UserError(
            f"loss: it is not known how {name} counts time; set loss.scale to what its pipeline feeds it at pure noise "
            "(1 or 1000). If it was trained on a discrete schedule, use ScheduledDiffusion"
        )
    known = FLOWS.get(name, Flow(1.0))
    return known if scale is None else Flow(scale, known.reverse)


def run(model: nn.Module, x: Tensor, timestep: Tensor, inputs: Batch, guidance: float | None) -> Tensor:
    """Run the network.

    Args:
        model: the network.
        x: (batch, ...) noisy latents.
        timestep: (batch,) in the network's convention.
        inputs: `y`, `text`, `mask`, `pooled`, `condition`, `image`, those that it takes.
        guidance: the scale that a guidance-distilled network is given.

    Returns:
        The prediction, of the same shape as `x`, or with twice its channels.

    Raises:
        UserError: the data lack something, or guidance is missing, or not taken.
    """
    cls, config = class_of(model), settings(model)
    dtype = next(model.parameters()).dtype
    fed = beside(config, x, _told(cls, inputs, "condition")) if channels(config, cls)[1] else x
    call: dict[str, Any] = {"timestep": timestep, "return_dict": False, **_given(cls, config, inputs, dtype)}
    call.update({name: make(x, call, config) for name, make in DERIVED.items() if name in parameters(cls)})
    if unknown := [name for name in _required(cls) if name not in (*call, "self", "hidden_states", "kwargs", "args")]:
        raise UserError(f"loss: {cls.__name__} takes '{unknown[0]}', and this package does not know what that is")
    if bool(config.get("guidance_embeds")) != (guidance is not None):
        raise UserError(
            f"loss.guidance: {cls.__name__} as configured takes a guidance scale; set it (FLUX.1-dev's is 3.5)"
            if guidance is None
            else f"loss.guidance is {guidance}, but {cls.__name__} as configured takes no guidance; set it to null"
        )
    if guidance is not None:
        scale = guidance * config.get("guidance_embeds_scale", 1.0)
        call["guidance"] = torch.full((len(x),), scale, dtype=torch.float32, device=x.device)
    try:
        out: Tensor = model(pack(cls, fed.to(dtype)), **call)[0]
    except (AttributeError, TypeError, ValueError) as e:  # networks that want more than their signatures say
        raise UserError(
            f"loss: {cls.__name__} cannot be called with latents {list(x.shape)} and {', '.join(call)} ({e}); "
            "docs/diffusers.md lists the networks that are known"
        ) from e
    return unpack(cls, out, x)


def _required(cls: type[nn.Module]) -> list[str]:
    """The required arguments of a network's forward."""
    return [name for name, p in parameters(cls).items() if p.default is inspect.Parameter.empty]


def _given(cls: type[nn.Module], config: Mapping[str, Any], inputs: Batch, dtype: torch.dtype) -> dict[str, Tensor]:
    """The arguments that the data have, by name. Raises UserError if they lack one that the network needs."""
    call, required = {}, _required(cls)
    for argument, name in GIVEN.items():
        if argument not in parameters(cls) or (name == "image" and not takes_image(config)):
            continue
        if name in inputs or name == "image" or argument in required:
            value = _told(cls, inputs, name, f" ({argument})")
            call[argument] = value.to(dtype) if value.is_floating_point() and name != "mask" else value
    return call


def _told(cls: type[nn.Module], inputs: Batch, name: str, note: str = "") -> Tensor:
    """A column of the data. Raises UserError if they lack it."""
    if name not in inputs:
        raise UserError(f"data: {cls.__name__} takes '{name}'{note}, which the samples do not have")
    return inputs[name]


def pack(cls: type[nn.Module], x: Tensor) -> Tensor:
    """Convert latents (batch, ...) to a network's input: (batch, tokens, channels) if it takes tokens."""
    if takes_patches(cls):
        return nn.functional.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)
    return x.flatten(2).transpose(1, 2) if takes_voxels(cls) else x


def unpack(cls: type[nn.Module], out: Tensor, like: Tensor) -> Tensor:
    """Convert a prediction, (batch, tokens, channels) if it is tokens, to the shape of the latents."""
    if takes_patches(cls):
        height, width = like.shape[-2:]
        return nn.functional.pixel_shuffle(out.transpose(1, 2).reshape(len(out), -1, height // 2, width // 2), 2)
    return out.transpose(1, 2).reshape(len(out), -1, *like.shape[2:]) if takes_voxels(cls) else out


def _image_ids(x: Tensor, call: Mapping[str, Any], config: Mapping[str, Any]) -> Tensor:
    """Row and column of every token, after a zero: (tokens, 3)."""
    rows, columns = (torch.arange(n // 2, device=x.device, dtype=torch.float32) for n in x.shape[-2:])
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).flatten(0, 1)
    return nn.functional.pad(grid, (1, 0))


def _rope_scale(x: Tensor, call: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[float, float, float]:
    """Seconds and pixels per latent position, at 25 frames a second: LTX-Video's autoencoder takes 8 x 32 x 32."""
    return 8 / 25, 32.0, 32.0


def _sizes(x: Tensor, call: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Tensor | None]:
    """Image size for PixArt-alpha's largest network: its sides in pixels, and their ratio."""
    wanted = config.get("use_additional_conditions")
    if not (config.get("sample_size") == 128 if wanted is None else wanted):
        return {"resolution": None, "aspect_ratio": None}
    height, width = (8 * n for n in x.shape[-2:])
    resolution = torch.tensor([[height, width]], dtype=torch.float32, device=x.device).expand(len(x), -1)
    return {"resolution": resolution, "aspect_ratio": resolution[:, :1] / resolution[:, 1:]}


def _video_rotary(x: Tensor, call: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[Tensor, Tensor] | None:
    """CogVideoX's position tables, which are made outside the network."""
    if not config.get("use_rotary_positional_embeddings"):
        return None
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    from diffusers.pipelines.cogvideo import pipeline_cogvideox as pipeline

    frames, (height, width) = x.shape[1], (n // config["patch_size"] for n in x.shape[-2:])
    base = config["sample_height"] // config["patch_size"], config["sample_width"] // config["patch_size"]
    if (step := config.get("patch_size_t")) is None:
        crops: Any = pipeline.get_resize_crop_region_for_grid((height, width), base[1], base[0])  # type: ignore[no-untyped-call]
        more: dict[str, Any] = {"crops_coords": crops, "temporal_size": frames}
    else:
        more = {"crops_coords": None, "temporal_size": math.ceil(frames / step), "grid_type": "slice", "max_size": base}
    tables: Any = get_3d_rotary_pos_embed(
        embed_dim=config["attention_head_dim"], grid_size=(height, width), device=x.device, **more
    )
    return tables[0], tables[1]


def _offset(x: Tensor, call: Mapping[str, Any], config: Mapping[str, Any]) -> Tensor | None:
    """What the pipeline of CogVideoX 1.5 from images always feeds: (1,)."""
    return x.new_full((1,), 2.0) if config.get("ofs_embed_dim") else None


DERIVED: Mapping[str, Callable[[Tensor, Mapping[str, Any], Mapping[str, Any]], Any]] = {
    "img_ids": _image_ids,
    "txt_ids": lambda x, call, config: x.new_zeros(call["encoder_hidden_states"].shape[1], 3, dtype=torch.float32),
    "img_shapes": lambda x, call, config: [[(1, x.shape[-2] // 2, x.shape[-1] // 2)]] * len(x),
    "num_frames": lambda x, call, config: x.shape[2],
    "height": lambda x, call, config: x.shape[3],
    "width": lambda x, call, config: x.shape[4],
    "rope_interpolation_scale": _rope_scale,
    "added_cond_kwargs": _sizes,
    "image_rotary_emb": _video_rotary,
    "ofs": _offset,
}
"""Arguments that follow from the shapes: noisy latents, given arguments, config -> value."""
