"""A recovery that takes a second, to be interrupted, damaged and gone on with."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import get_worker_info

import tinyfusion_core as tiny
import tinyfusion_core.evaluation.metrics
import tinyfusion_core.pipeline.run
import tinyfusion_core.selection.criteria.calibration
from tinyfusion_core.errors import Interrupted
from tinyfusion_core.protocols.data import Tensors
from tinyfusion_core.pruning.removal import remove_blocks
from tinyfusion_core.runtime.seeding import seed_of
from toys import Match, Planted, StopAt, planted_data

TRAINER = tiny.Trainer(batch_size=16, precision="fp32", seed=0, checkpoint_every=4, log_every=3)


RECOVER = tiny.Recover(steps=20, lr=1e-2)


def task(loss: tiny.LossAdapter | None = None, train: Any = None) -> tiny.Task:
    return tiny.Task(backbone=Planted(), loss=loss or Match(), train=train or planted_data(), held_out=planted_data(16))


def recovered(
    run: tiny.RunFolder | None = None, trainer: tiny.Trainer = TRAINER, recover: tiny.Recover = RECOVER, **given: Any
) -> dict[str, torch.Tensor]:
    model = Planted().build()
    remove_blocks(Planted(), model, [f"blocks.{i}" for i in (0, 2, 5, 6, 7)])
    return recover(task(**given), model, None, trainer, run).state_dict()


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(value, b[name]) for name, value in a.items())


def lines(run: tiny.RunFolder) -> list[dict[str, Any]]:
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in run.metrics()]


def stopped(folder: Path, **trainer: Any) -> tiny.RunFolder:
    """A run folder with the checkpoints of a recovery that was stopped after its twelfth step."""
    run = tiny.RunFolder(folder)
    with pytest.raises(Interrupted, match="stopped at step 12 of 20 of recover"):
        recovered(run, replace(TRAINER, **trainer), loss=StopAt())
    return run


class Stopping(tiny.Callback):
    """Stops a training after its eleventh step."""

    def on_step(self, moment: Any) -> None:
        if moment.step == 11:
            raise KeyboardInterrupt


@dataclass(frozen=True)
class Torn:
    """Samples of which some are damaged."""

    data: Tensors
    bad: frozenset[int]
    signal_to_reader: int = 0

    def __len__(self) -> int:
        return len(self.data)

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        if self.signal_to_reader and get_worker_info() is not None:
            os.kill(os.getpid(), self.signal_to_reader)
        if self.bad.intersection(indices):
            raise OSError("image file is truncated")
        return self.data.__getitems__(indices)


BAD = frozenset({5, 9})


def substituted() -> Tensors:
    x = planted_data().columns["x"].clone()
    for index in BAD:
        x[index] = planted_data().columns["x"][seed_of("in the place of", index, 0) % len(x)]
    return Tensors({"x": x})
