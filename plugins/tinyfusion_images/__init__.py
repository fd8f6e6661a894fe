"""Images: small real ones, folders of them and their latents, and how good generated ones are."""

from __future__ import annotations

from tinyfusion_core.evaluation.metrics import Metric
from tinyfusion_core.protocols.command import Command
from tinyfusion_core.protocols.data import DataSource
from tinyfusion_core.protocols.hookspecs import hookimpl
from tinyfusion_images.commands import EncodeImages, SampleImages
from tinyfusion_images.digits import Digits
from tinyfusion_images.fashion import Fashion
from tinyfusion_images.fidelity import Fidelity

__all__ = ["Digits", "Fashion", "Fidelity"]


@hookimpl
def tinyfusion_register_data() -> list[type[DataSource]]:
    return [Digits, Fashion]


@hookimpl
def tinyfusion_register_metrics() -> list[type[Metric]]:
    return [Fidelity]


@hookimpl
def tinyfusion_register_commands() -> list[type[Command]]:
    return [EncodeImages, SampleImages]
