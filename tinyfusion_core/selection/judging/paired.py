"""Paired comparisons: networks judged on the same samples, whose differences are told from noise sample by sample."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

Mask = tuple[int, ...]
"""Indices of the kept blocks, ascending."""


def mean_of(losses: Tensor) -> float:
    """Return the mean of the losses of one network, (samples,)."""
    return float(losses.mean())


def difference(losses: Tensor, of: Tensor) -> tuple[float, float]:
    """Return the mean paired difference of two networks' losses, both (samples,), and its standard error."""
    paired = losses - of
    return float(paired.mean()), float(paired.std()) / math.sqrt(len(paired))


def leading(losses: Mapping[Mask, Tensor], leader: Mask | None, sure: float) -> Mask:
    """Return who leads: the leader so far, unless the one with the lowest loss is better by more than noise.

    Args:
        losses: losses of each entrant, (samples,).
        leader: who has led so far; None takes the lowest loss.
        sure: standard errors beyond which a difference is no noise.
    """
    best = min(losses, key=lambda mask: mean_of(losses[mask]))
    return best if leader is None or _worse(losses[leader], losses[best], sure) else leader


def surviving(losses: Mapping[Mask, Tensor], leader: Mask) -> list[Mask]:
    """Return who enters the next round, the leader first: a third of all, but two.

    However surely they are behind: which recovers best in the end may be behind by twenty standard errors after ten
    steps, see "Races" in `benchmarks/RESULTS.md`.

    Args:
        losses: losses of each entrant, (samples,); who has infinite ones does not go on.
        leader: who leads.
    """
    means = {mask: mean_of(values) for mask, values in losses.items() if mask != leader}
    others = sorted((mask for mask in means if math.isfinite(means[mask])), key=means.__getitem__)
    return [leader, *others[: max(1, math.ceil(len(losses) / 3) - 1)]]


def _worse(losses: Tensor, of: Tensor, sure: float) -> bool:
    """Whether losses, (samples,), are higher than others by more than noise. Infinite ones are."""
    mean, error = difference(losses, of)
    return not mean <= sure * error
