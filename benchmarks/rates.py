"""Learning rates of a recovery: warm-up, and larger ones beside the gaps.

`python benchmarks/rates.py [STEPS]` recovers the digits DiT at 8 to 4 and 8 to 2 blocks and prints held-out losses of
two seeds: a table for RESULTS. One thread, fp32.
"""

from __future__ import annotations

import itertools
import sys

import torch

import tinyfusion_core as tiny
from tinyfusion_dit import DiT, GaussianDiffusion
from tinyfusion_images import Digits


def main(steps: int) -> None:
    torch.set_num_threads(1)
    data, loss = Digits(), GaussianDiffusion(learn_sigma=False)
    task = tiny.Task(
        backbone=DiT(checkpoint="digits"), loss=loss, train=data.train(), held_out=data.held_out(), data=data
    )
    print("| kept | rate | warm-up | beside gaps | held-out loss, seeds 0, 1 |\n|" + "---|" * 5)
    for kept, lr, warmup, gap_lr in itertools.product(
        [(0, 1, 3, 6), (1, 6)], [1e-3, 3e-3], [0.0, 0.1], [1.0, 2.0, 4.0]
    ):
        losses = []
        for seed in (0, 1):
            trainer = tiny.Trainer(batch_size=64, seed=seed, precision="fp32")
            decision = tiny.Keep(list(kept))(task, trainer)
            recover = tiny.Recover(steps=steps, lr=lr, lr_final=lr / 10, warmup=warmup, gap_lr=gap_lr)
            student = recover(task, tiny.prune(task, decision), decision, trainer)
            (measured,) = tiny.HeldOutLoss()(task, {"student": student}, trainer)
            losses.append(measured.values["student"])
        told = ", ".join(f"{x:.4f}" for x in losses)
        print(f"| {' '.join(map(str, kept))} | {lr:g} | {warmup:g} | {gap_lr:g}x | {told} |", flush=True)


if __name__ == "__main__":
    main(int((sys.argv[1:] or ["300"])[0]))
