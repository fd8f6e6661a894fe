"""What moves in a recovery: every weight, low-rank updates, the last blocks and the head, norms and biases.

`python benchmarks/moving.py [STEPS]` recovers the quickstart's student (blocks 0, 1, 3 and 6 of the digits DiT) with
each of them, plain and with distillation, at several rates, and prints the best: a table for RESULTS. One thread, fp32.
"""

from __future__ import annotations

import sys
import time

import torch

import tinyfusion_core as tiny
from tinyfusion_dit import DiT, GaussianDiffusion
from tinyfusion_images import Digits

UPDATES: dict[str, tuple[tiny.WeightUpdate | None, tuple[float, ...]]] = {
    "every weight": (None, (1e-3, 3e-3)),
    "LoRA, rank 4": (tiny.LoRA(rank=4), (3e-3, 1e-2)),
    "LoRA, rank 16": (tiny.LoRA(rank=16), (3e-3, 1e-2)),
    "last 2 blocks and head": (tiny.LastBlocks(blocks=2), (1e-3, 3e-3)),
    "head": (tiny.LastBlocks(blocks=0), (3e-3, 1e-2)),
    "biases": (tiny.Matching(".*bias"), (3e-3, 1e-2)),
}


def main(steps: int) -> None:
    torch.set_num_threads(1)
    data, loss = Digits(), GaussianDiffusion(learn_sigma=False)
    task = tiny.Task(
        backbone=DiT(checkpoint="digits"), loss=loss, train=data.train(), held_out=data.held_out(), data=data
    )
    trainer = tiny.Trainer(batch_size=64, seed=0, precision="fp32")
    decision = tiny.Keep([0, 1, 3, 6])(task, trainer)
    metric = tiny.HeldOutLoss()
    print("| what moves | weights | rate | held-out loss, plain | rate | with MaskedKD | s a step of the latter |")
    print("|---" * 7 + "|")
    for name, (update, rates) in UPDATES.items():
        cells, seconds, weights = [], 0.0, 0
        for kd in (None, tiny.MaskedKD()):
            found = []
            for rate in rates:
                student = tiny.prune(task, decision)
                recover = tiny.Recover(steps=steps, lr=rate, lr_final=rate / 10, kd=kd, update=update)
                with (update or tiny.Full()).applied(student, task.backbone.block_paths(student)) as moving:
                    weights = sum(p.numel() for p in moving)
                start = time.perf_counter()
                student = recover(task, student, decision, trainer)
                seconds = (time.perf_counter() - start) / steps
                (measured,) = metric(task, {"student": student}, trainer)
                found.append((measured.values["student"], rate))
            best, rate = min(found)
            cells += [f"{rate:g}", f"{best:.4f}"]
        print(f"| {name} | {weights:,} | {' | '.join(cells)} | {seconds:.3f} |", flush=True)


if __name__ == "__main__":
    main(int((sys.argv[1:] or ["500"])[0]))
