"""Masked autoregressive transformers (MAR, arXiv:2406.11838): network, masked-token diffusion, generation."""

from __future__ import annotations

from tinyfusion_core.protocols.backbone import Backbone
from tinyfusion_core.protocols.loss import LossAdapter
from tinyfusion_core.registry.hooks import hookimpl
from tinyfusion_mar.backbone import MAR
from tinyfusion_mar.masked import MaskedTokenDiffusion

__all__ = ["MAR", "MaskedTokenDiffusion"]


@hookimpl
def tinyfusion_register_backbones() -> list[type[Backbone]]:
    """MAR."""
    return [MAR]


@hookimpl
def tinyfusion_register_losses() -> list[type[LossAdapter]]:
    """Masked-token diffusion."""
    return [MaskedTokenDiffusion]
