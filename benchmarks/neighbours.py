"""Which masks to try after the first of a race: neighbours that a surrogate predicts, or those with frequent blocks.

    python benchmarks/neighbours.py TEACHER KEEP

TEACHER is what `race.py` takes. Every mask that keeps KEEP blocks is recovered by ten steps, as in the first round of a
race, and by 100 (`masks_KEEP.json`, as `race.py` leaves it). Then first rounds are replayed: six masks, drawn at random
or from the quarter that loses least at once, and some more. What counts is the best 100-step loss of the third that
goes on.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from statistics import mean

import torch
from race import file_of, task_of, trainer_of, truth

import tinyfusion_core as tiny
from tinyfusion_core.selection.criteria.calibration import Calibration
from tinyfusion_core.selection.judging.recoveries import ShortRecoveries
from tinyfusion_core.selection.judging.surrogate import predicted

Mask = tuple[int, ...]
REPLAYS = 40


def surrogate(known: dict[Mask, float], near: Sequence[Mask], num_blocks: int) -> list[float]:
    return predicted(known, near, num_blocks).tolist()


def votes(known: dict[Mask, float], near: Sequence[Mask], num_blocks: int) -> list[float]:
    """How rarely the blocks of a mask are kept among the known ones."""
    return [-sum(sum(block in other for other in known) for block in mask) for mask in near]


def goes_on(known: dict[Mask, float]) -> list[Mask]:
    return sorted(known, key=known.__getitem__)[: max(2, -(-len(known) // 3))]


def replay(
    losses: dict[Mask, float], first: Sequence[Mask], more: int, order: Callable[..., list[float]], num_blocks: int
) -> list[Mask]:
    known, left, at_once = {mask: losses[mask] for mask in first}, more, max(2, -(-more // 4))
    while left:
        best = goes_on(known) if order is surrogate else goes_on(known)[:1]
        near = [m for m in losses if m not in known and any(len({*m} - {*of}) == 1 for of in best)]
        ranks = order(known, near, num_blocks)
        new = [near[i] for i in sorted(range(len(near)), key=ranks.__getitem__)[: min(at_once, left)]]
        if not new:
            break
        known |= {mask: losses[mask] for mask in new}
        left -= len(new)
    return goes_on(known)


def main() -> None:
    teacher, keep = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    task, trainer = task_of(teacher), trainer_of(0)
    num_blocks = len(task.blocks)
    masks = list(combinations(range(num_blocks), keep))
    recovered, short = truth(task, masks, file_of(teacher, keep)), file_of(teacher, keep, "short")
    if not short.exists():
        by_ten = tiny.Race(keep=keep, updates_per_batch=1).recovering(trainer)
        recoveries = ShortRecoveries(task, trainer, None, by_ten, 512, 10 * len(masks))
        found = recoveries.losses(masks, "race 1", 10)
        gates = torch.stack([torch.zeros(num_blocks).index_fill(0, torch.tensor(mask), 1) for mask in masks])
        pruned = Calibration(task, trainer.quiet(), 512, 64, "race").losses(gates)
        rows = [[list(m), float(found[m].mean()), float(p)] for m, p in zip(masks, pruned, strict=True)]
        short.write_text(json.dumps(rows))
    rows = json.loads(short.read_text())
    losses = {tuple(mask): loss for mask, loss, _ in rows}
    at_once = [tuple(mask) for mask, _, _ in sorted(rows, key=lambda row: row[2])]
    best = min(recovered[mask] for mask in masks)
    print("| six first | then | 4 more | 8 more | 12 more |\n|---|---|---|---|---|")
    for which, pool in (("any", at_once), ("that lose least at once", at_once[: max(8, len(masks) // 4)])):
        for order in (votes, surrogate):
            behind = []
            for more in (4, 8, 12):
                draws = [random.Random(seed).sample(pool, 6) for seed in range(REPLAYS)]
                on = [replay(losses, first, more, order, num_blocks) for first in draws]
                behind.append(mean(min(recovered[mask] for mask in kept) - best for kept in on))
            print(f"| {which} | {order.__name__} | {' | '.join(f'{value:.4f}' for value in behind)} |")


if __name__ == "__main__":
    main()
