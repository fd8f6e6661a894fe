"""What a start is worth: the same student, recovered from the pruned weights and from those that starts make of them.

    python benchmarks/starts.py RECIPE STEPS [SEEDS] [STARTS] [--KEY VALUE ...]
    python benchmarks/starts.py ranks RECIPE KEEP

The recipe's search decides once, with its own seed. The student is recovered as the recipe says, by every number of
STEPS (`0,100,1000`), from what pruning left and from what starts make of it (`pruned,Refit,Fuse`), with as many seeds.
0 steps is the start itself. `Inherit` begins with what that search has trained. Keys of the recipe may be set.

`ranks` asks how well a short recovery tells which masks recover, from either start: of all masks of KEEP blocks, or of
70 random ones, the losses after 0 and 10 steps are compared with those after 200.
"""

from __future__ import annotations

import random
import shutil
import sys
import time
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch

import tinyfusion_core as tiny
from tinyfusion_core.comparison.statistics import spearman
from tinyfusion_core.pipeline.tasks import make_task
from tinyfusion_core.runtime.stages import UPDATE


def starts(names: str) -> dict[str, tiny.Start | None]:
    """Starts by their names, with commas between them; `pruned` is none."""
    return {name: None if name == "pruned" else getattr(tiny, name)() for name in names.split(",")}


def recovered(
    recipe: tiny.Recipe,
    task: tiny.Task,
    decision: tiny.Decision,
    steps: int,
    start: tiny.Start | None,
    seed: int,
    searched: Path | None = None,
) -> tuple[float, float]:
    """The held-out loss of a student, and how many seconds it took; `searched` is the folder of its search."""
    trainer = replace(recipe.trainer, seed=seed, log_every=1000)
    student, begun = tiny.prune(task, decision), time.perf_counter()
    with TemporaryDirectory() as place:  # one for each: a recovery goes on with what is there
        if searched is not None:
            shutil.copy(searched / UPDATE, place)
        if steps or start:
            how = replace(recipe.recover, steps=steps, ema=None, start=start)
            how(task, student, decision, trainer, tiny.RunFolder(place) if searched else None)
    spent = time.perf_counter() - begun
    metric = next((m for m in recipe.evaluate if isinstance(m, tiny.HeldOutLoss)), tiny.HeldOutLoss())
    (loss,) = metric(task, {"student": trainer.to_device(student)}, recipe.trainer)
    return float(loss.values["student"] or 0), spent


def print_ranks(recipe: tiny.Recipe, task: tiny.Task, keep: int) -> None:
    """Spearman's correlation of each short recovery with the long one, and where its best mask stands there."""
    masks = list(combinations(range(len(task.blocks)), keep))
    masks = random.Random(0).sample(masks, min(len(masks), 70))
    short = replace(recipe, recover=tiny.Recover(batch_size=32, lr=1e-3, lr_final=1e-5))

    def losses(steps: int, start: tiny.Start | None) -> list[float]:
        decisions = (tiny.Decision(blocks=tuple(task.blocks), kept=mask, method="Keep") for mask in masks)
        return [recovered(short, task, decision, steps, start, 0)[0] for decision in decisions]

    long = losses(200, None)
    print(f"{len(masks)} masks\n\n| steps | begins | correlation | rank of its best |\n|---|---|---|---|")
    for steps, (name, start) in product((0, 10), starts("pruned,Refit").items()):
        found = losses(steps, start)
        rank = sorted(long).index(long[found.index(min(found))]) + 1
        print(f"| {steps} | {name} | {spearman(found, long):.2f} | {rank} |", flush=True)


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1] == "ranks":
        recipe = tiny.load_recipe(Path(sys.argv[2]), ["--trainer.progress", "false"])
        print_ranks(recipe, make_task(recipe), int(sys.argv[3]))
        return
    ours = next((i for i, flag in enumerate(sys.argv) if flag.startswith("--")), len(sys.argv))
    recipe = tiny.load_recipe(Path(sys.argv[1]), ["--trainer.progress", "false", *sys.argv[ours:]])
    steps, seeds, names = [*sys.argv[2:ours], *("2", "pruned,Refit,Fuse")[ours - 3 :]]
    search = replace(recipe.search, keep_update=True) if "Inherit" in names.split(",") else recipe.search
    task, folder = make_task(recipe), TemporaryDirectory()
    decision = search(task, recipe.trainer, tiny.RunFolder(folder.name))
    print(
        f"keeps {' '.join(map(str, decision.kept))}\n\n| steps | begins | held-out loss | seconds |\n|---|---|---|---|"
    )
    for num in map(int, steps.split(",")):
        for name, start in starts(names).items():
            searched = Path(folder.name) if isinstance(start, tiny.Inherit) else None
            found = [recovered(recipe, task, decision, num, start, seed, searched) for seed in range(int(seeds))]
            losses, seconds = ", ".join(f"{loss:.4f}" for loss, _ in found), median(spent for _, spent in found)
            print(f"| {num:,} | {name} | {losses} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
