"""Recovery on what the teacher makes itself, beside recovery on real data: digits, 8 to 4 blocks.

    python benchmarks/generated.py [SEEDS] [STEPS]

The same student and the same steps of 64, on the 1,500 real images, on as many that the teacher has made, on four times
as many, and on those and the real ones in equal shares; by fine-tuning and by distillation. Labels are balanced, and
there is no guidance, but for "guided": the recipe's, by distillation alone. Held-out loss of real images, and Fréchet
distance.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch

import tinyfusion_core as tiny
from tinyfusion_core.pipeline.tasks import make_task

RECIPE = Path(__file__).parent.parent / "recipes" / "quickstart.yaml"
MADE = {"made": (1500, 1.0), "made, 4x": (6000, 1.0), "made, guided": (1500, 1.5)}
"""How many samples, and the scale of their guidance."""


def judged(recipe: tiny.Recipe, data: tiny.DataSource, kd: tiny.OutputKD | None, steps: int, seed: int) -> str:
    """Recover a student on some data. Returns its held-out loss and Fréchet distance."""
    task = make_task(replace(recipe, data=data))
    trainer = replace(recipe.trainer, seed=seed, log_every=1000)
    decision = tiny.Keep([0, 1, 3, 6])(task, trainer)
    student = tiny.Recover(steps=steps, lr=1e-3, kd=kd)(task, tiny.prune(task, decision), decision, trainer)
    found = [m.values["student"] for of in recipe.evaluate[:2] for m in of(task, {"student": student}, recipe.trainer)]
    return f"{found[0]:.4f} | {found[1]:.2f}"


def main(seeds: list[int], lengths: list[int]) -> None:
    """Print a line for every recovery, as they end."""
    recipe = tiny.load_recipe(RECIPE)
    print("| seed | steps | kd | data | held-out loss | Fréchet distance |\n" + "|---" * 6 + "|", flush=True)
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            data = {"real": recipe.data}
            for name, (samples, scale) in MADE.items():
                task = make_task(replace(recipe, loss=replace(recipe.loss, cfg_scale=scale)))
                tiny.GenerateData(samples=samples, seed=seed)(task, recipe.trainer, f"{folder}/{name}")
                parts = {"real": recipe.data, "made": tiny.Generated(folder=f"{folder}/{name}", num_held_out=0)}
                data[name] = tiny.Mixture(parts=parts, weights={"real": 0, "made": 1})
            parts = {"real": recipe.data, "made": data["made, 4x"].parts["made"]}
            data["real and made, 4x"] = tiny.Mixture(parts=parts, weights={"real": 1, "made": 1})
            for steps, kd, (name, of) in product(lengths, (tiny.MaskedKD(), None), data.items()):
                how = "fine-tuning" if kd is None else "MaskedKD"
                if kd is not None or "guided" not in name:
                    print(f"| {seed} | {steps} | {how} | {name} | {judged(recipe, of, kd, steps, seed)} |", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    given = [[int(n) for n in words.split(",")] for words in sys.argv[1:]]
    main(given[0] if given else [0, 1], given[1] if len(given) > 1 else [300, 1000])
