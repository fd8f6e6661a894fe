"""What a report says of sampling with caches is what the samplings give."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import tinyfusion_core as tiny
from small_run import RECIPE, digits_task, run
from tinyfusion_core.evaluation.cached_sampling import EXHIBIT
from tinyfusion_core.evaluation.caching import Reusing, computed_share, profiled
from tinyfusion_core.pipeline.planning.plan import make_plan
from toys import Match, Planted

TRAINER = tiny.Trainer(batch_size=8, precision="fp32", seed=3)
METRIC = tiny.CachedSampling(thresholds=[0.5, 0.0], num_samples=40, batch_size=20, calibration=4, rounds=1, longest=2)


def test_its_figures_are_those_of_sampling_by_the_schedule() -> None:
    task = digits_task(6)
    student = tiny.prune(task, tiny.Keep([0, 1, 6])(task, TRAINER))
    models = {"teacher": task.teacher.eval(), "pruned": student, "recovered": student}
    rows = {row.name: row for row in METRIC(task, models, TRAINER)}
    assert list(rows) == [
        f"{what}, {cache}"
        for cache in ("no cache", "cache 0.5")
        for what in ("Fréchet distance", "sampling speed-up", "computed calls of blocks")
    ]
    networks = {"teacher": task.teacher, "recovered": student}
    frechet, plans = tiny.Frechet(num_samples=40, batch_size=20), {}
    for name, model in networks.items():
        plans[model] = profiled(task, model, TRAINER, 4, 2).schedule(0.5)
        assert rows["computed calls of blocks, no cache"].values[name] == 100
        assert rows["computed calls of blocks, cache 0.5"].values[name] == 100 * computed_share(plans[model]) < 100
        assert rows["sampling speed-up, cache 0.5"].values[name] > 0
    plain = frechet(task, networks, TRAINER)[0].values
    reusing = frechet(replace(task, loss=Reusing(task.loss, task.backbone, plans)), networks, TRAINER)[0].values
    assert rows["Fréchet distance, no cache"].values == {**plain, "pruned": None}
    assert rows["Fréchet distance, cache 0.5"].values == {**reusing, "pruned": None}
    assert reusing["teacher"] != plain["teacher"]
    assert rows["sampling speed-up, no cache"].values["teacher"] == 1
    assert "over teacher without a cache" in rows["sampling speed-up, no cache"].note


def test_a_run_shows_errors_and_the_trade(tmp_path: Path) -> None:
    options = {"thresholds": [0.4], "num_samples": 20, "calibration": 4, "rounds": 1}
    keep = {"class_path": "Keep", "init_args": {"blocks": [0, 1, 6, 7]}}
    metrics = [{"class_path": "CachedSampling", "init_args": options}]
    recipe, folder = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(yaml.safe_dump({**RECIPE, "search": keep, "recover": {"steps": 2}, "evaluate": metrics}))
    assert run(recipe, folder) == 0
    found = json.loads((folder / EXHIBIT).read_text())
    assert [(p["network"], p["threshold"]) for p in found["points"]] == [
        (name, threshold) for threshold in (0, 0.4) for name in ("teacher", "recovered")
    ]
    profiles = found["profiles"]
    assert [len(profiles[name]["blocks"]) for name in ("teacher", "recovered")] == [8, 4]
    assert all(row[0] is None and min(row[1:]) > 0 for profile in profiles.values() for row in profile["errors"])
    page = (folder / "report.html").read_text()
    for text in ("Sampling with caches", "difference to the call before: recovered", "squares: no cache", "cache 0.4"):
        assert text in page
    (folder / EXHIBIT).write_text("{}")
    with pytest.raises(tiny.UserError, match="cached_sampling.json"):
        METRIC.show(tiny.RunFolder(folder))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"thresholds": [0.1, -0.1]}, r"CachedSampling.thresholds is -0.1; expected 0 or more each"),
        ({"thresholds": []}, r"CachedSampling.thresholds is \[\]; expected at least one"),
        ({"longest": 0}, "CachedSampling.longest is 0; expected at least 1"),
        ({"calibration": 0}, "CachedSampling.calibration is 0"),
        ({"rounds": 0}, "CachedSampling.rounds is 0"),
        ({"num_samples": 1}, "CachedSampling.num_samples is 1; expected at least 2"),
    ],
)
def test_absurd_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(tiny.UserError, match=message):
        tiny.CachedSampling(**options)


def test_a_sampler_of_one_step_is_refused_before_anything_is_spent(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    changes = {
        "backbone": {"class_path": "SiT", "init_args": {"checkpoint": "digits"}},
        "loss": {"class_path": "FlowMatching", "init_args": {"sampler": "euler", "sampling_steps": 1}},
        "evaluate": ["CachedSampling"],
    }
    path.write_text(yaml.safe_dump({**RECIPE, **changes}))
    (problem,) = make_plan(tiny.load_recipe(path)).problems
    assert re.match("loss: FlowMatching .*runs each block once for a sample", problem)


def test_objectives_that_cannot_generate_are_refused() -> None:
    task = tiny.Task.without_data(Planted(), Match(), Planted().build())
    for metric in (METRIC, tiny.Frechet()):
        message = f"^{type(metric).__name__} generates examples, and loss: Match .* cannot; leave it out"
        with pytest.raises(tiny.UserError, match=message):
            metric.check_task(task)
