"""Transformers of the diffusers library as backbones, their objectives, and pre-encoded latents and prompts."""

from __future__ import annotations

from tinyfusion_core.protocols.backbone import Backbone
from tinyfusion_core.protocols.command import Command
from tinyfusion_core.protocols.data import DataSource
from tinyfusion_core.protocols.loss import LossAdapter
from tinyfusion_core.registry.hooks import hookimpl
from tinyfusion_diffusers.backbone import DiffusersTransformer
from tinyfusion_diffusers.data import EncodedPrompts
from tinyfusion_diffusers.objectives import RectifiedFlow, ScheduledDiffusion

__all__ = ["DiffusersTransformer", "EncodedPrompts", "RectifiedFlow", "ScheduledDiffusion"]


@hookimpl
def tinyfusion_register_backbones() -> list[type[Backbone]]:
    """Any transformer of diffusers whose blocks can be removed."""
    return [DiffusersTransformer]


@hookimpl
def tinyfusion_register_losses() -> list[type[LossAdapter]]:
    """Diffusion on a scheduler's process, and rectified flow."""
    return [ScheduledDiffusion, RectifiedFlow]


@hookimpl
def tinyfusion_register_data() -> list[type[DataSource]]:
    """Pre-encoded latents and prompts."""
    return [EncodedPrompts]


@hookimpl
def tinyfusion_register_commands() -> list[type[Command]]:
    """`tinyfusion encode-prompts`."""
    from tinyfusion_diffusers.prompts.command import EncodePromptsCommand

    return [EncodePromptsCommand]
