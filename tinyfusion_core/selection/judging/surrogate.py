"""A surrogate of short recoveries: which masks may recover best, by those whose losses are known."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from .paired import Mask

NOISE = 0.01
"""Variance of a loss that blocks and pairs of blocks do not explain, as a part of all."""


def predicted(known: Mapping[Mask, float], masks: Sequence[Mask], num_blocks: int) -> Tensor:
    """Predict the losses of masks: the posterior mean of a Gaussian process.

    The covariance of two masks is (s + s²) / 2, where s is the cosine between them as vectors of num_blocks ones and
    zeros less the mean share of kept blocks. So the loss is a sum over blocks and pairs of blocks, with equal prior
    variances of both.

    Args:
        known: finite losses after recoveries of the same length.
        masks: those to predict.
        num_blocks: number of the network's blocks.

    Returns:
        (masks,) predicted losses, in float64.
    """
    share = sum(map(len, known)) / (len(known) * num_blocks)
    seen, new = (_directions(of, share, num_blocks) for of in (known, masks))
    losses = torch.tensor(list(known.values()), dtype=torch.float64)
    covariance = _covariance(seen, seen) + NOISE * torch.eye(len(seen), dtype=torch.float64)
    solved: Tensor = torch.linalg.solve(covariance, torch.stack([losses, torch.ones_like(losses)], 1))
    mean = solved[:, 0].sum() / solved[:, 1].sum()  # of all masks, by generalised least squares
    return mean + _covariance(new, seen) @ (solved[:, 0] - mean * solved[:, 1])


def _directions(masks: Collection[Mask], share: float, num_blocks: int) -> Tensor:
    """Masks as (masks, num_blocks) vectors of length 1."""
    kept = torch.full((len(masks), num_blocks), -share, dtype=torch.float64)
    for row, mask in zip(kept, masks, strict=True):
        row[list(mask)] += 1
    lengths: Tensor = kept.square().sum(1, keepdim=True).sqrt()
    return kept / lengths.clamp(min=1e-12)  # zero where all of a network is kept


def _covariance(masks: Tensor, others: Tensor) -> Tensor:
    s = masks @ others.T
    return (s + s.square()) / 2
