"""Criteria by calibration loss: the loss of the network right after pruning, before any recovery."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from ...errors import require
from ...protocols.task import Task
from ...runtime.seeding import generator
from ...samplers.compiled import Constraints
from ...training.trainer import Trainer
from .base import CriterionResult
from .calibration import Calibrated, Calibration


@dataclass(frozen=True, kw_only=True)
class Random(Calibrated):
    """Keep random blocks; every mask within the budget has the same probability.

    Args:
        draws: distinct masks to draw, or all masks if there are fewer; of several the one with the lowest calibration
            loss is taken. A single one needs no samples.
        seed: distinguishes draws within one run.
    """

    draws: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.draws >= 1, "Random.draws", self.draws, "at least 1")

    @override
    def decide(self, constraints: Constraints, task: Task, trainer: Trainer) -> CriterionResult:
        source = generator(trainer.seed, "random", self.seed)
        masks = constraints.distinct(self.draws, source)
        if len(masks) == 1:
            return CriterionResult(masks[0])
        calibration = self.calibration(task, trainer)
        losses = calibration.losses(_rows(masks, constraints.num_blocks))
        lowest = min(calibration.finite([min(losses)]))
        return CriterionResult(masks[losses.index(lowest)], calibration.evaluations, {"losses": losses})


class LeaveOneOut(Calibrated):
    """Keep the blocks whose removal, one at a time, raises the calibration loss most ("sensitivity")."""

    scored = True

    @override
    def decide(self, constraints: Constraints, task: Task, trainer: Trainer) -> CriterionResult:
        calibration, everything = self.calibration(task, trainer), range(constraints.num_blocks)
        masks = [everything, *([j for j in everything if j != i] for i in everything)]
        full, *losses = calibration.losses(_rows(masks, constraints.num_blocks))
        calibration.finite([full])
        scores = [loss - full for loss in losses]
        return CriterionResult(constraints.best(scores), calibration.evaluations, {"scores": scores})


@dataclass(frozen=True, kw_only=True)
class Greedy(Calibrated):
    """Remove the block whose removal raises the calibration loss least, then repeat (SLEB, arXiv:2402.09025).

    Blocks that constraints tie are removed as one. With a budget of costs it ends as soon as the budget is met.

    Args:
        swaps: how often, at most, a kept and a removed block are exchanged afterwards: the two that lower the
            calibration loss most, as long as any do.
    """

    swaps: int = field(default=0, metadata={"neutral": 0})

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.swaps >= 0, "Greedy.swaps", self.swaps, "0 or more")

    @override
    def decide(self, constraints: Constraints, task: Task, trainer: Trainer) -> CriterionResult:
        calibration, kept = self.calibration(task, trainer), list(range(constraints.num_blocks))
        rounds = constraints.num_blocks - len(constraints.best([0.0] * constraints.num_blocks))
        removed: list[int] = []
        lowest: list[float] = []
        seen: dict[tuple[int, ...], float] = {}
        # Every round removes a block, so that there are at most as many.
        while len(removed) < constraints.num_blocks and (candidates := constraints.removable(kept)):
            masks = [[j for j in kept if j not in unit] for unit in candidates]
            note = f", block {len(removed) + 1} of {rounds}"
            losses = calibration.losses(_rows(masks, constraints.num_blocks), note)
            lowest += calibration.finite([min(losses)])
            seen |= _by_mask(masks, losses)
            best = losses.index(lowest[-1])
            kept = masks[best]
            removed += candidates[best]
        found: dict[str, Any] = {"removed": removed, "losses": lowest}
        if self.swaps:
            kept, found["exchanges"] = self._exchanged(kept, seen, constraints, calibration)
        return CriterionResult(kept, calibration.evaluations, found, seen)

    def _exchanged(
        self, kept: list[int], seen: dict[tuple[int, ...], float], constraints: Constraints, calibration: Calibration
    ) -> tuple[list[int], list[dict[str, Any]]]:
        """Return what is kept after the exchanges, and these; `seen` has the loss of `kept`, and gets the others."""
        made: list[dict[str, Any]] = []
        while len(made) < self.swaps and (pairs := constraints.exchanges(kept)):
            masks = [sorted({*kept, *back}.difference(out)) for out, back in pairs]
            found = calibration.losses(_rows(masks, constraints.num_blocks), f", exchange {len(made) + 1}")
            best, before = found.index(min(found)), seen[tuple(kept)]
            seen |= _by_mask(masks, found)
            if found[best] >= before:
                break
            kept = masks[best]
            made.append({"removed": list(pairs[best][0]), "kept": list(pairs[best][1]), "loss": found[best]})
        return kept, made


class Taylor(Calibrated):
    """Keep the blocks on whose mask the loss depends most: mean |dL/dm| at m = 1 (Michel et al., arXiv:1905.10650)."""

    scored = True

    @override
    def decide(self, constraints: Constraints, task: Task, trainer: Trainer) -> CriterionResult:
        calibration = self.calibration(task, trainer)
        scores = calibration.gradients()
        return CriterionResult(constraints.best(scores), calibration.evaluations, {"scores": scores})


def _by_mask(masks: Sequence[Sequence[int]], losses: Sequence[float]) -> dict[tuple[int, ...], float]:
    """The losses by the kept blocks."""
    return {tuple(kept): loss for kept, loss in zip(masks, losses, strict=True)}


def _rows(masks: Sequence[Sequence[int]], num_blocks: int) -> Tensor:
    """(masks, num_blocks) zeros and ones from the indices of kept blocks."""
    return torch.tensor([[float(i in kept) for i in range(num_blocks)] for kept in masks])
