"""Interpolant transformers (SiT, arXiv:2401.08740): DiT's network in continuous time, and flow matching."""

from __future__ import annotations

from tinyfusion_core.protocols.backbone import Backbone
from tinyfusion_core.protocols.loss import LossAdapter
from tinyfusion_core.registry.hooks import hookimpl
from tinyfusion_sit.backbone import SiT
from tinyfusion_sit.flow import FlowMatching

__all__ = ["FlowMatching", "SiT"]


@hookimpl
def tinyfusion_register_backbones() -> list[type[Backbone]]:
    """SiT."""
    return [SiT]


@hookimpl
def tinyfusion_register_losses() -> list[type[LossAdapter]]:
    """Flow matching."""
    return [FlowMatching]
