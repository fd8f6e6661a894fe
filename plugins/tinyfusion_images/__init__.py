"""Images: small real data sets, image folders and their latents, and the quality of generated images."""

from __future__ import annotations

from typing import TYPE_CHECKING

import lazy_loader

from tinyfusion_core.registry.hooks import hookimpl

if TYPE_CHECKING:
    from tinyfusion_core.evaluation.metrics import Metric
    from tinyfusion_core.protocols.command import Command
    from tinyfusion_core.protocols.data import DataSource, FeatureSpace
    from tinyfusion_images.digits import Digits as Digits
    from tinyfusion_images.fashion import Fashion as Fashion
    from tinyfusion_images.fidelity import Fidelity as Fidelity
    from tinyfusion_images.prompts.score import PromptScore as PromptScore

# Imported when they are used: `tinyfusion --help` asks this module for its commands.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "digits": ["Digits"],
        "fashion": ["Fashion"],
        "fidelity": ["Fidelity"],
        "prompts.score": ["PromptScore"],
    },
)


@hookimpl
def tinyfusion_register_data() -> list[type[DataSource]]:
    """Handwritten digits and Fashion-MNIST."""
    from tinyfusion_images.digits import Digits
    from tinyfusion_images.fashion import Fashion

    return [Digits, Fashion]


@hookimpl
def tinyfusion_register_metrics() -> list[type[Metric]]:
    """FID and related metrics, and how well pictures fit their prompts."""
    from tinyfusion_images.fidelity import Fidelity
    from tinyfusion_images.pictures import Pictures
    from tinyfusion_images.prompts.score import PromptScore

    return [Fidelity, Pictures, PromptScore]


@hookimpl
def tinyfusion_register_feature_spaces() -> list[type[FeatureSpace]]:
    """Classifiers that come with the package."""
    from tinyfusion_images.features import ShippedFeatures

    return [ShippedFeatures]


@hookimpl
def tinyfusion_register_commands() -> list[type[Command]]:
    """`tinyfusion encode` and `tinyfusion sample`."""
    from tinyfusion_images.commands import EncodeImages, SampleImages

    return [EncodeImages, SampleImages]
