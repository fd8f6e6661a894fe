"""What a start is worth: the same student, recovered from the pruned weights and from refitted ones.

    python benchmarks/starts.py RECIPE STEPS [SEEDS]

The recipe's search decides once, with its own seed. The student is recovered as the recipe says, by every number of
STEPS (`0,100,1000`), from what pruning left and from `Refit`, with as many seeds. 0 steps is the start itself.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

import tinyfusion_core as tiny
from tinyfusion_core.pipeline.run import make_task

STARTS: dict[str, tiny.Start | None] = {"pruned": None, "refitted": tiny.Refit()}


def recovered(
    recipe: tiny.Recipe, task: tiny.Task, decision: tiny.Decision, steps: int, start: tiny.Start | None, seed: int
) -> tuple[float, float]:
    """The held-out loss of a student, and how many seconds it took."""
    trainer = replace(recipe.trainer, seed=seed, log_every=1000)
    student, begun = tiny.prune(task, decision), time.perf_counter()
    if steps or start:
        replace(recipe.recover, steps=steps, ema=None, start=start)(task, student, decision, trainer)
    spent = time.perf_counter() - begun
    metric = next((m for m in recipe.evaluate if isinstance(m, tiny.HeldOutLoss)), tiny.HeldOutLoss())
    (loss,) = metric(task, {"student": trainer.to_device(student)}, recipe.trainer)
    return float(loss.values["student"] or 0), spent


def main() -> None:
    torch.set_num_threads(1)
    recipe = tiny.load_recipe(Path(sys.argv[1]), ["--trainer.progress", "false"])
    steps, seeds = [int(n) for n in sys.argv[2].split(",")], int((*sys.argv, "2")[3])
    task = make_task(recipe)
    decision = recipe.search(task, recipe.trainer)
    print(
        f"keeps {' '.join(map(str, decision.kept))}\n\n| steps | begins | held-out loss | seconds |\n|---|---|---|---|"
    )
    for num in steps:
        for name, start in STARTS.items():
            found = [recovered(recipe, task, decision, num, start, seed) for seed in range(seeds)]
            losses, seconds = ", ".join(f"{loss:.4f}" for loss, _ in found), median(spent for _, spent in found)
            print(f"| {num:,} | {name} | {losses} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
