"""Numbers that cancel: networks so much alike that rounding is a large share of what lies between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from tinyfusion_core.testing import run_check
from tinyfusion_core.testing.checks.gating import check_sparse_is_dense
from tinyfusion_core.testing.checks.objective import check_loss_per_sample
from tinyfusion_core.testing.subject import Subject
from toys import Match, Planted


@dataclass(frozen=True)
class Divergence(Match):
    """Cross-entropy of the classes; KL(teacher | student)."""

    def loss(self, prediction: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(prediction, inputs["target"].argmax(1), reduction="none")

    def distance(self, student: Tensor, teacher: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        ours, theirs = student.log_softmax(1), teacher.log_softmax(1)
        return nn.functional.kl_div(ours, theirs, reduction="none", log_target=True).sum(1)


class InSinglePrecision(Divergence):
    """Cannot be run in float64."""

    def predict(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        return super().predict(model, inputs) @ torch.eye(8)


class SinglePrecisionInside(Divergence):
    """Can be, but subtracts in float32."""

    def distance(self, student: Tensor, teacher: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        return super().distance(student.float(), teacher.float(), inputs)


class LeansOnItsBatch(Divergence):
    """A hundredth of what is already small comes from the other samples."""

    def distance(self, student: Tensor, teacher: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        found = super().distance(student, teacher, inputs)
        return found + 0.01 * found.mean()


ALIKE = Planted(scales=(1, 1e-3, 1, 1e-3))


@pytest.mark.parametrize(
    "loss", [Divergence(), InSinglePrecision(), SinglePrecisionInside()], ids=lambda x: type(x).__name__
)
def test_a_distance_that_cancels_passes(loss: Divergence) -> None:
    subject = Subject(ALIKE, loss)
    inputs = subject.inputs()
    with torch.no_grad():
        theirs, ours = (loss.predict(m, inputs) for m in (subject.network(), subject.pruned(subject.every_other())))
        assert loss.distance(ours, theirs, inputs).max() < 1e-6 * loss.loss(theirs, inputs).max()
    run_check(check_loss_per_sample, (ALIKE, loss))
    run_check(check_sparse_is_dense, (ALIKE, loss))


def test_a_distance_that_cancels_and_leans_on_its_batch_is_caught() -> None:
    with pytest.raises(AssertionError, match=r"LeansOnItsBatch\.distance of a sample depends on the others"):
        run_check(check_loss_per_sample, (ALIKE, LeansOnItsBatch()))
