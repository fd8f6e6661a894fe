"""Criteria on networks small enough to work out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from criteria_tasks import TRAINER, Product, TwoStreams, given, scalars, scores, turn
from tinyfusion_core.pruning.decision import Decision
from tinyfusion_core.selection.criteria.calibration import Calibration
from tinyfusion_core.selection.criteria.sensitivity import Greedy, LeaveOneOut, Taylor
from tinyfusion_core.selection.criteria.similarity import (
    BlockInfluence,
    InputOutputMSE,
    LinearCKA,
    SpanSimilarity,
    cosine,
)
from toys import DoubleNet


def test_block_influence_by_hand() -> None:
    x = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[3.0, 4.0], [-1.0, 1.0]]])
    task = given(Product([turn(60), turn(0, 3.0), turn(90), turn(180)]), {"x": x})
    decision = BlockInfluence(keep=2)(task, TRAINER)
    assert scores(decision) == pytest.approx([0.5, 0.0, 1.0, 2.0], abs=1e-6)
    assert decision.kept == (2, 3)
    assert decision.provenance["evaluations"] == 2


def test_input_output_mse_by_hand() -> None:
    # Tokens of length 1 and 3, mean square 5; turning by 60 degrees moves a token by its length.
    x = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    task = given(Product([turn(60), turn(0, 3.0), turn(180)]), {"x": x})
    decision = InputOutputMSE(keep=1)(task, TRAINER)
    # Per feature: 5 / 2, then 5 * 2² / 2, then with lengths tripled 45 * 2² / 2.
    assert scores(decision) == pytest.approx([2.5, 10.0, 90.0], rel=1e-5)
    assert decision.kept == (2,)


def test_leave_one_out_by_hand() -> None:
    # y = 2 * 1 * 4 * x = 8 x, loss (8 x - 1)² / 2 with x = 1, -1: full (49 + 81) / 4.
    decision = LeaveOneOut(keep=2)(scalars(2, 1, 4, x=(1.0, -1.0), target=1), TRAINER)
    without = [((y - 1) ** 2 + (-y - 1) ** 2) / 4 for y in (4, 8, 2)]
    assert scores(decision) == pytest.approx([w - 32.5 for w in without])
    assert decision.kept == (0, 1)
    assert decision.provenance["evaluations"] == 2 * (1 + 3)


def test_greedy_sees_what_belongs_together() -> None:
    task = scalars(4, 0.25, 8, 0.125, target=1)
    # One at a time 4, then 8 seem to cost least; but once 4 has gone, 0.25 must follow.
    assert LeaveOneOut(keep=2)(task, TRAINER).kept == (1, 3)
    decision = Greedy(keep=2)(task, TRAINER)
    assert decision.kept == (2, 3)
    assert decision.provenance["removed"] == [0, 1]
    assert decision.provenance["losses"] == [0.5 * 0.75**2, 0.0]
    assert decision.provenance["evaluations"] == 4 + 3


def test_taylor_by_hand() -> None:
    # y = product of (1 + m (f - 1)) times x; dL/dm = (y - 9) x (f - 1) times the other factors; y = 6 x.
    decision = Taylor(keep=1)(scalars(2, 1, 3, x=(1.0, -1.0), target=9), TRAINER)
    mean = (abs(6 - 9) + abs(-6 - 9)) / 2  # the slopes have both signs
    assert scores(decision) == pytest.approx([mean * 1 * 3, 0.0, mean * 2 * 2])
    assert decision.kept == (2,)
    assert decision.provenance["evaluations"] == 2


def test_nested_budgets_rank_what_a_search_has_kept_before_the_rest() -> None:
    found = Decision(blocks=("b.0", "b.1", "b.2", "b.3"), kept=(0, 2), method="Search", marginals=(0.6, 0.7, 0.9, 0.2))
    assert found.ranking == pytest.approx([1.6, 0.7, 1.9, 0.2])


def test_span_similarity_by_hand() -> None:
    x = torch.tensor([[[1.0, 2.0], [2.0, -1.0]]])
    task = given(Product([turn(10), turn(40), turn(-40), turn(60)]), {"x": x})
    decision = SpanSimilarity(keep=2)(task, TRAINER)
    found = {(s["first"], s["last"]): s["similarity"] for s in decision.provenance["spans"]}
    expected = {(0, 1): 50, (1, 2): 0, (2, 3): 20}
    assert found == pytest.approx({span: math.cos(math.radians(a)) for span, a in expected.items()}, abs=1e-6)
    assert decision.kept == (0, 3)
    assert SpanSimilarity(keep=2, protect=[1])(task, TRAINER).kept == (0, 1)


def test_cka_sees_the_set_of_tokens_and_the_cosine_each_of_them() -> None:
    # A quarter turn moves every token and no distance between them; squashing one feature does the contrary.
    x = torch.tensor([[[5.0, 1.0], [5.0, -1.0], [5.5, 1.0], [5.5, -1.0]]])
    squash = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    task = given(Product([turn(90), turn(-90), squash]), {"x": x})
    assert SpanSimilarity(keep=2, protect=[1])(task, TRAINER).kept == (0, 1)
    assert SpanSimilarity(keep=2, protect=[1], measure="cka")(task, TRAINER).kept == (1, 2)


@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_streamed_cka_is_that_of_all_tokens_at_once(offset: float) -> None:
    x = torch.randn(40, 3, 5)
    x, y = x + offset, torch.tanh(x @ torch.randn(5, 5)) + 0.3 * x - 2 * offset
    measure = LinearCKA()
    for some in torch.randperm(40).split(7):
        measure.add(x[some], y[some])
    # The kernel form: products of samples instead of features.
    kernels = [(t - t.mean(0)) @ (t - t.mean(0)).T for t in (x.flatten(0, 1).double(), y.flatten(0, 1).double())]
    expected = (kernels[0] * kernels[1]).sum() / (kernels[0].norm() * kernels[1].norm())
    assert measure.value() == pytest.approx(float(expected), rel=1e-4)
    assert 0.1 < expected < 0.99


def test_streams_are_averaged_by_name() -> None:
    class Pair(nn.Module):
        """Turns the image by 90 degrees and the text not at all; returns the text first."""

        def forward(self, hidden: Tensor, encoder: Tensor) -> tuple[Tensor, Tensor]:
            return 2 * encoder, hidden @ turn(90).T

    model = DoubleNet(width=2, depth=2)
    model.blocks, model.head = nn.ModuleList([Pair(), Pair()]), nn.Linear(1, 1)
    data = {"hidden": torch.randn(3, 4, 2), "encoder": torch.randn(3, 2, 2)}
    task = given(model, data, TwoStreams)
    assert scores(BlockInfluence(keep=1)(task, TRAINER)) == pytest.approx([0.5, 0.5], abs=1e-6)
    # Over both blocks the image has turned by 180 degrees.
    spans = Calibration(task, TRAINER, 3, 2).compare([(0, 1)], cosine)
    assert spans == pytest.approx([(1 - 1) / 2], abs=1e-6)
    assert LeaveOneOut(keep=1)(task, TRAINER).kept in ((0,), (1,))


def test_a_block_that_works_in_place_is_still_compared_with_its_input() -> None:
    class Flip(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.neg_()

    model = Product([])
    model.blocks = nn.ModuleList([Flip(), nn.Identity()])
    assert scores(BlockInfluence(keep=1)(given(model, {"x": torch.randn(4, 2)}), TRAINER)) == pytest.approx([2, 0])


def test_statistics_are_taken_in_full_precision() -> None:
    # In bf16 the cosine of a token that is turned by half a degree is 1.
    task = given(Product([turn(0.5), turn(0.3)]), {"x": torch.randn(4, 2) + 2})
    model = task.teacher.to(torch.bfloat16)
    task = given(model, {"x": (torch.randn(64, 2) + 2).bfloat16()})
    assert all(-1e-4 < s < 1e-3 for s in scores(BlockInfluence(keep=1)(task, TRAINER)))
    assert len(set(scores(BlockInfluence(keep=1)(task, TRAINER)))) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_measures_run_outside_of_autocast(dtype: torch.dtype) -> None:
    seen: set[tuple[bool, torch.dtype]] = set()

    class Spy(LinearCKA):
        def add(self, x: Tensor, y: Tensor) -> None:
            seen.add((torch.is_autocast_enabled("cpu"), y.dtype))
            super().add(x, y)

    task = given(Product([turn(10).to(dtype)]), {"x": torch.randn(8, 2, dtype=dtype)})
    with torch.autocast("cpu", dtype=torch.bfloat16):  # what the trainer's precision does
        Calibration(task, TRAINER, 8, 4).compare([(0, 0)], Spy)
    assert seen == {(False, dtype)}
