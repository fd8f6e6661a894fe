"""Transformers of the diffusers library as backbones, their objectives, and pre-encoded latents and prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import lazy_loader

from tinyfusion_core.registry.hooks import hookimpl

if TYPE_CHECKING:
    from tinyfusion_core.protocols.backbone import Backbone
    from tinyfusion_core.protocols.command import Command
    from tinyfusion_core.protocols.data import DataSource
    from tinyfusion_core.protocols.loss import LossAdapter
    from tinyfusion_diffusers.backbone import DiffusersTransformer as DiffusersTransformer
    from tinyfusion_diffusers.blocks.following import follow_teacher as follow_teacher
    from tinyfusion_diffusers.data import EncodedPrompts as EncodedPrompts
    from tinyfusion_diffusers.objectives import RectifiedFlow as RectifiedFlow
    from tinyfusion_diffusers.objectives import ScheduledDiffusion as ScheduledDiffusion
    from tinyfusion_diffusers.pipelines.published import PublishedPipeline as PublishedPipeline

# Imported when they are used: `tinyfusion --help` asks this module for its commands.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "backbone": ["DiffusersTransformer"],
        "blocks.following": ["follow_teacher"],
        "data": ["EncodedPrompts"],
        "objectives": ["RectifiedFlow", "ScheduledDiffusion"],
        "pipelines.published": ["PublishedPipeline"],
    },
)


@hookimpl
def tinyfusion_register_backbones() -> list[type[Backbone]]:
    """Any transformer of diffusers whose blocks can be removed."""
    from tinyfusion_diffusers.backbone import DiffusersTransformer

    return [DiffusersTransformer]


@hookimpl
def tinyfusion_register_losses() -> list[type[LossAdapter]]:
    """Diffusion on a scheduler's process, and rectified flow."""
    from tinyfusion_diffusers.objectives import RectifiedFlow, ScheduledDiffusion

    return [ScheduledDiffusion, RectifiedFlow]


@hookimpl
def tinyfusion_register_data() -> list[type[DataSource]]:
    """Pre-encoded latents and prompts."""
    from tinyfusion_diffusers.data import EncodedPrompts

    return [EncodedPrompts]


@hookimpl
def tinyfusion_register_commands() -> list[type[Command]]:
    """`tinyfusion encode-prompts`."""
    from tinyfusion_diffusers.prompts.command import EncodePromptsCommand

    return [EncodePromptsCommand]
