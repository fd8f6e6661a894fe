"""All checks, by the kind of object that they check.

A check is a function that raises an AssertionError, or the UserError that a user would see. Its docstring says what
holds; `tinyfusion_core.testing` runs it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ...errors import UserError
from ...registry.hooks import KINDS as REGISTERED
from ..subject import Subject
from .distillation import DISTILLATION_CHECKS, DistillationSubject
from .gating import (
    check_all_ones_is_plain,
    check_every_block_learns,
    check_hard_gated_is_pruned,
    check_nobody_keeps_a_block,
    check_sparse_is_dense,
    check_state_dict_untouched,
)
from .objective import (
    check_kept_prediction,
    check_loss_per_sample,
    check_predict_deterministic,
    check_prepare,
    check_same_inputs,
)
from .samplers import SAMPLER_CHECKS, SamplerSubject
from .saving import check_save_and_load, check_taps
from .selectors import SELECTOR_CHECKS, SelectorSubject
from .starts import START_CHECKS, StartSubject
from .structure import (
    check_blocks,
    check_copies,
    check_light_import,
    check_meta_device,
    check_streams,
    check_tiny,
)
from .weight_updates import UPDATE_CHECKS, UpdateSubject

Check = Callable[[Any], None]
"""Takes the subject of its kind."""


def _in_branches_too(check: Callable[[Subject], None]) -> Callable[[Subject], None]:
    """A check that is run for whole blocks, and once more for the branches inside them if the backbone names any."""

    @functools.wraps(check)
    def both(subject: Subject) -> None:
        check(subject)
        if names := tuple(subject.backbone.branches(subject.backbone.build())):
            try:
                check(replace(subject, backbone=replace(subject.backbone, units=names)))
            except (AssertionError, UserError) as e:
                raise type(e)(f"with units {list(names)}: {e}") from e

    return both


CHECKS: tuple[Callable[[Subject], None], ...] = (
    check_tiny,
    _in_branches_too(check_blocks),
    _in_branches_too(check_streams),
    _in_branches_too(check_all_ones_is_plain),
    _in_branches_too(check_hard_gated_is_pruned),
    _in_branches_too(check_state_dict_untouched),
    _in_branches_too(check_nobody_keeps_a_block),
    _in_branches_too(check_every_block_learns),
    _in_branches_too(check_sparse_is_dense),
    check_loss_per_sample,
    check_kept_prediction,
    check_prepare,
    check_same_inputs,
    check_predict_deterministic,
    _in_branches_too(check_save_and_load),
    _in_branches_too(check_meta_device),
    _in_branches_too(check_taps),
    check_light_import,
    check_copies,
)
"""Checks of a backbone with a loss."""


@dataclass(frozen=True)
class Kind:
    """How one kind of object is checked.

    Attributes:
        subject: makes the subject of the checks from a class or an instance.
        checks: the checks, in order.
    """

    subject: Callable[[Any], Any]
    checks: tuple[Check, ...]


PAIR = Kind(Subject.of, CHECKS)

KINDS = {
    "selector": Kind(SelectorSubject.of, SELECTOR_CHECKS),
    "sampler": Kind(SamplerSubject.of, SAMPLER_CHECKS),
    "weight_update": Kind(UpdateSubject.of, UPDATE_CHECKS),
    "distillation": Kind(DistillationSubject.of, DISTILLATION_CHECKS),
    "start": Kind(StartSubject.of, START_CHECKS),
}
"""Kinds that are checked on their own, by their name in the registry."""


def kind_of(thing: Any) -> Kind:
    """Return how a pair of backbone and loss is checked, or a class or instance of another kind.

    Raises:
        UserError: there are no checks for such an object.
    """
    if isinstance(thing, tuple):
        return PAIR
    cls = thing if inspect.isclass(thing) else type(thing)
    for name, kind in KINDS.items():
        if issubclass(cls, REGISTERED[name].base_class()):
            return kind
    kinds = ", ".join(KINDS).replace("_", " ")
    raise UserError(
        f"{cls.__name__} cannot be checked: it is no {kinds}; give a backbone with its loss: (MyBackbone, MyLoss)"
    )
