"""Criteria that compare what goes into blocks with what comes out: those that change it least go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .budget import Quota
from .calibration import Calibrated, Measure
from .criteria import Verdict, rounded
from .task import Task
from .trainer import Trainer


class Mean:
    """The mean over samples and tokens of a comparison of feature vectors."""

    def __init__(self, compare: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.compare, self.total, self.count = compare, 0.0, 0

    def add(self, x: Tensor, y: Tensor) -> None:
        values = self.compare(x, y)
        self.total += float(values.sum())
        self.count += values.numel()

    def value(self) -> float:
        return self.total / self.count


def cosine() -> Measure:
    """Mean cosine between a token before and after."""
    return Mean(lambda x, y: F.cosine_similarity(x, y, dim=-1))


def squared_error() -> Measure:
    """Mean squared difference of a token before and after."""
    return Mean(lambda x, y: (y - x).square().mean(-1))


class LinearCKA:
    """Linear centred kernel alignment (Kornblith et al. 2019, arXiv:1905.00414) of tokens before and after.

    |Y'X|² / (|X'X| |Y'Y|), Frobenius norms, for centred features. Only the products are kept, as running
    co-moments: each batch is centred by its own mean, so that large means cost no precision.
    """

    def __init__(self) -> None:
        self.count = 0
        self.means: tuple[Tensor, Tensor] | None = None
        self.products: list[Tensor] = []  # X'X, Y'Y, Y'X, each (D, D)

    def add(self, x: Tensor, y: Tensor) -> None:
        x, y = x.flatten(0, -2), y.flatten(0, -2)
        n, means = len(x), (x.mean(0), y.mean(0))
        x, y = x - means[0], y - means[1]
        products = [x.T @ x, y.T @ y, y.T @ x]
        if self.means is None:
            self.count, self.means, self.products = n, means, products
            return
        dx, dy = (new - old for new, old in zip(means, self.means, strict=True))
        both = self.count + n
        for product, new, left, right in zip(self.products, products, (dx, dy, dy), (dx, dy, dx), strict=True):
            product += new + torch.outer(left, right) * (self.count * n / both)
        self.means = self.means[0] + dx * (n / both), self.means[1] + dy * (n / both)
        self.count = both

    def value(self) -> float:
        xx, yy, yx = (float(product.norm()) for product in self.products)
        return yx**2 / (xx * yy) if xx * yy else 0.0


@dataclass(frozen=True, kw_only=True)
class BlockInfluence(Calibrated):
    """Keep the blocks that turn their tokens most: 1 - mean cosine (BI of ShortGPT, arXiv:2403.03853).

    Args:
        reference: as in the published comparison of TinyFusion: on inputs without noise, and the last block stays.
    """

    reference: bool = False

    def quota(self, blocks: Sequence[str]) -> Quota:
        return self.limit(blocks, [*self.protect, len(blocks) - 1] if self.reference else self.protect)

    def decide(self, quota: Quota, task: Task, trainer: Trainer) -> Verdict:
        calibration = self.calibration(task, trainer)
        spans = [(i, i) for i in range(quota.num_blocks)]
        scores = [1 - similarity for similarity in calibration.compare(spans, cosine, clean=self.reference)]
        return Verdict(quota.top(scores), calibration.evaluations, {"scores": rounded(scores)})


class InputOutputMSE(Calibrated):
    """Keep the blocks whose output differs most from their input, by mean squares (Flux.1 Lite)."""

    def decide(self, quota: Quota, task: Task, trainer: Trainer) -> Verdict:
        calibration = self.calibration(task, trainer)
        scores = calibration.compare([(i, i) for i in range(quota.num_blocks)], squared_error)
        return Verdict(quota.top(scores), calibration.evaluations, {"scores": rounded(scores)})
