"""Masked autoregressive transformers (MAR, arXiv:2406.11838): network, masked-token diffusion, generation."""

from __future__ import annotations

from tinyfusion_core.protocols.backbone import Backbone
from tinyfusion_core.protocols.data import DataSource
from tinyfusion_core.protocols.loss import LossAdapter
from tinyfusion_core.registry.hooks import hookimpl
from tinyfusion_mar.backbone import MAR
from tinyfusion_mar.cached import CachedMoments
from tinyfusion_mar.masked import MaskedTokenDiffusion

__all__ = ["MAR", "CachedMoments", "MaskedTokenDiffusion"]


@hookimpl
def tinyfusion_register_backbones() -> list[type[Backbone]]:
    """MAR."""
    return [MAR]


@hookimpl
def tinyfusion_register_losses() -> list[type[LossAdapter]]:
    """Masked-token diffusion."""
    return [MaskedTokenDiffusion]


@hookimpl
def tinyfusion_register_data() -> list[type[DataSource]]:
    """What MAR's own code caches."""
    return [CachedMoments]
