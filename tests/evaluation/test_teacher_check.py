"""How much better than nothing a teacher must be, and that the held-out draws are fixed but not all the same."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

import tinyfusion_core as tiny
from tinyfusion_core.evaluation.evaluate import check_teacher
from tinyfusion_core.evaluation.metrics import held_out_inputs
from toys import Match, Planted, planted_data

ONE = torch.tensor(1.0)
TRAINER = tiny.Trainer(batch_size=8, precision="fp32", seed=0)


@dataclass(frozen=True)
class Rated(Match):
    """Predicts its own loss: a share of the loss of a network that knows nothing, which differs between samples."""

    share: Tensor = ONE  # settings are finite numbers, and this one need not be

    def predict(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        return self.share * inputs["x"].square().sum(1)

    def trivial(self, prediction: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        return inputs["x"].square().sum(1)

    def loss(self, prediction: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        return prediction


def a_task(loss: tiny.LossAdapter, num: int = 40) -> tiny.Task:
    return tiny.Task(backbone=Planted(), loss=loss, train=planted_data(), held_out=planted_data(num))


@pytest.mark.parametrize("share", [0.0, 0.5, 0.89])
def test_a_teacher_that_has_learned_a_tenth_passes(share: float) -> None:
    check_teacher(a_task(Rated(share=torch.tensor(share))), TRAINER)


@pytest.mark.parametrize("share", [0.91, 1.0, 3.0, math.nan, math.inf])
def test_a_teacher_that_has_learned_less_is_refused(share: float) -> None:
    with pytest.raises(tiny.UserError, match=r"loss on 40 held-out samples is .* that has learned nothing"):
        check_teacher(a_task(Rated(share=torch.tensor(share))), TRAINER)


@dataclass(frozen=True)
class Timed(Match):
    """Notes the time step, of as many as there are held-out samples, that every sample is looked at."""

    times: list[int] = field(default_factory=list)

    def prepare(self, batch: Mapping[str, Tensor], rng: tiny.Rng) -> dict[str, Tensor]:
        time = rng.integers("time", 20, len(batch["x"]))
        self.times.extend(time.tolist())
        return {**super().prepare(batch, rng), "time": time}


def test_every_draw_spreads_its_times_over_the_samples_in_an_order_of_its_own() -> None:
    loss = Timed()
    task = a_task(loss, 20)
    (found,) = tiny.HeldOutLoss(draws=3, batch_size=7)(task, {"teacher": task.teacher}, TRAINER)
    draws = [loss.times[-60:][i : i + 20] for i in (0, 20, 40)]
    assert [sorted(times) for times in draws] == [list(range(20))] * 3
    assert len(set(map(tuple, draws))) == 3
    assert "3 fixed draws" in found.note


def test_where_nothing_is_drawn_one_pass_is_all() -> None:
    passes: list[int] = []

    class Counted(Match):
        def losses(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
            passes.append(len(inputs["x"]))
            return super().losses(model, inputs)

    task = a_task(Counted(noise=0.0), 20)
    (found,) = tiny.HeldOutLoss(batch_size=20)(task, {"teacher": task.teacher}, TRAINER)
    assert passes == [20]
    assert "1 fixed draw for" in found.note


def test_draws_have_noise_of_their_own_and_seeds_change_nothing() -> None:
    task = a_task(Match(noise=1.0), 20)
    first, again, second = (
        held_out_inputs(task, tiny.Trainer(batch_size=8, precision="fp32", seed=seed), range(5, 9), 20, draw)["x"]
        for seed, draw in ((0, 0), (7, 0), (0, 1))
    )
    assert torch.equal(first, again)
    assert not torch.isclose(first, second).any()
