"""Whether a short recovery ranks masks better by more and smaller updates of the same samples.

    python benchmarks/updates.py TEACHER KEEP [BATCHES]

TEACHER is what `race.py` takes, whose file of masks recovered by 100 steps has to be there. Each of these masks is
recovered by BATCHES batches of 64 (10 unless said), as in the first round of a race, divided into 1, 2, 4 and 8 updates
each. Printed are Spearman's rank correlations of both losses, of all masks and of the quarter that recovers best.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from race import file_of, task_of, trainer_of
from scipy.stats import spearmanr

import tinyfusion_core as tiny
from tinyfusion_core.selection.judging.recoveries import ShortRecoveries


def main() -> None:
    teacher, keep, batches = Path(sys.argv[1]), int(sys.argv[2]), int((*sys.argv, "10")[3])
    torch.set_num_threads(1)
    task, trainer = task_of(teacher), trainer_of(0)
    recovered = {
        tuple(map(int, key.split())): loss for key, loss in json.loads(file_of(teacher, keep).read_text()).items()
    }
    masks = sorted(recovered, key=recovered.__getitem__)
    best = masks[: len(masks) // 4]
    print(f"{len(masks)} masks that keep {keep} of {len(task.blocks)}, {batches} batches of {trainer.batch_size} each")
    print("| updates | samples each | rho | rho of the best quarter | best of the first three: behind | s |")
    print("|---|---|---|---|---|---|")
    for parts in (1, 2, 4, 8):
        recovering, started = tiny.Race(keep=keep, updates_per_batch=parts).recovering(trainer), time.process_time()
        found = ShortRecoveries(task, trainer, None, recovering, 512, batches * len(masks)).losses(
            masks, "race 1", batches
        )
        seconds, losses = time.process_time() - started, {mask: float(found[mask].mean()) for mask in masks}
        rho, of_best = (
            spearmanr([recovered[m] for m in some], [losses[m] for m in some]).statistic for some in (masks, best)
        )
        behind = min(recovered[m] for m in sorted(masks, key=losses.__getitem__)[:3]) - recovered[masks[0]]
        how = recovering(batches)
        print(
            f"| {how.steps} | {how.batch_size} | {rho:.2f} | {of_best:.2f} | {behind:.4f} | {seconds:.0f} |", flush=True
        )


if __name__ == "__main__":
    main()
