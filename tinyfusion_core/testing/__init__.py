"""The conformance kit, for the tests of plugins.

    from tinyfusion_core.testing import parametrize_with_checks

    @parametrize_with_checks([(MyBackbone, MyLoss)])
    def test_conformance(check):
        check()

Selectors, samplers, weight updates and distillation losses are checked in the same way, on their own:
`@parametrize_with_checks([MyCriterion, MySampler])`. On the command line: `tinyfusion check-plugin NAME`. The checks
themselves are in `checks`.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from ..errors import UserError, nearest
from ..protocols.backbone import Backbone
from ..protocols.loss import LossAdapter
from ..registry.registry import Registry, load_plugin, registry
from .checks import KINDS, Check, kind_of
from .subject import Pair, Subject

Checked = Pair | Any
"""A backbone and a loss; or a selector, a sampler, a weight update or a distillation loss, class or instance."""


def name_of(check: Check) -> str:
    """Return the name of a check, as used in test ids, `expected_failures` and `check-plugin`."""
    return check.__name__.removeprefix("check_")


def run_check(check: Check, thing: Checked) -> None:
    """Run one check; the global random generators are restored afterwards.

    Raises:
        AssertionError: the check fails.
        UserError: the check fails with an error that a user would see.
    """
    numpy_state, python_state = np.random.get_state(), random.getstate()
    with torch.random.fork_rng():
        try:
            check(kind_of(thing).subject(thing))
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)


def parametrize_with_checks(things: Sequence[Checked], expected_failures: Mapping[str, str] | None = None) -> Any:
    """Decorate a test `def test_conformance(check): check()` so that it runs for every check of every object.

    Args:
        things: pairs of backbone and loss, selectors, samplers, weight updates, distillation losses; classes or
            instances. Of a class, its `tiny()` is checked. A class that needs no `tiny` may have none: then selectors
            are given `keep`, and samplers the block lists with `keep` or `rules`.
        expected_failures: names of checks that fail, with the reason. A check that does not fail then fails the test.

    Raises:
        UserError: `expected_failures` names no check, or there are no checks for such an object.
    """
    import pytest

    expected = dict(expected_failures or {})
    checks = [(thing, check) for thing in things for check in kind_of(thing).checks]
    names = [name_of(check) for _, check in checks]
    for name in expected:
        if name not in names:
            raise UserError(f"expected_failures: no check '{name}'{nearest(name, names)}")
    parameters = [
        pytest.param(
            partial(run_check, check, thing),
            id=f"{_name(thing, '-')}-{name}",
            marks=[pytest.mark.xfail(reason=expected[name], strict=True)] if name in expected else [],
        )
        for name, (thing, check) in zip(names, checks, strict=True)
    ]
    return pytest.mark.parametrize("check", parameters)


def pair_name(pair: Pair, between: str = " + ") -> str:
    """Return the names of a backbone and a loss."""
    return between.join(map(_class_name, pair))


def _name(thing: Checked, between: str = " + ") -> str:
    return pair_name(thing, between) if isinstance(thing, tuple) else _class_name(thing)


def _class_name(thing: Any) -> str:
    return thing.__name__ if inspect.isclass(thing) else type(thing).__name__


@dataclass(frozen=True)
class CheckResult:
    """The result of one check.

    Attributes:
        subject: names of the backbone and the loss, or of the object that was checked.
        check: name of the check.
        meaning: what it checks.
        error: why it fails; None if it passes.
    """

    subject: str
    check: str
    meaning: str
    error: str | None


def check_plugin(name: str) -> Iterator[CheckResult]:
    """Check an installed plugin, and yield one result after the other.

    Every backbone of the plugin is paired with every loss of the plugin that runs on its tiny network; with those of
    other plugins if none of its own does. A plugin with only losses is paired with the backbones of others in the same
    way. Its selectors, samplers, weight updates and distillation losses follow.

    Args:
        name: name of its entry point, or the path of a plugin that is one Python file, which is loaded.

    Raises:
        UserError: there is no such plugin, it could not be loaded, or it has nothing to check.
    """
    for thing in checked_of(load_plugin(name).name if name.endswith(".py") else name, registry()):
        for check in kind_of(thing).checks:
            error = None
            try:
                run_check(check, thing)
            except (Exception, SystemExit) as e:  # whatever a stranger's class raises is what came of it
                lines = str(e).strip().splitlines() or [""]
                error = lines[0] if isinstance(e, (AssertionError, UserError)) else f"{type(e).__name__}: {lines[0]}"
            yield CheckResult(_name(thing), name_of(check), " ".join((check.__doc__ or "").split()), error)


def checked_of(name: str, found: Registry) -> list[Checked]:
    """Return everything that is checked of a plugin; see `check_plugin`.

    Raises:
        UserError: there is nothing to check.
    """
    things: list[Checked] = [*pairs_of(name, found)]
    for kind in KINDS:
        things += _brought(name, found).get(kind, [])
    if not things:
        kinds = ", ".join(KINDS).replace("_", " ")
        raise UserError(
            f"plugin '{name}' brings neither a backbone nor a loss, nor a {kinds}; there is nothing to check"
        )
    return things


def pairs_of(name: str, found: Registry) -> list[Pair]:
    """Return the pairs in which a plugin is checked, if it has backbones or losses; see `check_plugin`.

    Raises:
        UserError: a backbone or loss fits no other.
    """
    own = _brought(name, found)
    everything = {kind: list(classes.values()) for kind, classes in found.classes.items()}
    pairs: list[Pair] = []
    for backbone in own["backbone"]:
        pairs += _fitting([backbone], own["loss"]) or _fitting([backbone], everything["loss"])
        if not any(pair[0] is backbone for pair in pairs):
            reason = _misfit((backbone, (own["loss"] or everything["loss"])[0]))
            raise UserError(f"plugin '{name}': no loss runs on {backbone.__name__}.tiny(); the first one: {reason}")
    for loss in own["loss"]:
        if not any(pair[1] is loss for pair in pairs):
            fitting = _fitting(everything["backbone"], [loss])
            if not fitting:
                reason = _misfit(((own["backbone"] or everything["backbone"])[0], loss))
                raise UserError(f"plugin '{name}': {loss.__name__}.tiny() runs on no backbone; the first one: {reason}")
            pairs += fitting[:1]
    return pairs


def _brought(name: str, found: Registry) -> dict[str, list[type[Any]]]:
    """The classes of a plugin, by kind. Raises UserError if it is not installed or could not be loaded."""
    plugins = {plugin.name: plugin for plugin in found.plugins}
    if name not in plugins:
        raise UserError(f"no plugin '{name}' is installed{nearest(name, plugins)}")
    if plugins[name].error:
        raise UserError(f"plugin '{name}' could not be loaded: {plugins[name].error}")
    brought: dict[str, list[type[Any]]] = {kind: [] for kind in found.classes}
    for kind, cls in plugins[name].brings:
        brought[kind].append(found.classes[kind][cls])
    return brought


def _fitting(backbones: Sequence[type[Backbone]], losses: Sequence[type[LossAdapter]]) -> list[Pair]:
    return [(backbone, loss) for backbone in backbones for loss in losses if _misfit((backbone, loss)) is None]


def _misfit(pair: Pair) -> str | None:
    """Why a loss cannot run a network; None if it can."""
    try:
        subject = Subject.of(pair)
        with torch.no_grad():
            subject.loss.predict(subject.backbone.build(), subject.inputs())
    except (Exception, SystemExit) as e:
        return f"{pair_name(pair)}: {type(e).__name__}: {e}"
    return None
