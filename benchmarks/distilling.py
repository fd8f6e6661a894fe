"""What the terms of a distillation are worth: the same student, recovered with each.

    python benchmarks/distilling.py RECIPE KEPT STEPS [SEEDS]

The student keeps the blocks KEPT (`0,1,3,6`) and is recovered as the recipe says, but by STEPS and with each
distillation.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

import tinyfusion_core as tiny
from tinyfusion_core.pipeline.run import make_task

KINDS: dict[str, tiny.OutputKD | None] = {
    "fine-tuning": None,
    "OutputKD": tiny.OutputKD(),
    "MaskedKD": tiny.MaskedKD(),
    "RelationalKD, beta 1": tiny.RelationalKD(beta=(1.0, 0.0)),
    "AttentionKD, beta 1": tiny.AttentionKD(beta=(1.0, 0.0)),
    "RelationalKD, beta 0.1": tiny.RelationalKD(beta=(0.1, 0.0)),
    "AttentionKD, beta 0.1": tiny.AttentionKD(beta=(0.1, 0.0)),
    "OutputKD, from the teacher to the data": tiny.OutputKD(alpha_kd=(0.9, 0.0), alpha_gt=(0.1, 1.0)),
    "OutputKD, from the data to the teacher": tiny.OutputKD(alpha_kd=(0.0, 0.9), alpha_gt=(1.0, 0.1)),
    "RelationalKD, beta 0.01": tiny.RelationalKD(beta=(0.01, 0.0)),
    "AttentionKD, beta 0.01": tiny.AttentionKD(beta=(0.01, 0.0)),
}


def main() -> None:
    torch.set_num_threads(1)
    recipe = tiny.load_recipe(Path(sys.argv[1]), ["--trainer.progress", "false"])
    kept, steps, seeds = [int(i) for i in sys.argv[2].split(",")], int(sys.argv[3]), int((*sys.argv, "2")[4])
    task = make_task(recipe)
    print("| recovery | held-out loss |\n|---|---|")
    for name, kd in KINDS.items():
        losses = []
        for seed in range(seeds):
            trainer = replace(recipe.trainer, seed=seed, log_every=1000)
            decision = tiny.Keep(kept)(task, trainer)
            how = replace(recipe.recover, steps=steps, ema=None, kd=kd)
            student = how(task, tiny.prune(task, decision), decision, trainer)
            (loss,) = tiny.HeldOutLoss()(task, {"student": student}, recipe.trainer)
            losses.append(f"{loss.values['student']:.4f}")
        print(f"| {name} | {', '.join(losses)} |", flush=True)


if __name__ == "__main__":
    main()
