"""Diffusion transformers (DiT, arXiv:2212.09748): network, Gaussian diffusion, pre-encoded latents."""

from __future__ import annotations

from tinyfusion_core.protocols.backbone import Backbone
from tinyfusion_core.protocols.data import DataSource
from tinyfusion_core.protocols.loss import LossAdapter
from tinyfusion_core.registry.hooks import hookimpl
from tinyfusion_dit.backbone import DiT
from tinyfusion_dit.diffusion import GaussianDiffusion
from tinyfusion_dit.latents import LatentFolders, Latents
from tinyfusion_dit.other_layouts import LatentTensors, ListedMoments

__all__ = ["DiT", "GaussianDiffusion", "LatentFolders", "LatentTensors", "Latents", "ListedMoments"]


@hookimpl
def tinyfusion_register_backbones() -> list[type[Backbone]]:
    """DiT."""
    return [DiT]


@hookimpl
def tinyfusion_register_losses() -> list[type[LossAdapter]]:
    """Gaussian diffusion."""
    return [GaussianDiffusion]


@hookimpl
def tinyfusion_register_data() -> list[type[DataSource]]:
    """Pre-encoded latents, in our layouts and those of others."""
    return [Latents, LatentFolders, ListedMoments, LatentTensors]
