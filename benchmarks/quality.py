"""How well short recoveries foretell a long one, and what is kept for a loss that is allowed.

    python benchmarks/quality.py

The digits' teacher. `Shallowest` decides for several losses; every mask that it tried is then recovered by as many
steps as it predicts for, and judged on held-out samples. Losses are multiples of the teacher's on the same samples.
"""

from __future__ import annotations

import torch
from race import task_of, trainer_of

import tinyfusion_core as tiny
from tinyfusion_core.errors import UserError

STEPS, SHORT = 1000, 600


def main() -> None:
    torch.set_num_threads(1)
    task, trainer = task_of("digits"), trainer_of(0)
    tried: dict[tuple[int, ...], dict] = {}
    for allowed in ("1.03x", "1.08x", "1.2x", "1.5x"):
        how = tiny.Shallowest(loss=allowed, steps=SHORT, recover_steps=STEPS, lr=1e-3)
        try:
            decision = how(task, trainer)
        except UserError as e:
            print(e)
            continue
        entries = decision.provenance["quality"]
        tried |= {tuple(e["kept"]): e for e in entries}
        chosen = next(e for e in entries if e["kept"] == list(decision.kept))
        print(
            f"| {allowed} | {len(decision.kept)} blocks: {chosen['kept']} | {chosen['probability']:.2f} |", flush=True
        )
    held_out = tiny.HeldOutLoss(draws=4)
    for kept, found in sorted(tried.items(), key=lambda item: len(item[0])):
        decision = tiny.Decision(blocks=tuple(task.blocks), kept=kept, method="any")
        student = tiny.prune(task, decision)
        recovery = tiny.Recover(steps=STEPS, lr=1e-3, lr_final=1e-5, ema=0.0)
        recovered = recovery(task, student, decision, trainer)
        (measured,) = held_out(task, {"teacher": task.teacher, "student": recovered}, trainer)
        low, high = (loss / found["teacher"] for loss in found["interval"])
        real = measured.values["student"] / measured.values["teacher"]
        short = ", ".join(f"{steps}: {loss / found['teacher']:.3f}" for steps, loss in found["measured"].items())
        predicted = found["predicted"] / found["teacher"]
        print(f"| {len(kept)} | {short} | {predicted:.3f} ({low:.3f} to {high:.3f}) | {real:.3f} |", flush=True)


if __name__ == "__main__":
    main()
