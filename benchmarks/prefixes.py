"""Masks that share what they begin with against plain passes: processor seconds of criteria that try many masks.

    python benchmarks/prefixes.py [--quick]

Networks of 8, 28 and 64 DiT blocks of width 128, 16 tokens, 4 samples in one batch, half of the blocks kept. Both ways
take turns, and ratios are of medians over rounds within this one run. That both give the same losses, bit for bit, is
checked.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import tinyfusion_core as tiny
from tinyfusion_core.selection.criteria.calibration import Calibrated, Calibration
from tinyfusion_dit.model import DiT

WIDTH, HEADS, SIDE, ROWS = 128, 4, 8, 4


class PlainCalibration(Calibration):
    """Runs every mask from the first block on, and one sample of blocks that are dropped."""

    def losses(self, masks: Tensor, note: str = "") -> list[float]:
        """Return the loss under each mask, (masks, num_blocks)."""
        inputs = self._inputs(range(self.num_samples))
        self.evaluations += len(masks) * self.num_samples
        return [self._loss(mask, inputs) for mask in masks]

    @torch.no_grad()
    def _loss(self, mask: Tensor, inputs: dict[str, Tensor]) -> float:
        with tiny.Gates(self.task.teacher, self.task.blocks, self._batch_dim) as gates:
            gates.mask = mask.expand(self.num_samples, -1)
            return float(self._losses(inputs).double().sum() / self.num_samples)


@dataclass(frozen=True, kw_only=True)
class PlainGreedy(tiny.Greedy):
    def calibration(self, task: tiny.Task, trainer: tiny.Trainer) -> Calibration:
        return PlainCalibration(task, trainer, self.samples, self.batch_size)


@dataclass(frozen=True, kw_only=True)
class PlainLeaveOneOut(tiny.LeaveOneOut):
    def calibration(self, task: tiny.Task, trainer: tiny.Trainer) -> Calibration:
        return PlainCalibration(task, trainer, self.samples, self.batch_size)


def network(depth: int) -> tiny.Task:
    torch.manual_seed(0)
    model = DiT(input_size=SIDE, hidden_size=WIDTH, depth=depth, num_heads=HEADS, learn_sigma=False).eval()
    for p in model.parameters():  # adaLN-zero would make the blocks identities
        if p.requires_grad:
            nn.init.normal_(p, std=0.02)
    x, target = torch.randn(2, ROWS, 4, SIDE, SIDE)
    data = {"x": x, "target": target, "t": torch.randint(1000, (ROWS,)), "y": torch.randint(1000, (ROWS,))}

    def losses(model: nn.Module, batch: Any) -> Tensor:
        return (model(batch["x"], batch["t"], batch["y"]) - batch["target"]).square().flatten(1).mean(1)

    return tiny.wrap(model, blocks="blocks.*", loss_fn=losses, data=data)


def measure(how: Calibrated, task: tiny.Task, trainer: tiny.Trainer) -> tuple[float, tiny.Decision]:
    start = time.process_time()
    decision = how(task, trainer)
    return time.process_time() - start, decision


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="8 blocks and one round, to see that it runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    trainer = tiny.Trainer(precision="fp32", seed=0)
    table = Table("blocks", "criterion", "plain s", "shared s", "plain / shared")
    for depth, *rounds in [(8, 1, 1)] if options.quick else [(8, 9, 9), (28, 9, 3), (64, 5, 1)]:
        task = network(depth)
        kinds = [(PlainLeaveOneOut, tiny.LeaveOneOut), (PlainGreedy, tiny.Greedy)]
        for ways, times in zip(kinds, rounds, strict=True):
            seconds: list[list[float]] = [[], []]
            for _ in range(times):
                found = [measure(way(keep=depth // 2, samples=ROWS), task, trainer) for way in ways]
                for own, (spent, _) in zip(seconds, found, strict=True):
                    own.append(spent)
                (_, plain), (_, shared) = found
                assert (plain.kept, plain.provenance) == (shared.kept, shared.provenance)
            a, b = map(statistics.median, seconds)
            table.add_row(str(depth), ways[1].__name__, f"{a:.2f}", f"{b:.2f}", f"{a / b:.2f}x")
    Console().print(table)


if __name__ == "__main__":
    main()
