"""The plugin interface: which functions a plugin may define, and what they return.

A plugin is a module with functions named as in `KINDS`, marked by `hookimpl`. It is installed with an entry point of
the group `tinyfusion`, or it is a file that a recipe lists under `plugins`. The core registers its own classes in
the same way, in `tinyfusion_core.builtins`. A module that sets `tinyfusion_api = 1` is skipped by a tinyfusion with
another `API_VERSION`.

Every hook is called once, without arguments, when plugins are loaded, which is before a recipe is read. It returns
classes, not instances; recipes call a class by its name. Errors: a hook that returns anything else, an abstract class
or two classes of one name, an unknown hook, another API version, and a failing import. For an installed plugin each of
these is a warning that names the plugin, which is then skipped; for a plugin file it is a UserError. Two plugins (the
core is one) that register classes of the same kind and name are a UserError that names both.

This module imports only the standard library, so that `tinyfusion --help` can ask plugins for their commands.

`tinyfusion check-plugin NAME` runs the conformance kit of `tinyfusion_core.testing`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

API_VERSION = 1
"""Version of the plugin interface. It rises when plugins written for the previous version would no longer work."""
GROUP = "tinyfusion"
"""Entry points of this group are plugins."""
ONLY, BLOCKED = "TINYFUSION_PLUGINS", "TINYFUSION_BLOCK"
"""Environment variables with names of plugins, separated by commas: the only ones to load, and those to skip."""

Hook = TypeVar("Hook", bound=Callable[[], Sequence[type[Any]]])


def hookimpl(function: Hook) -> Hook:
    """Mark a function of a plugin as one of its hooks."""
    function.tinyfusion_impl = True  # type: ignore[attr-defined]
    return function


class Kind(NamedTuple):
    """One kind of class that plugins register.

    Attributes:
        hook: name of the function that returns them.
        base: `module:Class` that they derive from; imported only when a class is checked, as most bases need torch.
        where: what uses them, for the documentation.
        texts: attributes that a class must have, all of them strings; the first is its name.
    """

    hook: str
    base: str
    where: str
    texts: tuple[str, ...] = ("__name__",)

    def base_class(self) -> type[Any]:
        """Import and return the class that `base` names."""
        from pkgutil import resolve_name

        found: type[Any] = resolve_name(self.base)
        return found


KINDS = {
    "backbone": Kind(
        "tinyfusion_register_backbones",
        "tinyfusion_core.protocols.backbone:Backbone",
        "`backbone`",
    ),
    "loss": Kind(
        "tinyfusion_register_losses",
        "tinyfusion_core.protocols.loss:LossAdapter",
        "`loss`",
    ),
    "data": Kind(
        "tinyfusion_register_data",
        "tinyfusion_core.protocols.data:DataSource",
        "`data`",
    ),
    "metric": Kind(
        "tinyfusion_register_metrics",
        "tinyfusion_core.evaluation.metrics:Metric",
        "`evaluate`",
    ),
    "selector": Kind(
        "tinyfusion_register_selectors",
        "tinyfusion_core.selection.base:Selector",
        "`search`, `compare.candidates`",
    ),
    "sampler": Kind(
        "tinyfusion_register_samplers",
        "tinyfusion_core.samplers.base:BlockSampler",
        "`search.sampler`",
    ),
    "weight_update": Kind(
        "tinyfusion_register_weight_updates",
        "tinyfusion_core.pruning.weight_update:WeightUpdate",
        "`search.update`, `recover.update`",
    ),
    "distillation": Kind(
        "tinyfusion_register_distillations",
        "tinyfusion_core.training.distillation:OutputKD",
        "`recover.kd`",
    ),
    "start": Kind(
        "tinyfusion_register_starts",
        "tinyfusion_core.training.starts.base:Start",
        "`recover.start`",
    ),
    "feature_space": Kind(
        "tinyfusion_register_feature_spaces",
        "tinyfusion_core.protocols.data:FeatureSpace",
        "`features` of the metric `Frechet`",
    ),
    "command": Kind(
        "tinyfusion_register_commands",
        "tinyfusion_core.protocols.command:Command",
        "the command line: `tinyfusion NAME`",
        texts=("name", "help"),
    ),
}
"""Everything that a recipe or the command line can name, by kind."""

HOOKS = {kind.hook: name for name, kind in KINDS.items()}
"""Name of a hook -> the kind it registers."""


def named_in(variable: str) -> set[str]:
    """Return the plugin names in the environment variable `ONLY` or `BLOCKED`."""
    return {name.strip() for name in os.environ.get(variable, "").split(",") if name.strip()}


def switched_off_by(name: str) -> str:
    """Return which of `ONLY` and `BLOCKED` disables an installed plugin; empty if neither does."""
    if ONLY in os.environ and name not in named_in(ONLY):
        return ONLY
    return BLOCKED if name in named_in(BLOCKED) else ""
