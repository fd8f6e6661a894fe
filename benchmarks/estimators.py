"""Gradient estimators of the expected loss against the truth, and searches against the masks that recover best.

python benchmarks/estimators.py [--searches runs/samplers_d4-audit]

The digits' teacher, 4 of its 8 blocks: all 70 masks are run on a fixed population of prepared samples, so the expected
loss under any distribution over masks, and its gradient, are known. Every estimator draws batches from that population.
With `--searches`, whole searches of several lengths: how often do they find the mask that recovers best, and the one
that hurts least right after pruning? The audit has recovered all masks.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import torch
from placed import losses_of
from torch import Tensor

import tinyfusion_core as tiny
from tinyfusion_core.comparison.results import ComparisonResults
from tinyfusion_core.samplers.base import BlockSampler
from tinyfusion_core.selection.base import Selector
from tinyfusion_core.selection.learning.gated_loss import value_weights
from tinyfusion_dit import DiT, GaussianDiffusion
from tinyfusion_images import Digits

matplotlib.use("Agg")
import matplotlib.pyplot as plt

KEEP, POPULATION, ROWS, ESTIMATES = 4, 256, 64, 100
LISTS = {"blocks": 8}
MASKS = torch.tensor([m for m in itertools.product((0.0, 1.0), repeat=8) if sum(m) == KEEP])
GROUP = {"pattern": (KEEP, 8), "scaling": (1.0, 1.0)}
RULES = tiny.Rules(keep=KEEP)
#: Name, sampler, fraction of the dropped values that are computed.
ESTIMATORS: dict[str, tuple[Callable[..., BlockSampler], float]] = {
    "straight-through, tau 4": (partial(tiny.GroupedSampler, tau=(4.0, 4.0), **GROUP), 1.0),
    "straight-through, tau 1": (partial(tiny.GroupedSampler, tau=(1.0, 1.0), **GROUP), 1.0),
    "straight-through, tau 0.1": (partial(tiny.GroupedSampler, tau=(0.1, 0.1), **GROUP), 1.0),
    "straight-through, tau 1, a third of the values": (partial(tiny.GroupedSampler, tau=(1.0, 1.0), **GROUP), 1 / 3),
    "ReinMax": (partial(tiny.GroupedSampler, estimator="reinmax", **GROUP), 1.0),
    "exact marginals": (partial(tiny.ExactK, rules=RULES), 1.0),
    "Gumbel top-k, tau 1": (partial(tiny.GumbelTopK, keep=KEEP, tau=(1.0, 1.0)), 1.0),
    "score function, 2 masks": (partial(tiny.ScoreFunction, rules=RULES, masks=2, entropy=(0.0, 0.0)), 1.0),
    "score function, 4 masks": (partial(tiny.ScoreFunction, rules=RULES, masks=4, entropy=(0.0, 0.0)), 1.0),
    "score function, 8 masks": (partial(tiny.ScoreFunction, rules=RULES, masks=8, entropy=(0.0, 0.0)), 1.0),
}
LENGTHS = (10, 30, 100, 300)
ANY = {"keep": KEEP, "batch_size": ROWS // 4}
#: Selectors of a number of steps, each of 64 network rows; those that do not learn have one length.
SEARCHES: dict[str, tuple[Callable[[int], Selector], Sequence[int]]] = {
    "score function, LoRA": (lambda steps: tiny.Search(steps=steps, **ANY), LENGTHS),
    "score function, LoRA, final of 4": (lambda steps: tiny.Finals(search=tiny.Search(steps=steps, **ANY)), LENGTHS),
    "score function, frozen": (lambda steps: tiny.Search(steps=steps, update=tiny.Frozen(), **ANY), LENGTHS),
    "straight-through, LoRA": (lambda steps: tiny.Search(steps=steps, pattern=(KEEP, 8), batch_size=ROWS), LENGTHS),
    "exact marginals, LoRA": (
        lambda steps: tiny.Search(steps=steps, sampler=partial(tiny.ExactK, rules=RULES), batch_size=ROWS),
        LENGTHS,
    ),
    "leave one out": (lambda steps: tiny.LeaveOneOut(keep=KEEP), (0,)),
    "greedy": (lambda steps: tiny.Greedy(keep=KEEP), (0,)),
    "Taylor": (lambda steps: tiny.Taylor(keep=KEEP), (0,)),
}
#: Where the gates stand: log-odds of blocks that are preferred to the others.
POINTS = {
    "undecided": ([], 0.0),
    "half-way to the first four": ([0, 1, 2, 3], 0.5),
    "to the last four": ([4, 5, 6, 7], 0.5),
}


class Truth:
    """Losses of all masks on a fixed population."""

    def __init__(self, task: tiny.Task) -> None:
        self.task, self.model = task, task.teacher.requires_grad_(False)
        batch = task.train.__getitems__(list(range(POPULATION)))
        self.inputs = task.loss.prepare(batch, tiny.Rng(0, "estimators", strata=POPULATION))
        self.batch_dim = task.batch_dim(self.model)
        with torch.no_grad():
            self.losses = torch.stack([self.run(slice(None), mask.expand(POPULATION, -1)) for mask in MASKS])

    def run(self, rows: slice | Tensor, mask: Tensor, weights: Tensor | None = None) -> Tensor:
        inputs = {name: value[rows] for name, value in self.inputs.items()}
        with tiny.Gates(self.model, self.task.blocks, self.batch_dim) as gates:
            gates.set(mask, weights)
            return self.task.loss.loss(self.task.loss.predict(self.model, inputs), inputs)

    def gradient(self, sampler: BlockSampler) -> Tensor:
        """Of the expected loss, in the sampler's logits."""
        logits, masks = next(sampler.parameters()), _options()
        losses = torch.stack([self.losses[int((mask == MASKS).all(1).nonzero())].mean() for mask in masks])
        (out,) = torch.autograd.grad((_law(sampler, logits) * losses).sum(), logits)
        return out

    def estimate(self, sampler: BlockSampler, share: float, i: int) -> Tensor:
        """One estimate of it, from a batch of `ROWS` network rows."""
        rng, copies = tiny.Rng(1, "estimate", i), sampler.masks_per_sample
        rows = torch.randperm(POPULATION, generator=rng.batch("rows"))[: ROWS // copies].repeat_interleave(copies)
        draw = sampler.sample(ROWS, rng)
        loss = self.run(rows, draw.mask, value_weights(draw.mask, share, rng))
        if not loss.requires_grad:
            loss = loss.requires_grad_()
        (out,) = torch.autograd.grad(sampler.surrogate(draw, loss), next(sampler.parameters()))
        return out


def _law(sampler: BlockSampler, logits: Tensor) -> Tensor:
    """The probability of every mask, in lexicographic order of the kept blocks, differentiable in the logits."""
    if isinstance(sampler, tiny.GumbelTopK):  # Plackett-Luce: a sum over the orders in which the blocks can be drawn
        orders = torch.tensor([list(itertools.permutations(kept)) for kept in itertools.combinations(range(8), KEEP)])
        weights = (logits + sampler.prior_logits).exp()
        drawn = weights[orders]
        left = weights.sum() - drawn.cumsum(-1) + drawn
        return (drawn / left).prod(-1).sum(-1)
    if isinstance(sampler, tiny.GroupedSampler):  # one group: an option, a logit
        return (sampler.scaling * logits + _options() @ sampler.prior_logits).softmax(0)
    return (_options() @ (logits + sampler.prior_logits)).softmax(0)


def _options() -> Tensor:
    """All masks in lexicographic order of the kept blocks."""
    rows = torch.zeros(len(MASKS), 8)
    for row, kept in zip(rows, itertools.combinations(range(8), KEEP), strict=True):
        row[list(kept)] = 1
    return rows


def gradients(truth: Truth) -> list[dict[str, str | float]]:
    """Bias and deviation of every estimator at every point, relative to the gradient's length."""
    table: list[dict[str, str | float]] = []
    for point, (kept, strength) in POINTS.items():
        for name, (make, share) in ESTIMATORS.items():
            sampler = make(LISTS)
            if kept:
                sampler.set_prior(kept, (strength, strength))
            exact = truth.gradient(sampler)
            start = time.perf_counter()
            estimates = torch.stack([truth.estimate(sampler, share, i) for i in range(ESTIMATES)])
            seconds = (time.perf_counter() - start) / ESTIMATES
            mean, spread = estimates.mean(0), estimates.std(0).norm()
            # The mean of so many estimates has an error of its own, which is no bias.
            noise = spread / ESTIMATES**0.5
            table.append(
                {
                    "point": point,
                    "estimator": name,
                    "bias": float(((mean - exact).square().sum() - noise**2).clamp(min=0).sqrt() / exact.norm()),
                    "deviation": float(spread / exact.norm()),
                    "cosine of the mean": float(torch.cosine_similarity(mean, exact, dim=0)),
                    "seconds": seconds,
                    "deviation at equal seconds": float(spread / exact.norm()) * seconds**0.5,
                }
            )
    return table


def show(table: Sequence[dict[str, Any]]) -> None:
    """Print every estimator: bias, deviation and cosine at each point, seconds, deviation x sqrt(seconds)."""
    points = [f"{point}: bias, deviation, cosine" for point in POINTS]
    print("estimator", *points, "seconds", "deviation at equal seconds", sep=" | ")
    for name in ESTIMATORS:
        rows = [row for row in table if row["estimator"] == name]
        points = [f"{r['bias']:.2f}, {r['deviation']:.2f}, {r['cosine of the mean']:+.2f}" for r in rows]
        seconds, even = (
            statistics.median(row[key] for row in rows) for key in ("seconds", "deviation at equal seconds")
        )
        print(name, *points, f"{seconds:.3f}", f"{even:.3f}", sep=" | ")


def searches(task: tiny.Task, results: ComparisonResults) -> list[dict[str, str | float]]:
    """How far searches of several lengths are from the best mask, and how often they find it; means of five seeds."""
    by_seed, pruned = losses_of(results)
    recovered = {kept: statistics.fmean(losses.values()) for kept, losses in by_seed.items()}
    recovers_best, hurts_least = min(recovered, key=recovered.__getitem__), min(pruned, key=pruned.__getitem__)
    table: list[dict[str, str | float]] = []
    for name, (make, lengths) in SEARCHES.items():
        for steps in lengths:
            start, found = time.perf_counter(), []
            for seed in range(5):
                decision = make(steps)(task, tiny.Trainer(seed=seed, precision="fp32"))
                found.append(decision.kept)
            table.append(
                {
                    "search": name,
                    "steps": steps,
                    "seconds": (time.perf_counter() - start) / len(found),
                    "regret": statistics.fmean(recovered[kept] - recovered[recovers_best] for kept in found),
                    "recovers best": found.count(recovers_best) / len(found),
                    "hurts least": found.count(hurts_least) / len(found),
                }
            )
            print(*(f"{v:.4g}" if isinstance(v, float) else v for v in table[-1].values()), sep=" | ", flush=True)
    return table


def draw_searches(table: Sequence[dict[str, str | float]], path: Path) -> None:
    """Regret and probabilities over the seconds of a search."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.6), sharex=True, layout="constrained")
    for name in SEARCHES:
        rows = [row for row in table if row["search"] == name]
        marks = "o-" if len(rows) > 1 else "*"
        for axis, what in zip(axes, ("regret", "recovers best", "hurts least"), strict=True):
            axis.plot([r["seconds"] for r in rows], [r[what] for r in rows], marks, label=name)
    titles = (
        "recovered loss above the best mask's",
        "finds the mask that recovers best",
        "finds the mask that hurts least",
    )
    for axis, title in zip(axes, titles, strict=True):
        axis.set(title=title, xlabel="seconds of a search", xscale="log")
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=110)


def draw(table: Sequence[dict[str, str | float]], path: Path) -> None:
    """Bias against deviation, a panel for each point."""
    figure, axes = plt.subplots(1, len(POINTS), figsize=(13, 4.2), sharex=True, sharey=True, layout="constrained")
    for axis, point in zip(axes, POINTS, strict=True):
        for i, row in enumerate(r for r in table if r["point"] == point):
            axis.scatter(row["bias"], row["deviation at equal seconds"], s=60, color=f"C{i}", label=row["estimator"])
        axis.set(title=point, xlabel="bias / gradient", xscale="symlog", yscale="log")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("deviation x sqrt(seconds) / gradient")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--searches",
        type=Path,
        metavar="AUDIT",
        help="run 115 selections too, and look their masks up in the folder of benchmarks/samplers_d4.yaml's audit",
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = Digits()
    loss = GaussianDiffusion(learn_sigma=False)
    task = tiny.Task(backbone=DiT(checkpoint="digits"), loss=loss, train=data.train(), held_out=data.held_out())
    table = gradients(Truth(task))
    show(table)
    draw(table, Path(__file__).parent / "figures" / "estimators.png")
    if options.searches:
        task.teacher.requires_grad_(True)
        table = searches(task, ComparisonResults.load(options.searches / "findings.json"))
        draw_searches(table, Path(__file__).parent / "figures" / "searches.png")


if __name__ == "__main__":
    main()
