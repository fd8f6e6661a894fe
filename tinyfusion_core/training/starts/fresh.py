"""Whether a network that begins with random weights can be trained so."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...errors import UserError

if TYPE_CHECKING:
    from ..recover import Recover

NOT_FRESH = {
    "kd": "has no teacher to learn from; distillation goes with recover",
    "update": "has to learn every weight; leave it out",
    "gap_lr": "has no gaps; leave it out",
    "depths": "has no order in which its blocks would go; leave it out",
    "start": "begins with random weights; leave it out",
}
"""Options for a pruned network, and why another cannot have them."""


def check_fresh(how: Recover) -> None:
    """Check that a fresh network can be trained by these settings.

    Raises:
        UserError: they are for a pruned network.
    """
    for name, why in NOT_FRESH.items():
        if (value := getattr(how, name)) and value != 1:
            raise UserError(f"train.{name}: a fresh network {why}")
    if how.validation is not None and how.validation.relative:
        raise UserError("train.validation.until: a fresh network has no teacher; give a loss")
