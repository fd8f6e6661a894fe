"""Whole blocks against branches of them, at the same cost.

    python benchmarks/units.py RECIPE BUDGET [SEEDS]

RECIPE is a recipe with a search, a recovery and a backbone that names its branches; BUDGET is what the network may
cost, as a recipe writes it, such as `{flops: 0.5x}`. Its search decides with every seed, once among blocks and once
among branches; each student is recovered as the recipe says, with the same seed.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

import torch
import yaml

import tinyfusion_core as tiny
from tinyfusion_core.evaluation.metrics import Size
from tinyfusion_core.protocols.blocks.paths import word_for

UNITS = {"blocks": [], "branches": ["attention", "mlp"]}


def student_of(recipe: tiny.Recipe, seed: int) -> tuple[tiny.Decision, list[float]]:
    """A decision, and FLOPs, parameters and the held-out loss before and after the recovery."""
    samples = {"train": recipe.data.train(), "held_out": recipe.data.held_out()}
    task = tiny.Task(backbone=recipe.backbone, loss=recipe.loss, data=recipe.data, **samples)
    trainer = replace(recipe.trainer, seed=seed, log_every=1000)
    decision = recipe.search(task, trainer)
    student = tiny.prune(task, decision)
    loss = tiny.HeldOutLoss(draws=4)
    (before,) = loss(task, {"student": student}, trainer)
    recipe.recover(task, student, decision, trainer)
    (after,) = loss(task, {"student": student}, trainer)
    _, parameters, flops = Size()(task, {"student": student}, trainer)
    return decision, [float(m.values["student"] or 0) for m in (flops, parameters, before, after)]


def main() -> None:
    path, budget, seeds = Path(sys.argv[1]), yaml.safe_load(sys.argv[2]), int((*sys.argv, "2")[3])
    torch.set_num_threads(1)
    print("| what goes | seed | kept | FLOPs | parameters | loss, pruned | recovered |\n|---|---|---|---|---|---|---|")
    summary = []
    for units in UNITS.values():
        found = []
        for seed in range(seeds):
            flags = ["--backbone.units", str(units), "--search.keep", "null", "--search.budget", str(budget)]
            decision, numbers = student_of(tiny.load_recipe(path, flags), seed)
            found.append(numbers[-1])
            what, kept = word_for(decision.blocks), " ".join(decision.blocks[i] for i in decision.kept)
            cells = [f"{n:,.0f}" for n in numbers[:2]] + [f"{n:.4f}" for n in numbers[2:]]
            print(f"| {what} | {seed} | {kept} | {' | '.join(cells)} |", flush=True)
        summary.append(f"{what}: {mean(found):.4f}" + (f" ± {stdev(found):.4f}" if len(found) > 1 else ""))
    print(f"\nrecovered loss, {budget}: {'; '.join(summary)}")


if __name__ == "__main__":
    main()
