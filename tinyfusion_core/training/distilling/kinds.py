"""Distillation by what tokens have in common, by which of them are strong, and by where they look."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import Tensor, nn
from typing_extensions import override

from ...errors import UserError
from ...protocols.blocks.attention import attention_maps
from ...protocols.blocks.streams import Streams
from ...pruning.decision import Decision
from ..distillation import FeatureKD, Tap
from .losses import attention_loss, map_loss, relation_loss


@dataclass(frozen=True, kw_only=True)
class RelationalKD(FeatureKD):
    """Also match how alike the tokens of a sample are to each other behind the teacher's blocks.

    The feature loss is the mean over taps of the mean squared difference of cosines between tokens, seen from their
    mean (after arXiv:1907.09682, with the tokens of a sample in the place of the samples of a batch). So it does not
    depend on how a batch is divided. It takes a square of the tokens for each sample and tap.

    Args:
        alpha_kd: weight of the distance to the teacher's prediction, as the objective defines it; of a pair, the weight
            at the first and at the last step, linear in between.
        alpha_gt: weight of the training loss, or two.
        cache: the teacher's predictions, written beforehand; its `blocks` must hold those that the taps name.
        on_policy: share of the steps that learn from samples which the student makes itself, see `OutputKD`.
        quantise: how a copy of the teacher that answers is quantised, see `OutputKD`.
        beta: weight of the feature loss at the first and at the last step, linear in between.
        taps: pairs of (student block, teacher block), counted from 0; by default derived from the decision.
    """

    beta: tuple[float, float] = (1.0, 0.0)

    @override
    def compare(self, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        if student[0, ..., 0].numel() < 2:
            raise UserError(
                "recover.kd: RelationalKD compares the tokens of a sample, and here each has one; take MaskedKD"
            )
        return {"feature": relation_loss(student, teacher)}


@dataclass(frozen=True, kw_only=True)
class AttentionKD(FeatureKD):
    """Also match which tokens are strong behind the teacher's blocks: attention transfer.

    The feature loss is the mean over taps of the squared distance between maps of squared activations, one number for
    each token, divided by their norm (arXiv:1612.03928, activation-based).

    Args:
        alpha_kd: weight of the distance to the teacher's prediction, as the objective defines it; of a pair, the weight
            at the first and at the last step, linear in between.
        alpha_gt: weight of the training loss, or two.
        cache: the teacher's predictions, written beforehand; its `blocks` must hold those that the taps name.
        on_policy: share of the steps that learn from samples which the student makes itself, see `OutputKD`.
        quantise: how a copy of the teacher that answers is quantised, see `OutputKD`.
        beta: weight of the feature loss at the first and at the last step, linear in between.
        taps: pairs of (student block, teacher block), counted from 0; by default derived from the decision.
    """

    beta: tuple[float, float] = (1.0, 0.0)

    @override
    def compare(self, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        return {"feature": attention_loss(student, teacher)}


@dataclass(frozen=True, kw_only=True)
class AttentionMapKD(FeatureKD):
    """Also match where the queries of the teacher's blocks look: their attention maps.

    The feature loss is the mean over taps of KL(teacher || student) of the attention weights, a mean over heads and
    queries (arXiv:2002.10957). Blocks have to call torch's `scaled_dot_product_attention`. The maps take a square of
    the tokens for each head, sample and tap.

    Args:
        alpha_kd: weight of the distance to the teacher's prediction, as the objective defines it; of a pair, the weight
            at the first and at the last step, linear in between.
        alpha_gt: weight of the training loss, or two.
        cache: not possible: no cache keeps maps.
        on_policy: share of the steps that learn from samples which the student makes itself, see `OutputKD`.
        quantise: how a copy of the teacher that answers is quantised, see `OutputKD`.
        beta: weight of the feature loss at the first and at the last step, linear in between.
        taps: pairs of (student block, teacher block), counted from 0; by default each block and what it was in the
            teacher. The ends of gaps, where outputs are compared, look elsewhere, and to follow them does harm.
    """

    beta: tuple[float, float] = (0.1, 0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cache is not None:
            raise UserError("recover.kd.cache: no cache keeps attention maps; leave it out, or distil with MaskedKD")

    @override
    def taps_for(self, decision: Decision) -> list[Tap]:
        return list(enumerate(decision.kept)) if self.taps is None else super().taps_for(decision)

    @override
    def watched(
        self, model: nn.Module, paths: Sequence[str], streams: Streams
    ) -> AbstractContextManager[list[list[Tensor]]]:
        return attention_maps(model, paths)

    @override
    def compare(self, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        return {"feature": map_loss(student, teacher)}
