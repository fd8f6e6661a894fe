"""The whole extension surface: what a plugin can tell tinyfusion.

A plugin is a module with functions of these names, marked by `hookimpl`. It is installed with an entry point of the
group `tinyfusion`, or it is a file that a recipe names under `plugins`. A module that says `tinyfusion_api = 1` is
left out by a tinyfusion that has another `API_VERSION`.

Every hook fires once, without arguments, when plugins are loaded, which is before a recipe is read. It returns classes,
not instances; the name of a class is what recipes call it. What the host raises, and how it says so: a hook that
returns anything else, an abstract class or two classes of one name, an unknown hook, another API version and an import
that fails cost an installed plugin a warning that names it, and it is left out; for a file of a recipe they are a
UserError. Two plugins that bring classes of the same kind and name are a UserError that names both.

`tinyfusion check-plugin NAME` runs the conformance kit of `tinyfusion_core.testing`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pluggy

from .backbone import Backbone
from .command import Command
from .data import DataSource
from .loss import LossAdapter

API_VERSION = 1
"""Version of the plugin interface. It rises when a plugin written for the one before would no longer work."""

hookspec = pluggy.HookspecMarker("tinyfusion")
hookimpl = pluggy.HookimplMarker("tinyfusion")


@hookspec
def tinyfusion_register_backbones() -> Sequence[type[Backbone]]:  # type: ignore[empty-body]
    """Return the model families, subclasses of `Backbone`, for `backbone:` in a recipe.

    Fires once, without arguments, when plugins are loaded. See above for what the host raises.
    """


@hookspec
def tinyfusion_register_losses() -> Sequence[type[LossAdapter]]:  # type: ignore[empty-body]
    """Return the objectives, subclasses of `LossAdapter`, for `loss:` in a recipe.

    Fires once, without arguments, when plugins are loaded. See above for what the host raises.
    """


@hookspec
def tinyfusion_register_data() -> Sequence[type[DataSource]]:  # type: ignore[empty-body]
    """Return the data sources, subclasses of `DataSource`, for `data:` in a recipe.

    Fires once, without arguments, when plugins are loaded. See above for what the host raises.
    """


@hookspec
def tinyfusion_register_metrics() -> Sequence[type[Any]]:  # type: ignore[empty-body]
    """Return measurements, subclasses of `tinyfusion_core.evaluation.Metric`, for `evaluate:` in a recipe.

    Fires once, without arguments, when plugins are loaded. See above for what the host raises.
    """


@hookspec
def tinyfusion_register_commands() -> Sequence[type[Command]]:  # type: ignore[empty-body]
    """Return commands, subclasses of `Command`, for the command line.

    Fires once, without arguments, when plugins are loaded. See above for what the host raises.
    """
