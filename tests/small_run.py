"""A run that takes seconds: the shipped teacher, a handful of steps."""

from __future__ import annotations

from pathlib import Path

import tinyfusion_core as tiny
from tinyfusion_core.cli import main
from tinyfusion_dit import DiT, GaussianDiffusion
from tinyfusion_images import Digits

SHIPPED = Path(__file__).parent.parent / "plugins" / "tinyfusion_dit" / "checkpoints" / "digits"
RECIPE = {
    "backbone": {"class_path": "DiT", "init_args": {"checkpoint": "digits"}},
    "loss": {
        "class_path": "GaussianDiffusion",
        "init_args": {"learn_sigma": False, "sampler": "ddim", "sampling_steps": 4, "guided_channels": None},
    },
    "data": "Digits",
    "trainer": {"precision": "fp32", "batch_size": 8, "seed": 3, "log_every": 4, "checkpoint_every": 6},
    "search": {"pattern": [2, 4], "steps": 12, "lr_gates": 1e-2},
    "recover": {"steps": 12},
    "evaluate": [{"class_path": "HeldOutLoss", "init_args": {"draws": 1}}],
}


def run(recipe: Path, run_dir: Path, *flags: str) -> int:
    return main(["run", str(recipe), "--run-dir", str(run_dir), *flags])


def digits_task(sampling_steps: int = 3) -> tiny.Task:
    """The shipped teacher and its data."""
    data = Digits()
    loss = GaussianDiffusion(learn_sigma=False, sampler="ddim", sampling_steps=sampling_steps, guided_channels=None)
    return tiny.Task(
        backbone=DiT(checkpoint="digits"),
        loss=loss,
        train=data.train(),
        held_out=data.held_out(),
        feature_space=data.feature_space(),
        data=data,
    )
