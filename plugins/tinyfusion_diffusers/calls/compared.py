"""Which networks are fed as the published pipeline of diffusers feeds them, as tests show: both sample the same."""

from __future__ import annotations

COMPARED = frozenset(
    {
        "AllegroTransformer3DModel",
        "AuraFlowTransformer2DModel",
        "BriaFibo2Transformer2DModel",
        "BriaTransformer2DModel",
        "ChronoEditTransformer3DModel",
        "CogVideoXTransformer3DModel",
        "CogView3PlusTransformer2DModel",
        "CogView4Transformer2DModel",
        "DiTTransformer2DModel",
        "EasyAnimateTransformer3DModel",
        "Flux2Transformer2DModel",
        "FluxTransformer2DModel",
        "HunyuanImageTransformer2DModel",
        "HunyuanVideo15Transformer3DModel",
        "HunyuanVideoTransformer3DModel",
        "JoyImageEditTransformer3DModel",
        "Kandinsky5Transformer3DModel",
        "Krea2Transformer2DModel",
        "LTXVideoTransformer3DModel",
        "LongCatImageTransformer2DModel",
        "Lumina2Transformer2DModel",
        "LuminaNextDiT2DModel",
        "MochiTransformer3DModel",
        "MotifVideoTransformer3DModel",
        "NucleusMoEImageTransformer2DModel",
        "OvisImageTransformer2DModel",
        "PRXTransformer2DModel",
        "PixArtTransformer2DModel",
        "QwenImageTransformer2DModel",
        "SD3Transformer2DModel",
        "SanaTransformer2DModel",
        "SanaVideoTransformer3DModel",
        "SkyReelsV2Transformer3DModel",
        "WanTransformer3DModel",
        "WanVACETransformer3DModel",
        "ZImageTransformer2DModel",
    }
)
"""Classes; of others `tinyfusion validate` says that nobody has compared them."""
