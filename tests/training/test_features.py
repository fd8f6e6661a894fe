"""Distillation of features, other than element by element; and weights that change over the steps."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

import tinyfusion_core as tiny
from interrupted import TRAINER, assert_equal
from marks import slow_but
from small_run import digits_task
from tinyfusion_core.training.distilling.distilled import Distilled
from tinyfusion_core.training.distilling.losses import attention_loss, relation_loss
from tinyfusion_dit import GaussianDiffusion

pytestmark = pytest.mark.numerics
KINDS = [tiny.RelationalKD, tiny.AttentionKD, tiny.AttentionMapKD]
KEPT = [0, 1, 3, 6]


def pair() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(3, 5, 4, generator=draw), torch.randn(3, 5, 7, generator=draw)


def test_relations_are_cosines_from_the_mean_token() -> None:
    student, teacher = pair()  # of other widths
    for row, found in enumerate(relation_loss(student, teacher).tolist()):
        total = 0.0
        for i, j in itertools.product(range(5), repeat=2):
            s, t = (x[row] - x[row].mean(0) for x in (student, teacher))
            total += float(cosine_similarity(s[i], s[j], 0) - cosine_similarity(t[i], t[j], 0)) ** 2
        assert found == pytest.approx(total / 25, rel=1e-4)


def test_relations_are_the_same_turned_scaled_and_moved() -> None:
    student, _ = pair()
    turn, _ = torch.linalg.qr(torch.randn(7, 4, generator=torch.Generator().manual_seed(1)))
    assert relation_loss(student, 3 * student @ turn.T + torch.arange(7.0)).max() < 1e-10
    assert relation_loss(student, student.flip(1)).min() > 1e-2


def test_attention_maps_are_squares_by_token() -> None:
    student, teacher = pair()
    maps = [x.square().mean(-1) / x.square().mean(-1).norm(dim=1, keepdim=True) for x in (student, teacher)]
    torch.testing.assert_close(attention_loss(student, teacher), (maps[0] - maps[1]).square().sum(1))
    assert attention_loss(student, -2 * student).max() < 1e-10


@pytest.mark.parametrize("loss", [relation_loss, attention_loss])
def test_rows_of_pixels_are_tokens_and_half_precision_does_not_overflow(loss: Any) -> None:
    student, teacher = pair()
    pixels = [x.view(3, 5, 1, -1).expand(3, 5, 2, -1) for x in (student, teacher)]
    torch.testing.assert_close(loss(*pixels), loss(*(x.flatten(1, 2) for x in pixels)))
    assert loss(300 * student.half(), 300 * teacher.half()).isfinite().all()
    still = torch.zeros_like(student).requires_grad_()  # directions of nothing
    loss(still, teacher).sum().backward()
    assert still.grad is not None and still.grad.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_a_sample_does_not_depend_on_its_batch(kind: type[tiny.FeatureKD]) -> None:
    task = digits_task()
    decision = tiny.Keep(KEPT)(task, TRAINER)
    objective = Distilled(tiny.prune(task, decision), task, decision, kind())
    batch = task.train.__getitems__(list(range(6)))
    rng = tiny.Rng(0, "recover", 3)
    inputs = task.loss.prepare(batch, rng)
    with torch.no_grad():
        _, whole = objective(inputs, rng)
        parts = [objective({n: t[r] for n, t in inputs.items()}, rng)[1] for r in (slice(0, 2), slice(2, 6))]
    assert objective.terms["feature"].min() > 0
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-6)


class Killed(GaussianDiffusion):
    def prepare(self, batch: tiny.Batch, rng: tiny.Rng) -> dict[str, Tensor]:
        if rng.stage == "recover" and rng.step == 5:
            raise KeyboardInterrupt
        return super().prepare(batch, rng)


def recovered(
    kd: tiny.OutputKD, loss: tiny.LossAdapter | None = None, run: tiny.RunFolder | None = None
) -> dict[str, Tensor]:
    task = digits_task()
    task = task if loss is None else replace(task, loss=loss)
    how = tiny.Trainer(batch_size=8, precision="fp32", checkpoint_every=3, log_every=1, progress=False)
    decision = tiny.Keep(KEPT)(task, how)
    return tiny.Recover(steps=8, lr=1e-3, kd=kd)(task, tiny.prune(task, decision), decision, how, run).state_dict()


@pytest.mark.parametrize("kind", slow_but(KINDS, KINDS[0]))
def test_weights_move_with_the_steps_and_a_killed_recovery_goes_on(kind: type[tiny.FeatureKD], tmp_path: Path) -> None:
    kd = kind(alpha_kd=(0.9, 0.1), alpha_gt=(0.1, 0.9))
    run = tiny.RunFolder(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        recovered(kd, Killed(learn_sigma=False), run)
    assert_equal(recovered(kd, run=run), recovered(kd))
    lines = run.metrics("recover")
    for name, (first, last) in {"alpha_kd": (0.9, 0.1), "alpha_gt": (0.1, 0.9), "beta": kd.beta}.items():
        assert [line[name] for line in lines] == pytest.approx([first + (last - first) * i / 7 for i in range(8)])
    for line in lines:
        total = line["alpha_kd"] * line["kd"] + line["alpha_gt"] * line["gt"] + line["beta"] * line["feature"]
        assert line["loss"] == pytest.approx(total, abs=1e-5)


def test_tokens_that_stand_alone_have_no_relations() -> None:
    with pytest.raises(tiny.UserError, match=r"kd: RelationalKD compares the tokens of a sample, and here"):
        tiny.RelationalKD().compare(torch.zeros(3, 8), torch.zeros(3, 8))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha_kd": (0.5, -1.0)}, r"kd\.alpha_kd is \(0\.5, -1\.0\); expected 0 or more"),
        ({"alpha_kd": (0.5, 0.0), "alpha_gt": 0.0}, r"kd\.alpha_kd is \(0\.5, 0\.0\); expected it or alpha_gt above 0"),
        ({"alpha_kd": (0.5, 0.1, 0.2)}, r"alpha_kd \(of OutputKD\) is .* expected a number or a pair of numbers"),
    ],
)
def test_weights_outside_of_their_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(tiny.UserError, match=message):
        tiny.OutputKD(**settings)
