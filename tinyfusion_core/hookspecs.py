"""The whole extension surface: what a plugin can tell tinyfusion.

A plugin is a module (or object) with functions of these names marked by `hookimpl`, found through the
entry-point group `tinyfusion`. Every hook fires once, when plugins are loaded, before a recipe is read.
What a hook returns becomes a name that recipes can use, that of the class. The host raises UserError,
naming both owners, when two plugins bring classes of the same name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pluggy

from .backbone import Backbone
from .data import DataSource
from .losses import LossAdapter

hookspec = pluggy.HookspecMarker("tinyfusion")
hookimpl = pluggy.HookimplMarker("tinyfusion")


@hookspec
def tinyfusion_register_backbones() -> Sequence[type[Backbone]]:  # type: ignore[empty-body]
    """Return the model families, for `backbone:` in a recipe."""


@hookspec
def tinyfusion_register_losses() -> Sequence[type[LossAdapter]]:  # type: ignore[empty-body]
    """Return the objectives, for `loss:` in a recipe."""


@hookspec
def tinyfusion_register_data() -> Sequence[type[DataSource]]:  # type: ignore[empty-body]
    """Return the data sources, for `data:` in a recipe."""


@hookspec
def tinyfusion_register_metrics() -> Sequence[type[Any]]:  # type: ignore[empty-body]
    """Return measurements, subclasses of `tinyfusion_core.evaluation.Metric`, for `evaluate:` in a recipe."""
