"""Calls transformers of diffusers, by the arguments of their forward as far as these tell.

Data have short names: `x` latents as the autoencoder gives them, `y` class labels, `text` token embeddings of a
prompt, `mask` which of its tokens count, `text_2` and `mask_2` those of a second encoder, `pooled` the pooled
embedding, `condition` the channels that stand beside the noisy latents, `control` latents that steer, `image` token
embeddings of an image. Networks that take tokens get them here, and their predictions are returned in the shape of `x`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tinyfusion_core.errors import UserError
from tinyfusion_core.protocols.backbone import Batch
from tinyfusion_diffusers.calls.derived import DERIVED, Told
from tinyfusion_diffusers.calls.flows import FLOWS, Flow
from tinyfusion_diffusers.shapes import (
    beside,
    channels,
    channels_last,
    given,
    parameters,
    square,
    takes_image,
    takes_lists,
    takes_patches,
    takes_voxels,
)
from tinyfusion_diffusers.structure import class_of, settings

TIMES = ("timestep", "t")
"""Names of the time."""


def run(model: nn.Module, x: Tensor, timestep: Tensor, inputs: Batch, guidance: float | None) -> Tensor:
    """Run the network.

    Args:
        model: the network.
        x: (batch, ...) noisy latents.
        timestep: (batch,) in the network's convention.
        inputs: those that it takes, by the names above.
        guidance: the scale that a guidance-distilled network is given.

    Returns:
        The prediction, of the same shape as `x`, or with twice its channels.

    Raises:
        UserError: the data lack something, or guidance is missing, or not taken.
    """
    cls, config = class_of(model), settings(model)
    dtype = next(model.parameters()).dtype
    fed = beside(config, x, _told(cls, inputs, "condition")) if channels(config, cls)[1] else x
    call: dict[str, Any] = {name: timestep for name in TIMES if name in parameters(cls)}
    call |= {"return_dict": False, **_given(cls, config, inputs, dtype)}
    told = Told(cls, x, call, config)
    call |= {name: make(told) for name, make in DERIVED.items() if name in parameters(cls)}
    if unknown := [name for name in _required(cls)[2:] if name not in (*call, "kwargs", "args")]:
        raise UserError(f"loss: {cls.__name__} takes '{unknown[0]}', and this package does not know what that is")
    if bool(config.get("guidance_embeds")) != (guidance is not None):
        raise UserError(
            f"loss.guidance: {cls.__name__} as configured takes a guidance scale; set it (FLUX.1-dev's is 3.5)"
            if guidance is None
            else f"loss.guidance is {guidance}, but {cls.__name__} as configured takes no guidance; set it to null"
        )
    if guidance is not None:
        scale = guidance * config.get("guidance_embeds_scale", FLOWS.get(cls.__name__, Flow(1.0)).guidance)
        call["guidance"] = torch.full((len(x),), scale, dtype=torch.float32, device=x.device)
    try:
        out = model(pack(cls, fed.to(dtype)), **call)
    # Networks that want more than their signatures say.
    except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError) as e:
        raise UserError(
            f"loss: {cls.__name__} cannot be called with latents {list(x.shape)} and {', '.join(call)} ({e}); "
            "docs/diffusers.md lists the networks that are known"
        ) from e
    return unpack(cls, out[0] if isinstance(out, tuple) else out, x)


def _required(cls: type[nn.Module]) -> list[str]:
    """The required arguments of a network's forward."""
    return [name for name, p in parameters(cls).items() if p.default is inspect.Parameter.empty]


def _given(cls: type[nn.Module], config: Mapping[str, Any], inputs: Batch, dtype: torch.dtype) -> dict[str, Any]:
    """The arguments that the data have, by name. Raises UserError if they lack one that the network needs."""
    call: dict[str, Any] = {}
    required = _required(cls)
    for argument, name in given(cls).items():
        if name == "image" and not takes_image(config):
            continue
        if name in inputs or name in ("image", "control") or argument in required:
            value = _told(cls, inputs, name, f" ({argument})")
            call[argument] = value.to(dtype) if value.is_floating_point() and name != "mask" else value
    if takes_lists(cls):
        mask = _told(cls, inputs, "mask")
        call["cap_feats"] = [text[real] for text, real in zip(call["cap_feats"], mask, strict=True)]
    return call


def _told(cls: type[nn.Module], inputs: Batch, name: str, note: str = "") -> Tensor:
    """A column of the data. Raises UserError if they lack it."""
    if name not in inputs:
        raise UserError(f"data: {cls.__name__} takes '{name}'{note}, which the samples do not have")
    return inputs[name]


def pack(cls: type[nn.Module], x: Tensor) -> Any:
    """Convert latents (batch, ...) to a network's input: (batch, tokens, channels) if it takes tokens."""
    if takes_lists(cls):
        return list(x.unsqueeze(2))  # images are videos of one frame there
    if channels_last(cls):
        return x.movedim(1, -1)
    if takes_patches(cls):
        return nn.functional.pixel_unshuffle(x, square(cls)).flatten(2).transpose(1, 2)
    return x.flatten(2).transpose(1, 2) if takes_voxels(cls) else x


def unpack(cls: type[nn.Module], out: Any, like: Tensor) -> Tensor:
    """Convert a prediction, (batch, tokens, channels) if it is tokens, to the shape of the latents."""
    if takes_lists(cls):
        return torch.stack(out).squeeze(2)
    found: Tensor = out
    if channels_last(cls):
        return found.movedim(-1, 1)
    if takes_patches(cls):
        height, width = (n // square(cls) for n in like.shape[-2:])
        return nn.functional.pixel_shuffle(found.transpose(1, 2).reshape(len(out), -1, height, width), square(cls))
    return found.transpose(1, 2).reshape(len(out), -1, *like.shape[2:]) if takes_voxels(cls) else found
