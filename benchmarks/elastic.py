"""One student of several depths against a student of each depth, at equal total steps.

    python benchmarks/elastic.py [STEPS] [SEEDS]

On the shipped digits teacher of 8 blocks. A search decides once with every seed; its ranking says which blocks the
students of 6, 4, 3 and 2 keep, each some of the next. One recovery of STEPS trains all of them (`recover.depths`);
beside it each is recovered alone, by a quarter of STEPS, and by all of them.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from statistics import mean

import torch

import tinyfusion_core as tiny
from tinyfusion_core.pipeline.slices import shallower
from tinyfusion_dit import DiT, GaussianDiffusion
from tinyfusion_images import Digits

DEPTHS = (6, 4, 3, 2)


def recovery(steps: int, depths: tuple[int, ...] = ()) -> tiny.Recover:
    return tiny.Recover(steps=steps, lr=1e-3, lr_final=1e-5, kd=tiny.OutputKD(), depths=depths)


def losses_of(task: tiny.Task, trainer: tiny.Trainer, steps: int) -> dict[str, dict[int, float]]:
    """The held-out loss of every depth, by how it was recovered."""
    found = tiny.Search(keep=DEPTHS[0], steps=300, batch_size=16)(task, trainer)
    inside = {depth: [found.kept[i] for i in found.inside(depth)] for depth in DEPTHS}
    print(f"seed {trainer.seed}: {inside}", flush=True)

    def decided(depth: int) -> tiny.Decision:
        return replace(found, kept=tuple(inside[depth]))

    def loss(model: torch.nn.Module) -> float:
        (measured,) = tiny.HeldOutLoss(draws=4)(task, {"student": model}, trainer)
        return float(measured.values["student"] or 0)

    began, student = time.process_time(), tiny.prune(task, found)
    recovery(steps, DEPTHS[1:])(task, student, found, trainer)
    print(f"one student: {time.process_time() - began:.0f} s", flush=True)
    several = shallower(task, student, found, DEPTHS[1:])
    named = dict(zip(sorted(DEPTHS[1:]), several.values(), strict=True)) | {DEPTHS[0]: student}
    losses = {"one student, all steps": {depth: loss(named[depth]) for depth in DEPTHS}}
    for name, share in {"alone, a quarter of the steps": steps // len(DEPTHS), "alone, all steps": steps}.items():
        began, losses[name] = time.process_time(), {}
        for depth in DEPTHS:
            student = tiny.prune(task, decided(depth))
            recovery(share)(task, student, decided(depth), trainer)
            losses[name][depth] = loss(student)
        print(f"{name}: {time.process_time() - began:.0f} s", flush=True)
    return losses


def main() -> None:
    steps, seeds = (int(n) for n in (*sys.argv[1:], *("1000", "2")[len(sys.argv) - 1 :]))
    torch.set_num_threads(1)
    data = Digits()
    loss = GaussianDiffusion(learn_sigma=False, sampler="ddim", sampling_steps=25, guided_channels=None)
    samples = {"train": data.train(), "held_out": data.held_out()}
    task = tiny.Task(backbone=DiT(checkpoint="digits"), loss=loss, data=data, **samples)
    trainers = [tiny.Trainer(batch_size=64, precision="fp32", seed=seed, log_every=1000) for seed in range(seeds)]
    found = [losses_of(task, trainer, steps) for trainer in trainers]
    print(f"| recovered | {' | '.join(f'{depth} blocks' for depth in DEPTHS)} |\n|---|{'---|' * len(DEPTHS)}")
    for name in found[0]:
        print(f"| {name} | {' | '.join(f'{mean(f[name][depth] for f in found):.4f}' for depth in DEPTHS)} |")


if __name__ == "__main__":
    main()
