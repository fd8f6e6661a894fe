"""Prune to a quality: the fewest blocks that recover within a loss, how sure that is, and what is said when none do."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

import tinyfusion_core as tiny
from planted_search import TRAINER, WORKING, task
from small_run import RECIPE
from tinyfusion_core.reporting.figures import draw_quality
from tinyfusion_core.selection.quality import predicted_losses
from toys import Match


def shallowest(loss: str | float, **options) -> tiny.Shallowest:
    return tiny.Shallowest(**{"loss": loss, "steps": 180, "recover_steps": 400, "samples": 32, "lr": 1e-2, **options})


@dataclass(frozen=True)
class Noisy(Match):
    """The teacher has a loss of 1, which nobody can take away."""

    def loss(self, prediction: Tensor, inputs):
        return super().loss(prediction, inputs) + 1


def noisy() -> tiny.Task:
    planted = task()
    planted.loss = Noisy()
    return planted


def test_it_keeps_the_blocks_that_work_and_no_more() -> None:
    planted = noisy()
    before = {name: value.clone() for name, value in planted.teacher.state_dict().items()}
    decision = shallowest("1.0001x")(planted, TRAINER)
    assert list(decision.kept) == WORKING
    assert decision.method == "Shallowest"
    assert all(torch.equal(value, before[name]) for name, value in planted.teacher.state_dict().items())
    tried = decision.provenance["quality"]
    assert [len(entry["kept"]) for entry in tried] == [2, 3, 4]  # of 1 to 7, bisected
    _, three, four = tried
    assert three["predicted"] > three["limit"] == pytest.approx(1.0001 * three["teacher"])
    assert four["predicted"] <= four["limit"]
    assert four["probability"] > 0.9 > 0.1 > three["probability"]


@pytest.mark.slow
def test_a_looser_quality_keeps_fewer_blocks_and_a_number_is_a_loss() -> None:
    loose = shallowest("9x")(noisy(), TRAINER)
    assert len(loose.kept) == 1
    assert len(shallowest(0.001)(task(), TRAINER).kept) == 4


def test_what_is_lacking_falls_as_a_power_of_the_steps() -> None:
    teacher = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    lengths = {steps: teacher + 8 * steps**-0.5 for steps in (4, 16, 64)}
    weights = torch.tensor([[1 / 3, 1 / 3, 1 / 3], [1.0, 0.0, 0.0]], dtype=torch.float64)
    at, found = predicted_losses(lengths, teacher, 400, weights)
    assert at.tolist() == pytest.approx([2.0, 1.0])
    assert found.tolist() == pytest.approx([2.4, 1.4])
    # What does not fall stays; what is better than the teacher is taken as it is.
    worse = {4: teacher + 1, 16: teacher + 3}
    assert predicted_losses(worse, teacher, 400, weights)[1].tolist() == pytest.approx(
        [2 + math.sqrt(3), 1 + math.sqrt(3)]
    )
    better = {4: teacher + 1, 16: teacher - 0.5}
    assert predicted_losses(better, teacher, 400, weights)[1].tolist() == pytest.approx([1.5, 0.5])
    assert predicted_losses({16: teacher + 1}, teacher, 400, weights)[1].tolist() == pytest.approx([3.0, 2.0])


@pytest.mark.slow
def test_it_obeys_rules_and_its_plan_is_that_of_the_deepest_choice() -> None:
    how = shallowest("9x", protect=[5], constraints=tiny.Rules(remove=[0]))
    blocks = task().blocks
    assert how.depths(blocks) == [1, 2, 3, 4, 5, 6, 7]
    assert how.preview(blocks).kept == (1, 2, 3, 4, 5, 6, 7)
    assert how.keeps(blocks) is None
    assert how(noisy(), TRAINER).kept == (5,)
    tied = shallowest("9x", constraints=tiny.Rules(together=[[0, 1, 2, 3, 4, 5, 6, 7]]))
    with pytest.raises(tiny.UserError, match="no number of blocks fits the rules"):
        tied.preview(blocks)


def test_what_cannot_be_is_told() -> None:
    with pytest.raises(tiny.UserError, match=r"^loss is 0\.5: no depth .* of 8 blocks is the best"):
        shallowest(0.5, steps=60)(noisy(), TRAINER)
    with pytest.raises(tiny.UserError, match="loss is 1.05x, and the teacher's is 0; give a number"):
        shallowest("1.05x")(task(), TRAINER)
    with pytest.raises(tiny.UserError, match=r"^steps is 30: too few to try depths with"):
        shallowest("1.05x", steps=30)(noisy(), TRAINER)
    for wrong in ("x", "good", "-1x", 0.0, "nan", "infx"):
        with pytest.raises(tiny.UserError, match=r"^loss is .*a multiple of the teacher's, as 1"):
            shallowest(wrong)
    with pytest.raises(tiny.UserError, match=r"^sure is 1\.0"):
        shallowest("1.05x", sure=1.0)


@pytest.mark.slow
def test_its_figure_is_drawn(tmp_path: Path) -> None:
    found = shallowest("1.0001x")(noisy(), TRAINER).provenance["quality"]
    draw_quality(found, (4, 1.00005), tmp_path / "quality.png")
    assert (tmp_path / "quality.png").stat().st_size > 5000


def test_its_short_recoveries_begin_as_the_recovery_will(tmp_path: Path) -> None:
    short = {"class_path": "Shallowest", "init_args": {"loss": "1.05x"}}
    recipe = {**RECIPE, "search": short, "recover": {"steps": 5, "start": "Refit"}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    loaded = tiny.load_recipe(tmp_path / "recipe.yaml")
    assert [how.start for how in loaded.search.trainings(loaded.trainer, 1)] == [tiny.Refit()]


@dataclass(frozen=True)
class Share(tiny.Metric):
    """How much of the teacher's output a network has, of which more is better."""

    together = True

    def __call__(self, task: tiny.Task, models, trainer: tiny.Trainer) -> list[tiny.Measurement]:
        batch = task.held_out.__getitems__(list(range(len(task.held_out))))
        with torch.no_grad():
            teacher, *others = (
                task.loss.predict(m, task.loss.prepare(batch, tiny.Rng(0, "share"))) for m in models.values()
            )
        values = [1 - float((x - teacher).square().mean() / teacher.square().mean()) for x in (teacher, *others)]
        return [
            tiny.Measurement(f"share of {len(task.held_out)}", dict(zip(models, values, strict=True)), better="higher")
        ]


@dataclass(frozen=True)
class Pointless(tiny.Metric):
    """Measures what is neither better nor worse."""

    def __call__(self, task: tiny.Task, models, trainer: tiny.Trainer) -> list[tiny.Measurement]:
        return [tiny.Measurement("size", dict.fromkeys(models, 1.0))]


def test_a_metric_says_what_is_enough() -> None:
    how = shallowest(None, metric=Share(), within="0.999x", steps=240)
    decision = how(task(), TRAINER)
    assert list(decision.kept) == WORKING
    tried = decision.provenance["quality"]
    assert [len(entry["kept"]) for entry in tried] == [2, 3, 4]
    for entry in tried:
        assert entry["measures"] == "share of 32"  # of those set apart, not the held-out ones
        assert (entry["teacher"], entry["limit"]) == (1.0, 0.999)
        assert len(entry["measured"]) == 3
        assert entry["interval"] is entry["probability"] is None
        assert (entry["predicted"] >= 0.999) == (len(entry["kept"]) == 4)


def test_a_metric_that_cannot_judge_is_told() -> None:
    with pytest.raises(tiny.UserError, match="metric: Pointless has no first measurement of which less or more is"):
        shallowest(None, metric=Pointless(), within="0.9x")(task(), TRAINER)
    with pytest.raises(tiny.UserError, match=r"within is 1\.5x: no depth .* is the best, predicted at"):
        shallowest(None, metric=Share(), within="1.5x", steps=60)(task(), TRAINER)
    for wrong in (
        {},
        {"loss": 1.0, "metric": Share(), "within": 1.0},
        {"metric": Share()},
        {"within": 1.0, "loss": 1.0},
    ):
        with pytest.raises(tiny.UserError, match="give either loss, or metric and within"):
            tiny.Shallowest(**wrong)
