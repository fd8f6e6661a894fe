"""What a judged recovery is expected to come to: a power law, how wrong it may be, and what is kept and said of it."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import tinyfusion_core as tiny
from tinyfusion_core.cli.watch import _expected
from tinyfusion_core.reporting.expected import what_came
from tinyfusion_core.runtime.stages import FORECASTS
from tinyfusion_core.training.forecasting.forecast import forecast, forecasts, sentence
from toys import Match, Planted, planted_data

TEACHER = 0.5


def lawful(steps: list[int], exponent: float = -0.5) -> list[tuple[int, float]]:
    return [(step, TEACHER + 2 * step**exponent) for step in steps]


def test_a_power_law_is_foretold_exactly() -> None:
    found = forecast(lawful([10, 20, 30, 40]), TEACHER)
    assert found is not None
    assert found.after(1000) == pytest.approx([TEACHER + 2 * 1000**-0.5] * 3)
    assert found.reaching(TEACHER + 2 * 1000**-0.5) == pytest.approx([1000] * 3)
    assert found.reaching(TEACHER) == (math.inf,) * 3
    assert found.reaching(1.0) == (40, 40, 40)  # it is there


def test_the_range_is_as_wide_as_the_law_was_wrong_before() -> None:
    judged = [(10, TEACHER + 0.4), (20, TEACHER + 0.2), (40, TEACHER + 0.05)]
    found = forecast(judged, TEACHER)
    assert found is not None
    # Through the first two the exponent is -1, which misses the third by a factor of 2 over a doubling of the steps;
    # 6.3138 is Student's t of one error.
    assert found.spread == pytest.approx(6.3138 * 1, rel=1e-4)
    slope, height = np.polyfit(np.log([10, 20, 40]), np.log([0.4, 0.2, 0.05]), 1)
    assert found.exponent == pytest.approx(slope)
    likely, low, high = found.after(160)
    assert likely == pytest.approx(TEACHER + math.exp(height) * 160**slope)
    assert TEACHER < low < likely < high == pytest.approx(TEACHER + 0.05)  # the best is kept
    assert replace(found, spread=1e6).after(160) == (likely, TEACHER, high)
    fewest, most = found.reaching(TEACHER + 0.01)[1:]
    assert 40 < fewest < 160 and most == math.inf


def test_a_law_above_the_best_expects_the_best_or_better() -> None:
    judged = [(10, TEACHER + 0.4), (20, TEACHER + 0.35), (30, TEACHER + 0.3), (40, TEACHER + 0.1)]
    found = forecast(judged, TEACHER)
    assert found is not None and found.lacking > 0.1
    likely, low, high = found.after(41)
    assert likely == high == pytest.approx(TEACHER + 0.1)
    assert likely > low == pytest.approx(TEACHER + 0.1 * (41 / 40) ** -found.spread)


def test_nothing_is_foretold_from_too_little_or_below_the_teacher() -> None:
    assert forecast(lawful([10, 20]), TEACHER) is None
    assert forecast([*lawful([10, 20]), (30, math.inf)], TEACHER) is None
    assert forecast([*lawful([10, 20, 30]), (40, 0.4)], TEACHER) is None
    rising = forecast([(10, 1.0), (20, 1.1), (30, 1.2)], TEACHER)
    assert rising is not None and rising.after(90)[0] == 1.0  # what does not fall stays, at the best


def test_the_first_stays_and_the_newest_follows() -> None:
    judged = [(step, loss + step % 20 / 100) for step, loss in lawful([10, 20, 30, 40, 50, 60, 70])]
    made = [forecasts(judged[:n], TEACHER, 40, 70, 0.6) for n in range(1, 8)]
    assert made[:3] == [None] * 3 and made[6] is None
    first = made[3]["first"] if made[3] else None
    assert first is not None and first["step"] == 40 == first["curve"][0][0]
    assert [found["first"] for found in made[3:6] if found] == [first] * 3
    assert [found["newest"]["step"] for found in made[3:6] if found] == [40, 50, 60]
    assert first["curve"][-1][0] == 70
    assert first["reached"] is not None and first["reached"][0] == float(f"{first['reached'][0]:.2g}")


def test_it_is_said_in_words() -> None:
    found = forecasts(lawful([10, 20, 30]), TEACHER, 20, 300, TEACHER + 0.1)
    assert found is not None
    said = sentence(found["first"], 30.0)
    assert said.startswith(
        "after 30 of 300 steps 0.6155 is expected at step 300, in about 4 min 30 s (0.6155 to 0.6155); "
    )
    assert "; 0.6, to stop at, at step 400, in about 6 min 10 s (from step 400 to 400)" in said
    came = what_came(found["first"], [*lawful([10, 20, 30]), (200, 0.7), (300, 0.59), (400, 0.1)])
    assert came.startswith("after 30 steps 0.6155 was expected at step 300 (0.6155 to 0.6155), and the best was 0.59")
    assert came.endswith("was expected at step 400, and was reached at step 300.")
    below = forecasts(lawful([10, 20, 30]), TEACHER, 20, 300, 0.4)
    assert below is not None and sentence(below["first"], 30.0).endswith("; 0.4, to stop at, is not in sight")
    assert what_came(below["first"], lawful([10, 20, 30])).endswith("was not in sight, and was not reached.")


class Noisy(Match):
    """A loss that even the teacher has."""

    def loss(self, prediction: torch.Tensor, inputs: object) -> torch.Tensor:
        return super().loss(prediction, inputs) + 1.0  # type: ignore[arg-type]


def test_a_recovery_keeps_and_says_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    task = tiny.Task(backbone=Planted(), loss=Noisy(), train=planted_data(), held_out=planted_data(16))
    decision = tiny.Decision(blocks=tuple(task.blocks), kept=(1, 3, 4), method="Keep")
    trainer = tiny.Trainer(batch_size=16, precision="fp32")
    how = tiny.Recover(steps=20, lr=1e-3, ema=0.0, validation=tiny.Validation(every=2, samples=16, until="1.001x"))
    folder = tiny.RunFolder(tmp_path / "run")
    with caplog.at_level(logging.INFO, "tinyfusion"):
        how(task, tiny.prune(task, decision), decision, trainer, folder)
    said = [message for message in caplog.messages if "is expected" in message]
    assert len(said) == 1 and said[0].startswith("recover: after 6 of 20 steps")
    found = folder.forecasts()
    assert found is not None and found["first"]["teacher"] == pytest.approx(1.0)
    assert (found["first"]["step"], found["newest"]["step"]) == (6, 18)
    before = folder.metrics()[:-1]  # as watched before the last judgement
    (shown,) = _expected(folder, [entry for entry in before if "validation" in entry])
    assert "at step 20 (" in str(shown) and "1.001" in str(shown)
    assert not list(_expected(folder, folder.metrics()))  # the end is no more expected
    folder.restart("recover")
    assert not (folder / FORECASTS).exists()
    # A teacher that a cache keeps out of memory is not judged, unless it is asked for.
    cache = tiny.TeacherCache(folder=str(tmp_path / "kept"), draws=1)
    tiny.write_cache(cache, task, trainer)
    cached = replace(how, kd=tiny.OutputKD(cache=cache), validation=tiny.Validation(every=2, samples=16, until=0.1))
    cached(task, tiny.prune(task, decision), decision, trainer, folder)
    assert folder.forecasts() is None
