"""What `Greedy` keeps of the digits' teacher, 8 -> 4 blocks, by the number of calibration samples and exchanges.

    python benchmarks/greedy.py

Every choice is judged by its calibration loss on the same 512 other samples. Rank: among all 70 masks, by that loss.
"""

from __future__ import annotations

import itertools
import statistics
import time

import torch

import tinyfusion_core as tiny
from tinyfusion_core.protocols.data import Samples
from tinyfusion_core.selection.criteria.calibration import Calibration
from tinyfusion_dit import DiT, GaussianDiffusion
from tinyfusion_images import Digits

KEEP, OTHERS = 4, 512
SAMPLES, SEEDS = (4, 16, 64, 256), (0, 1, 2)


class Rows:
    """Some samples of a data set."""

    def __init__(self, of: Samples, rows: list[int]) -> None:
        self.of, self.rows = of, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        """Return the samples with these indices, each (samples, ...)."""
        return self.of.__getitems__([self.rows[i] for i in indices])


def task_on(rows: slice) -> tiny.Task:
    train = Digits().train()
    loss = GaussianDiffusion(learn_sigma=False, guided_channels=None)
    some = Rows(train, list(range(len(train)))[rows])
    return tiny.Task(backbone=DiT(checkpoint="digits"), loss=loss, train=some, held_out=some)


def main() -> None:
    torch.set_num_threads(1)
    task, others = task_on(slice(OTHERS, None)), task_on(slice(OTHERS))
    masks = list(itertools.combinations(range(8), KEEP))
    rows = torch.tensor([[float(i in kept) for i in range(8)] for kept in masks])
    truth = dict(zip(masks, Calibration(others, tiny.Trainer(precision="fp32"), OTHERS, 64).losses(rows), strict=True))
    order = sorted(masks, key=truth.__getitem__)
    print(f"best {order[0]}: {truth[order[0]]:.4f}\n")
    print("| samples | swaps | kept (seeds) | loss on others | rank | seconds |")
    print("|---|---|---|---|---|---|")
    for samples, swaps in itertools.product(SAMPLES, (0, 4)):
        kept, seconds = [], []
        for seed in SEEDS:
            start = time.perf_counter()
            how = tiny.Greedy(keep=KEEP, samples=samples, swaps=swaps)
            kept.append(how(task, tiny.Trainer(precision="fp32", seed=seed)).kept)
            seconds.append(time.perf_counter() - start)
        found = dict.fromkeys(kept)
        said = ", ".join(f"{' '.join(map(str, k))} x{kept.count(k)}" for k in found)
        ranks = ", ".join(str(order.index(k) + 1) for k in found)
        loss = statistics.fmean(truth[k] for k in kept)
        print(f"| {samples} | {swaps} | {said} | {loss:.4f} | {ranks} | {statistics.median(seconds):.1f} |")


if __name__ == "__main__":
    main()
