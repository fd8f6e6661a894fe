"""Which selector finds the mask that recovers best, of all masks of a small teacher.

    python benchmarks/race.py TEACHER KEEP [SEEDS [RECOVERIES]]

TEACHER is a folder as `tinyfusion run recipes/teacher_digits.yaml` leaves it, or a recipe. Every mask that keeps KEEP
blocks is recovered by 100 steps and judged on held-out samples; of more than 300 masks 60 random ones are, and those
that are chosen. The losses are kept in `TEACHER/../masks_KEEP.json`, or in `runs/masks_RECIPE_KEEP.json`. Then every
selector decides with every seed, and its choice is looked up. Where two recoveries of one mask differ by much, the mean
of several counts: RECOVERIES of them, each with another seed and a file of its own.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from statistics import mean

import torch

import tinyfusion_core as tiny
from tinyfusion_core.runtime.progress import track
from tinyfusion_dit import DiT, GaussianDiffusion
from tinyfusion_images import Digits

RECOVERY = tiny.Recover(steps=100, lr=1e-3, lr_final=1e-5, ema=0.0)


def task_of(teacher: Path | str) -> tiny.Task:
    """The task of a teacher's folder, of a shipped one by its name, or of a recipe."""
    if str(teacher).endswith(".yaml"):
        made = tiny.load_recipe(teacher)
        samples = {"train": made.data.train(), "held_out": made.data.held_out()}
        return tiny.Task(backbone=made.backbone, loss=made.loss, data=made.data, **samples)
    data = Digits()
    loss = GaussianDiffusion(learn_sigma=False, sampler="ddim", sampling_steps=25, guided_channels=None)
    backbone = DiT(checkpoint=str(teacher))
    return tiny.Task(backbone=backbone, loss=loss, train=data.train(), held_out=data.held_out(), data=data)


def file_of(teacher: Path, keep: int, what: str = "masks") -> Path:
    """Where the losses of recovered masks are kept."""
    if teacher.suffix != ".yaml":
        return teacher.parent / f"{what}_{keep}.json"
    Path("runs").mkdir(exist_ok=True)
    return Path("runs") / f"{what}_{teacher.stem}_{keep}.json"


def trainer_of(seed: int) -> tiny.Trainer:
    return tiny.Trainer(batch_size=64, precision="fp32", seed=seed, log_every=1000)


def recovered(task: tiny.Task, kept: tuple[int, ...], seed: int = 0) -> float:
    trainer, decision = trainer_of(seed), tiny.Decision(blocks=tuple(task.blocks), kept=kept, method="any")
    student = RECOVERY(task, tiny.prune(task, decision), decision, trainer)
    (loss,) = tiny.HeldOutLoss(draws=4)(task, {"student": student}, trainer)
    found = loss.values["student"]
    assert found is not None
    return found


def truth(task: tiny.Task, masks: Sequence[tuple[int, ...]], path: Path, seed: int = 0) -> dict[tuple[int, ...], float]:
    """The recovered losses of masks, and of those that the file has, which are not computed again."""
    known: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
    with track("masks", len(masks), done=len(known)) as progress:
        for kept in masks:
            key = " ".join(map(str, kept))
            if key not in known:
                known[key] = recovered(task, kept, seed)
                path.write_text(json.dumps(known))
                progress.advance()
    return {tuple(map(int, key.split())): loss for key, loss in known.items()}


def mean_truth(
    task: tiny.Task, masks: Sequence[tuple[int, ...]], files: Sequence[Path]
) -> dict[tuple[int, ...], float]:
    """The recovered losses of masks, each the mean of as many recoveries as there are files."""
    every = [truth(task, masks, path, seed) for seed, path in enumerate(files)]
    return {mask: mean(losses[mask] for losses in every) for mask in every[0] if all(mask in one for one in every)}


def selectors(keep: int) -> dict[str, tiny.Selector]:
    search = tiny.Search(keep=keep, steps=300, batch_size=16)
    criteria = [kind(keep=keep) for kind in (tiny.Greedy, tiny.LeaveOneOut, tiny.Taylor, tiny.BlockInfluence)]
    half = tiny.Search(keep=keep, steps=150, batch_size=16)
    half_cotrained = tiny.CoTrained(keep=keep, steps=150, batch_size=16)
    return {
        "score function, 300 steps": search,
        "race, 300 steps": tiny.Race(keep=keep, steps=300, proposers=[half, *criteria]),
        "race, 600 steps": tiny.Race(keep=keep, steps=600, proposers=[search, *criteria]),
        "co-trained, 300 steps": tiny.CoTrained(keep=keep, steps=300, batch_size=16),
        "race, 300 steps, co-trained": tiny.Race(keep=keep, steps=300, proposers=[half_cotrained, *criteria]),
        "greedy": criteria[0],
        "leave one out": criteria[1],
        "Taylor": criteria[2],
        "block influence": criteria[3],
    }


def main() -> None:
    teacher, keep = Path(sys.argv[1]), int(sys.argv[2])
    given = dict(enumerate(sys.argv))
    seeds, recoveries = int(given.get(3, 3)), int(given.get(4, 1))
    torch.set_num_threads(1)
    task = task_of(teacher)
    files = [file_of(teacher, keep, f"seed{seed}_masks" if seed else "masks") for seed in range(recoveries)]
    masks = list(combinations(range(len(task.blocks)), keep))
    whole = len(masks) <= 300
    mean_truth(task, masks if whole else random.Random(0).sample(masks, 60), files)
    found: dict[str, tuple[list[tiny.Decision], float]] = {}
    for name, selector in selectors(keep).items():
        began, decisions = time.process_time(), [selector(task, trainer_of(seed)) for seed in range(seeds)]
        found[name] = decisions, (time.process_time() - began) / seeds
        losses = mean_truth(task, list(dict.fromkeys(d.kept for d in decisions)), files)
    order = sorted(losses, key=losses.__getitem__)
    print(f"{len(order)} of {len(masks)} masks of {len(task.blocks)} → {keep}; best {order[0]}: {losses[order[0]]:.4f}")
    print("| selector | ranks | mean loss behind the best | seconds | rows |\n|---|---|---|---|---|")
    for name, (decisions, seconds) in found.items():
        ranks = ", ".join(str(1 + order.index(d.kept)) for d in decisions)
        behind = mean(losses[d.kept] for d in decisions) - losses[order[0]]
        rows = mean(d.provenance["evaluations"] for d in decisions)
        print(f"| {name} | {ranks} | {behind:.4f} | {seconds:.0f} | {rows:,.0f} |")


if __name__ == "__main__":
    main()
