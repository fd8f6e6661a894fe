"""What the score function gains from a control variate, on the three teachers of digits that come with the plugins.

    python benchmarks/control_variate.py

Weights stand still, so that every mask's loss on a fixed population of samples is known, and with it the exact gradient
of the expected loss and the best mask. First the gradients: bias and deviation of estimates from 16 samples under 4
masks each, in units of the exact gradient's length, at three places. The model is fitted to the estimates before. Then
searches of several lengths and batches: the rank of what each finds, of five seeds.
"""

from __future__ import annotations

from statistics import mean, median

import torch
from race import task_of, trainer_of
from torch import Tensor

import tinyfusion_core as tiny
from tinyfusion_core.protocols.task import Task

TEACHERS = {"quickstart": 4, "sit_small": 4, "mar_small": 6}
"""Recipe of each, and how many blocks are kept."""
MODELS = {"none": {}, "control variate": {"control": True}}
POPULATION, SAMPLES, MASKS, ESTIMATES = 128, 16, 4, 200


def losses_of(task: Task, masks: Tensor) -> Tensor:
    """The loss of every sample of the population under every mask, (masks, samples)."""
    model, found = task.teacher.requires_grad_(False), []
    batch = task.train.__getitems__(list(range(POPULATION)))
    inputs = task.loss.prepare(batch, tiny.Rng(0, "control variate", strata=POPULATION))
    streams = task.backbone.streams, task.backbone.unneeded
    with torch.no_grad(), tiny.Gates(model, task.blocks, task.batch_dim(model), *streams) as gates:
        for mask in masks:
            gates.set(mask.expand(POPULATION, -1), None)
            found.append(task.loss.losses(model, inputs))
    model.requires_grad_(True)
    return torch.stack(found)


def sampler_of(task: Task, keep: int, model: str, **options: object) -> tiny.ScoreFunction:
    rules = tiny.Rules(keep=keep)
    return tiny.ScoreFunction(task.lists, rules, masks=MASKS, **MODELS[model], **options)  # type: ignore[arg-type]


def gradient(task: Task, keep: int, masks: Tensor, losses: Tensor, model: str, lean: list[int]) -> tuple[float, float]:
    """Bias and deviation of estimates, relative to the exact gradient."""
    sampler = sampler_of(task, keep, model, entropy=(0.0, 0.0))
    if lean:
        sampler.set_prior(lean, (0.5, 0.5))
    law = (masks @ (sampler.logits + sampler.prior_logits)).softmax(0)
    (exact,) = torch.autograd.grad(law @ losses.mean(1), sampler.logits)
    index, found = {tuple(mask.tolist()): i for i, mask in enumerate(masks)}, []
    for i in range(ESTIMATES):
        rng = tiny.Rng(1, "control variate", i)
        rows = torch.randperm(POPULATION, generator=rng.batch("rows"))[:SAMPLES].repeat_interleave(MASKS)
        draw = sampler.sample(SAMPLES * MASKS, rng)
        loss = losses[[index[tuple(mask.tolist())] for mask in draw.mask.detach()], rows]
        found.append(torch.autograd.grad(sampler.surrogate(draw, loss), sampler.logits)[0])
        sampler.observe(draw.mask, loss)
    estimates = torch.stack(found)
    spread = estimates.std(0).norm()
    # The mean of so many estimates has an error of its own, which is no bias.
    bias = ((estimates.mean(0) - exact).square().sum() - spread**2 / ESTIMATES).clamp(min=0).sqrt()
    return float(bias / exact.norm()), float(spread / exact.norm())


def searches(task: Task, keep: int, order: list[tuple[int, ...]], steps: int, batch: int, model: str) -> list[int]:
    """Ranks of what searches of five seeds find, with weights that stand still."""
    found = []
    for seed in range(5):
        make = lambda lists: sampler_of(task, keep, model)  # noqa: E731
        search = tiny.Search(sampler=make, steps=steps, batch_size=batch, update=tiny.Frozen())
        found.append(1 + order.index(search(task, trainer_of(seed)).kept))
    return found


def main() -> None:
    torch.set_num_threads(1)
    for recipe, keep in TEACHERS.items():
        task = task_of(f"recipes/{recipe}.yaml")
        num = len(task.blocks)
        kept = list(sampler_of(task, keep, "none").automaton.masks())
        masks = torch.tensor([[float(i in mask) for i in range(num)] for mask in kept])
        losses = losses_of(task, masks)
        ranked = sorted(zip(losses.mean(1).tolist(), kept, strict=True))
        order = [tuple(mask) for _, mask in ranked]
        print(f"\n{recipe}: {num} -> {keep}, {len(kept)} masks; best {order[0]} at {ranked[0][0]:.4f}", flush=True)
        places = {"undecided": [], "to the first": list(range(keep)), "to the last": list(range(num - keep, num))}
        for model in MODELS:
            said = [gradient(task, keep, masks, losses, model, lean) for lean in places.values()]
            print(f"| {model} |", " | ".join(f"{bias:.2f}, {spread:.2f}" for bias, spread in said), "|", flush=True)
        for batch in (16, 4):
            for steps in (30, 100, 300):
                ranks = {model: searches(task, keep, order, steps, batch, model) for model in MODELS}
                said = [f"{', '.join(map(str, r))} ({median(r):.0f}; {mean(r):.1f})" for r in ranks.values()]
                print(f"| {batch} x {MASKS} | {steps} |", " | ".join(said), "|", flush=True)


if __name__ == "__main__":
    main()
