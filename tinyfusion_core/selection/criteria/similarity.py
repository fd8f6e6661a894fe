"""Criteria that compare the input and output of blocks, and remove those that change their input least."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from ...errors import UserError
from ...protocols.task import Task
from ...samplers.compiled import Constraints
from ...training.trainer import Trainer
from .base import CriterionResult
from .calibration import Calibrated, Span
from .watching import Measure


class MeanSimilarity:
    """The mean over samples and tokens of a comparison of feature vectors.

    Args:
        compare: maps two (..., channels) tensors to (...) values.
    """

    def __init__(self, compare: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.compare, self.total, self.count = compare, 0.0, 0

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add the values of a batch.

        Args:
            x: (..., channels) stream before the blocks.
            y: (..., channels) stream after them.
        """
        values = self.compare(x, y)
        self.total += float(values.sum())
        self.count += values.numel()

    def state(self) -> tuple[float, int]:
        """Return the sum and the number of the values."""
        return self.total, self.count

    def merge(self, state: tuple[float, int]) -> None:
        """Add the sum and number of another mean."""
        self.total += state[0]
        self.count += state[1]

    def value(self) -> float:
        """Return the mean."""
        return self.total / self.count


def cosine() -> Measure:
    """Return a measure of the mean cosine similarity of tokens before and after."""
    return MeanSimilarity(lambda x, y: F.cosine_similarity(x, y, dim=-1))


def squared_error() -> Measure:
    """Return a measure of the mean squared difference of tokens before and after."""
    return MeanSimilarity(lambda x, y: (y - x).square().mean(-1))


Moments = tuple[int, list[Tensor], list[Tensor]]
"""Number of tokens; their means, each (channels,); and their centred products, each (channels, channels)."""


class LinearCKA:
    """Linear centred kernel alignment of tokens before and after (Kornblith et al., arXiv:1905.00414).

    |Y'X|² / (|X'X| |Y'Y|), Frobenius norms, for centred features. Only the products are kept, as running co-moments:
    each batch is centred by its own mean, so that large means cost no precision.
    """

    def __init__(self) -> None:
        self.count = 0
        self.means: list[Tensor] = []
        self.products: list[Tensor] = []  # X'X, Y'Y, Y'X, each (D, D)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add the co-moments of a batch.

        Args:
            x: (..., channels) stream before the blocks.
            y: (..., channels) stream after them.
        """
        x, y = x.flatten(0, -2), y.flatten(0, -2)
        means = [x.mean(0), y.mean(0)]
        x, y = x - means[0], y - means[1]
        self.merge((len(x), means, [x.T @ x, y.T @ y, y.T @ x]))

    def state(self) -> Moments:
        """Return the moments, with means (channels,) and products (channels, channels), on the CPU."""
        return self.count, [t.cpu() for t in self.means], [t.cpu() for t in self.products]

    def merge(self, state: Moments) -> None:
        """Add moments: means, each (channels,), and products, each (channels, channels), by the pairwise update."""
        n, means, products = state
        if not n:
            return
        if not self.count:
            self.count, self.means, self.products = state
            return
        dx, dy = (new - old for new, old in zip(means, self.means, strict=True))
        both = self.count + n
        for product, new, left, right in zip(self.products, products, (dx, dy, dy), (dx, dy, dx), strict=True):
            product += new + torch.outer(left, right) * (self.count * n / both)
        self.means = [mean + d * (n / both) for mean, d in zip(self.means, (dx, dy), strict=True)]
        self.count = both

    def value(self) -> float:
        """Return the alignment, from 0 to 1; 0 if one side is constant."""
        xx, yy, yx = (float(product.norm()) for product in self.products)
        return yx**2 / (xx * yy) if xx * yy else 0.0


@dataclass(frozen=True, kw_only=True)
class BlockInfluence(Calibrated):
    """Keep the blocks that rotate their tokens most: 1 - mean cosine (BI of ShortGPT, arXiv:2403.03853).

    Args:
        reference: as in TinyFusion's published comparison: inputs without noise, and the last block is kept.
    """

    scored = True

    reference: bool = False

    @override
    def protected(self, blocks: Sequence[str]) -> Sequence[int]:
        return [*self.protect, len(blocks) - 1] if self.reference else self.protect

    @override
    def decide(self, constraints: Constraints, task: Task, trainer: Trainer) -> CriterionResult:
        calibration = self.calibration(task, trainer)
        spans = [(i, i) for i in range(constraints.num_blocks)]
        scores = [1 - similarity for similarity in calibration.compare(spans, cosine, clean=self.reference)]
        return CriterionResult(constraints.best(scores), calibration.evaluations, {"scores": scores})


class InputOutputMSE(Calibrated):
    """Keep the blocks with the largest mean squared difference between input and output (Flux.1 Lite)."""

    scored = True

    @override
    def decide(self, constraints: Constraints, task: Task, trainer: Trainer) -> CriterionResult:
        calibration = self.calibration(task, trainer)
        scores = calibration.compare([(i, i) for i in range(constraints.num_blocks)], squared_error)
        return CriterionResult(constraints.best(scores), calibration.evaluations, {"scores": scores})


@dataclass(frozen=True, kw_only=True)
class SpanSimilarity(Calibrated):
    """Remove consecutive blocks: the run that changes its input least (Gromov et al., arXiv:2403.17887).

    One run is removed from every group of a pattern, or from every block list with its own number; with one number for
    all lists it is the best run inside any of them. With constraints, it is the best of the runs whose removal obeys
    them.

    Args:
        measure: mean cosine of the tokens before and after, which ranks like the paper's angular distance for single
            tokens; or linear CKA, which compares the whole set of tokens up to rotation and scale.
    """

    measure: Literal["cosine", "cka"] = "cosine"

    @override
    def guess(self, constraints: Constraints) -> Sequence[int]:
        return _without(constraints, [spans[0] for spans in self._candidates(constraints)])

    @override
    def decide(self, constraints: Constraints, task: Task, trainer: Trainer) -> CriterionResult:
        candidates = self._candidates(constraints)
        spans = [span for some in candidates for span in some]
        calibration = self.calibration(task, trainer)
        values = calibration.compare(spans, cosine if self.measure == "cosine" else LinearCKA)
        similarity = dict(zip(spans, values, strict=True))
        kept = _without(constraints, [max(some, key=similarity.__getitem__) for some in candidates])
        found = {"spans": [{"first": i, "last": j, "similarity": value} for (i, j), value in similarity.items()]}
        return CriterionResult(kept, calibration.evaluations, found)

    def _candidates(self, constraints: Constraints) -> list[list[Span]]:
        """The runs that may be removed, for every choice that must lose blocks."""
        if not constraints.independent:
            return [self._allowed(constraints)]
        candidates = []
        for choice in constraints.choices:
            size = len(choice.blocks) - (choice.num_kept or 0)
            if not size:
                continue
            runs = [run for run in _runs(choice.lists, size) if not constraints.protected & set(run)]
            if not runs:
                raise UserError(
                    f"SpanSimilarity: {choice.name} has no {size} blocks in a row inside one block list that could go "
                    f"(protected: {sorted(constraints.protected & set(choice.blocks))}); keep more, protect fewer, "
                    "or give keep a number for every block list"
                )
            candidates.append([(run[0], run[-1]) for run in runs])
        return candidates

    def _allowed(self, constraints: Constraints) -> list[Span]:
        """The runs of any length whose removal obeys the constraints."""
        if len(constraints.choices) > 1:
            raise UserError(
                "SpanSimilarity: removes a run of every group or list by itself, so constraints across them cannot be "
                "obeyed; give keep one number for all, or take another criterion"
            )
        lists, everything = constraints.choices[0].lists, set(range(constraints.num_blocks))
        runs = [run for size in everything for run in _runs(lists, size + 1)]
        spans = [(run[0], run[-1]) for run in runs if constraints.accepts(everything - set(run))]
        if not spans:
            raise UserError(
                "SpanSimilarity: no mask that obeys the constraints removes a single run of blocks in one block list; "
                "loosen them, or take another criterion"
            )
        return spans


def _runs(lists: Sequence[Sequence[int]], size: int) -> list[Sequence[int]]:
    """All runs of this many consecutive blocks inside a list."""
    runs = [run[i : i + size] for run in lists for i in range(len(run) - size + 1)]
    return [run for run in runs if run[-1] - run[0] == size - 1]  # lists may take turns in the order of execution


def _without(constraints: Constraints, spans: Sequence[Span]) -> list[int]:
    return [i for i in range(constraints.num_blocks) if not any(first <= i <= last for first, last in spans)]
