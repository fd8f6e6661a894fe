"""Which optimizer recovers best: the same student, with every optimizer at several rates.

    python benchmarks/optimizers.py RECIPE STEPS RATES [SEEDS]

The recipe's search decides once, with its own seed. The student is then recovered as the recipe says, by STEPS updates
at each of RATES (`3e-4,1e-3`), with AdamW and with Muon, which has the matrices of the blocks (AdamW has the rest).
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

import tinyfusion_core as tiny
from tinyfusion_core.pipeline.run import make_task

MUON = {"class_path": "torch.optim.Muon", "init_args": {"adjust_lr_fn": "match_rms_adamw"}}


def main() -> None:
    torch.set_num_threads(1)
    recipe = tiny.load_recipe(Path(sys.argv[1]), ["--trainer.progress", "false", *sys.argv[5:]])
    steps, rates, seeds = int(sys.argv[2]), [float(rate) for rate in sys.argv[3].split(",")], int((*sys.argv, "2")[4])
    task = make_task(recipe)
    decision = recipe.search(task, recipe.trainer)
    print(f"keeps {' '.join(map(str, decision.kept))}\n")
    print("| optimizer | rate | held-out loss | seconds |\n|---|---|---|---|")
    metric = next((m for m in recipe.evaluate if isinstance(m, tiny.HeldOutLoss)), tiny.HeldOutLoss())
    for name, optimizer in (("AdamW", None), ("Muon", MUON)):
        for rate in rates:
            losses, begun = [], time.perf_counter()
            for seed in range(seeds):
                student = tiny.prune(task, decision)
                how = replace(recipe.recover, steps=steps, ema=None, lr=rate, lr_final=rate / 10, optimizer=optimizer)
                how(task, student, decision, replace(recipe.trainer, seed=seed, log_every=1000))
                (found,) = metric(task, {"student": student}, recipe.trainer)
                losses.append(f"{found.values['student'] or 0:.4f}")
            spent = (time.perf_counter() - begun) / seeds
            print(f"| {name} | {rate:g} | {', '.join(losses)} | {spent:.1f} |", flush=True)


if __name__ == "__main__":
    main()
