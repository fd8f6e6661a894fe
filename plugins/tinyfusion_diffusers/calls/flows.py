"""How networks of diffusers count time on a rectified flow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn

from tinyfusion_core.errors import UserError
from tinyfusion_diffusers.structure import class_of


@dataclass(frozen=True)
class Flow:
    """The time convention of a rectified flow.

    Attributes:
        most: what the network is given at pure noise.
        reverse: whether time runs from noise (0) to data.
        negative: whether the prediction points to the data.
        guidance: what the scale of a guidance-distilled network is multiplied by.
        before_shift: whether the network is told the time before it is shifted towards noise.
    """

    most: float
    reverse: bool = False
    negative: bool = False
    guidance: float = 1.0
    before_shift: bool = False


FLOWS: Mapping[str, Flow] = {
    "AuraFlowTransformer2DModel": Flow(1.0),
    "BriaFibo2Transformer2DModel": Flow(1.0),
    "BriaTransformer2DModel": Flow(1000.0),
    "ChronoEditTransformer3DModel": Flow(1000.0),
    "CogView4Transformer2DModel": Flow(1000.0, before_shift=True),
    "EasyAnimateTransformer3DModel": Flow(1000.0),
    "Flux2Transformer2DModel": Flow(1.0),
    "FluxTransformer2DModel": Flow(1.0),
    "HunyuanImageTransformer2DModel": Flow(1000.0, guidance=1000.0),
    "HunyuanVideo15Transformer3DModel": Flow(1000.0),
    "HunyuanVideoTransformer3DModel": Flow(1000.0, guidance=1000.0),
    "JoyImageEditTransformer3DModel": Flow(1000.0),
    "Kandinsky5Transformer3DModel": Flow(1000.0),
    "Krea2Transformer2DModel": Flow(1.0),
    "LTXVideoTransformer3DModel": Flow(1000.0),
    "LongCatImageTransformer2DModel": Flow(1.0),
    "Lumina2Transformer2DModel": Flow(1.0, reverse=True, negative=True),
    "LuminaNextDiT2DModel": Flow(1.0, reverse=True, negative=True),
    "MochiTransformer3DModel": Flow(1000.0, reverse=True, negative=True),
    "MotifVideoTransformer3DModel": Flow(1000.0),
    "NucleusMoEImageTransformer2DModel": Flow(1.0, negative=True),
    "OvisImageTransformer2DModel": Flow(1.0),
    "PRXTransformer2DModel": Flow(1.0),
    "QwenImageTransformer2DModel": Flow(1.0),
    "SD3Transformer2DModel": Flow(1000.0),
    "SanaTransformer2DModel": Flow(1000.0),
    "SanaVideoTransformer3DModel": Flow(1000.0),
    "SkyReelsV2Transformer3DModel": Flow(1000.0),
    "WanTransformer3DModel": Flow(1000.0),
    "WanVACETransformer3DModel": Flow(1000.0),
    "ZImageTransformer2DModel": Flow(1.0, reverse=True, negative=True),
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
    return known if scale is None else replace(known, most=scale)
