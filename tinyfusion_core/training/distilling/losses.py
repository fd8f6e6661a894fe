"""Losses between the outputs of matched blocks, sample by sample."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize


def feature_loss(student: Tensor, teacher: Tensor, sigma: float | None, mask: str) -> tuple[Tensor, Tensor]:
    """Compare the outputs of a matched pair of blocks, element by element.

    Args:
        student: (batch, ...) output of the student's block.
        teacher: the same of the teacher's block.
        sigma: (unbiased) standard deviations from the sample's mean beyond which an activation is extreme; None leaves
            none out.
        mask: "joint" or "separate", see `MaskedKD`.

    Returns:
        Mean squared differences, (batch,), and the fractions of the activations left out, (batch,).
    """
    s, t = _precise(student).flatten(1), _precise(teacher).flatten(1)
    if sigma is None:
        return (s - t).square().mean(1), s.new_zeros(len(s))
    keep_s, keep_t = _usual(s, sigma), _usual(t, sigma)
    if mask == "joint":
        keep = keep_s & keep_t
        return ((s - t) * keep).square().sum(1) / keep.sum(1).clamp(min=1), 1 - keep.to(s).mean(1)
    left_out = 1 - (keep_s.to(s) + keep_t.to(s)).mean(1) / 2
    return (s * keep_s - t * keep_t).square().mean(1), left_out


def relation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Compare how alike the tokens of a sample are to each other in the outputs of two blocks.

    The mean squared difference of the matrices of similarities, as in similarity-preserving distillation
    (arXiv:1907.09682), between the tokens of a sample in the place of the samples of a batch. A similarity is the
    cosine of two tokens' distances from the mean token.

    Args:
        student: (batch, ..., channels) output of the student's block.
        teacher: (batch, ..., channels) of the teacher's, with as many tokens and any number of channels.

    Returns:
        (batch,) from 0 to 4.
    """
    return (_similarities(student) - _similarities(teacher)).square().mean((1, 2))


def attention_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Compare which tokens of a sample are strong in the outputs of two blocks.

    The squared distance between the maps of squared activations, each divided by its norm (attention transfer,
    arXiv:1612.03928, activation-based).

    Args:
        student: (batch, ..., channels) output of the student's block.
        teacher: (batch, ..., channels) of the teacher's, with as many tokens and any number of channels.

    Returns:
        (batch,) from 0 to 2.
    """
    maps = [normalize(_by_token(x).square().mean(-1), dim=1) for x in (student, teacher)]
    return (maps[0] - maps[1]).square().sum(1)


def map_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Compare where the queries of two blocks look: KL(teacher || student), the mean over heads and queries.

    As MiniLM (arXiv:2002.10957) compares attention.

    Args:
        student: (rows, heads, queries, keys) logarithms of the student's weights.
        teacher: the same of the teacher's.

    Returns:
        (rows,) in nats.
    """
    seen = teacher > -torch.inf  # a key that is masked out counts nothing
    terms = teacher.exp() * (teacher.where(seen, 0.0) - student.where(seen, 0.0))
    return terms.sum(-1).flatten(1).mean(1)


def _similarities(x: Tensor) -> Tensor:
    """(batch, tokens, tokens) cosines of tokens, seen from their mean."""
    tokens = _by_token(x)
    directions = normalize(tokens - tokens.mean(1, keepdim=True), dim=-1)
    return directions @ directions.transpose(1, 2)


def _by_token(x: Tensor) -> Tensor:
    return _precise(x).flatten(1, -2)


def _precise(x: Tensor) -> Tensor:
    """In single precision at least: squares of half precision overflow."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _usual(x: Tensor, sigma: float) -> Tensor:
    x = x.detach()
    return (x - x.mean(1, keepdim=True)).abs() < sigma * x.std(1, keepdim=True)
