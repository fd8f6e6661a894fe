"""Callbacks that keep what they see, and what two processes do with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import tinyfusion_core as tiny
from interrupted import TRAINER, recovered


@dataclass
class Seen(tiny.Callback):
    """Keeps what it sees, and asks for the end at a step of one of the methods."""

    end: tuple[str, int] = ("", 0)
    steps: list[tiny.Moment] = field(default_factory=list)
    logged: list[dict[str, Any]] = field(default_factory=list)
    saved: list[int] = field(default_factory=list)

    def on_step(self, at: tiny.Moment) -> bool:
        self.steps.append(at)
        return self.end == ("on_step", at.step)

    def on_log(self, at: tiny.Moment, values: Mapping[str, Any]) -> bool:
        self.logged.append({"stage": at.stage, "step": at.step, **values})
        return self.end == ("on_log", at.step)

    def on_checkpoint(self, at: tiny.Moment, path: Path) -> bool:
        assert torch.load(path, weights_only=True)["step"] == at.step
        self.saved.append(at.step)
        return self.end == ("on_checkpoint", at.step)


def told(*callbacks: tiny.Callback) -> tiny.Trainer:
    return replace(TRAINER, callbacks=callbacks)


def end_from_the_second(folder: Path) -> int:
    """One of two processes asks for the end."""
    here = TRAINER.accelerator.process_index
    seen = Seen(end=("on_step", 5) if here == 1 else ("", 0))
    recovered(tiny.RunFolder(folder / "run"), told(seen))
    (folder / f"{here}.txt").write_text(f"{len(seen.steps)} {seen.steps[-1].main} {seen.saved} {len(seen.logged)}")
    return 0
