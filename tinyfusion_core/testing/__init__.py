"""The conformance kit, for the tests of plugins:

    from tinyfusion_core.testing import parametrize_with_checks

    @parametrize_with_checks([(MyBackbone, MyLoss)])
    def test_conformance(check):
        check()

On the command line: `tinyfusion check-plugin NAME`. The checks themselves are in `checks.py`.
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
from ..protocols.registry import Registry, load_plugin, registry
from .checks import CHECKS, Check
from .subject import Pair, Subject


def name_of(check: Check) -> str:
    """The name of a check, as test ids, `expected_failures` and `check-plugin` have it."""
    return check.__name__.removeprefix("check_")


def run_check(check: Check, pair: Pair) -> None:
    """Run one check; the global generators come back as they were.

    Raises:
        AssertionError: it does not hold.
        UserError: it does not hold, and a user would read this.
    """
    numpy_state, python_state = np.random.get_state(), random.getstate()
    with torch.random.fork_rng():
        try:
            check(Subject.of(pair))
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)


def parametrize_with_checks(pairs: Sequence[Pair], expected_failures: Mapping[str, str] | None = None) -> Any:
    """Decorate a test `def test_conformance(check): check()` so that it runs for every check of every pair.

    Args:
        pairs: backbones with losses, classes (their `tiny()` is checked) or instances.
        expected_failures: names of checks that fail, with the reason. One that does not fail fails the test.

    Raises:
        UserError: `expected_failures` names no check.
    """
    import pytest

    expected = dict(expected_failures or {})
    names = [name_of(check) for check in CHECKS]
    for name in expected:
        if name not in names:
            raise UserError(f"expected_failures: no check '{name}'{nearest(name, names)}")
    parameters = [
        pytest.param(
            partial(run_check, check, pair),
            id=f"{spoken(pair, '-')}-{name}",
            marks=[pytest.mark.xfail(reason=expected[name], strict=True)] if name in expected else [],
        )
        for pair in pairs
        for name, check in zip(names, CHECKS, strict=True)
    ]
    return pytest.mark.parametrize("check", parameters)


def spoken(pair: Pair, between: str = " + ") -> str:
    """The names of a backbone and a loss."""
    return between.join(part.__name__ if inspect.isclass(part) else type(part).__name__ for part in pair)


@dataclass(frozen=True)
class Verdict:
    """What came of one check.

    Attributes:
        pair: names of the backbone and the loss.
        check: name of the check.
        meaning: what it looks at.
        error: why it does not hold; None when it does.
    """

    pair: str
    check: str
    meaning: str
    error: str | None


def check_plugin(name: str) -> Iterator[Verdict]:
    """Check an installed plugin, one verdict after the other.

    Every backbone of the plugin is paired with every loss of the plugin that runs on its tiny network; with those of
    the other plugins when none of its own does, or when it brings none. A plugin with losses alone is paired with
    the backbones of the others in the same way.

    Args:
        name: of its entry point, or the path of a plugin that is one Python file, which is loaded.

    Raises:
        UserError: there is no such plugin, it could not be loaded, or nothing that it brings can be paired.
    """
    for pair in pairs_of(load_plugin(name).name if name.endswith(".py") else name, registry()):
        for check in CHECKS:
            error = None
            try:
                run_check(check, pair)
            except Exception as e:  # whatever a stranger's class raises is its verdict
                lines = str(e).strip().splitlines() or [""]
                error = lines[0] if isinstance(e, (AssertionError, UserError)) else f"{type(e).__name__}: {lines[0]}"
            yield Verdict(spoken(pair), name_of(check), " ".join((check.__doc__ or "").split()), error)


def pairs_of(name: str, found: Registry) -> list[Pair]:
    """The pairs in which a plugin is checked; see `check_plugin`."""
    plugins = {plugin.name: plugin for plugin in found.plugins}
    if name not in plugins:
        raise UserError(f"no plugin '{name}' is installed{nearest(name, plugins)}")
    if plugins[name].error:
        raise UserError(f"plugin '{name}' could not be loaded: {plugins[name].error}")
    own = {kind: [found.classes[kind][n] for k, n in plugins[name].brings if k == kind] for kind in found.classes}
    everything = {kind: list(classes.values()) for kind, classes in found.classes.items()}
    if not own["backbone"] and not own["loss"]:
        raise UserError(f"plugin '{name}' brings neither a backbone nor a loss; there is nothing to check")
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


def _fitting(backbones: Sequence[type[Backbone]], losses: Sequence[type[LossAdapter]]) -> list[Pair]:
    return [(backbone, loss) for backbone in backbones for loss in losses if _misfit((backbone, loss)) is None]


def _misfit(pair: Pair) -> str | None:
    """Why a loss cannot run a network, None when it can."""
    try:
        subject = Subject.of(pair)
        with torch.no_grad():
            subject.loss.predict(subject.backbone.build(), subject.inputs())
    except Exception as e:
        return f"{spoken(pair)}: {type(e).__name__}: {e}"
    return None
