"""A comparison that takes a second: a network of which some blocks do the work, and a few steps of recovery."""

from __future__ import annotations

import tinyfusion_core as tiny
import toys
from tinyfusion_core.selection.criteria.positions import FirstN, LastN

TRAINER = tiny.Trainer(precision="fp32", batch_size=8, seed=1)
RECOVER = tiny.Recover(steps=12, lr=1e-3)
LOSS = [tiny.HeldOutLoss(draws=1)]
FIRST_AND_LAST = {"first": FirstN(keep=4), "last": LastN(keep=4)}


def task(loss: tiny.LossAdapter | None = None) -> tiny.Task:
    return tiny.Task(
        backbone=toys.Planted(), loss=loss or toys.Match(), train=toys.planted_data(), held_out=toys.planted_data(16)
    )
