"""Students that have been started, and not trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from torch import nn

import tinyfusion_core as tiny
from small_run import RECIPE

TRAINER = tiny.Trainer(batch_size=32, precision="fp32", seed=0, progress=False)


def started(task: tiny.Task, kept: list[int], start: tiny.Start, trainer: tiny.Trainer = TRAINER) -> nn.Module:
    decision = tiny.Keep(kept)(task, trainer)
    return tiny.Recover(steps=0, start=start)(task, tiny.prune(task, decision), decision, trainer)


def loss_of(task: tiny.Task, model: nn.Module) -> float:
    (found,) = tiny.HeldOutLoss(draws=1)(task, {"student": model}, TRAINER)
    return float(found.values["student"] or 0)


def recipe_at(folder: Path, **recover: Any) -> Path:
    path = folder / "recipe.yaml"
    search = {"class_path": "Keep", "init_args": {"blocks": [0, 1, 3, 6]}}
    path.write_text(yaml.safe_dump({**RECIPE, "search": search, "recover": recover}))
    return path
