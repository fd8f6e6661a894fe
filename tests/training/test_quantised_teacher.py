"""A quantised copy of the teacher answers: near what the teacher says, in fewer bytes, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import interrupted
import tinyfusion_core as tiny
from small_run import RECIPE, digits_task
from tinyfusion_core.errors import Interrupted
from tinyfusion_core.pipeline.planning.plan import make_plan
from tinyfusion_core.pipeline.planning.training import Hardware
from tinyfusion_core.runtime.seeding import Rng
from tinyfusion_core.training.distilling.distilled import Distilled, objective_of
from tinyfusion_core.training.distilling.quantised import num_bytes, quantised

pytest.importorskip("torchao")  # CONTRIBUTING.md says how
pytestmark = pytest.mark.numerics

TRAINER = tiny.Trainer(batch_size=16, precision="fp32", seed=0, checkpoint_every=4, log_every=1)
INT8, FP8 = "Int8WeightOnlyConfig", {"class_path": "torchao.quantization.Float8WeightOnlyConfig", "init_args": {}}


def decision(task: tiny.Task) -> tiny.Decision:
    return tiny.Decision(blocks=tuple(task.blocks), kept=(0, 1, 3, 6), method="Keep")


def recovered(kd: tiny.OutputKD, run: Path | None = None, trainer: tiny.Trainer = TRAINER) -> dict[str, torch.Tensor]:
    task = digits_task()
    recover, student = tiny.Recover(steps=16, lr=1e-3, ema=0.0, kd=kd), tiny.prune(task, decision(task))
    return recover(task, student, decision(task), trainer, tiny.RunFolder(run) if run else None).state_dict()


@pytest.mark.parametrize(("named", "near"), [(INT8, 0.02), (FP8, 0.1)])
def test_its_answers_are_near_the_teachers_and_so_are_its_blocks_outputs(named: Any, near: float) -> None:
    task = digits_task()
    student, before = tiny.prune(task, decision(task)), task.teacher.state_dict()
    found = []
    for kd in (tiny.MaskedKD(), tiny.MaskedKD(quantise=named)):
        objective = objective_of(task, student, decision(task), TRAINER, kd, None)
        assert isinstance(objective, Distilled)
        batch = task.loss.prepare(task.train.__getitems__(list(range(8))), Rng(0, "recover"))
        prediction, outputs = objective._run_teacher(batch)
        found.append([prediction, *(t for tap in outputs for t in tap)])
    assert len(found[0]) > 1  # what blocks have given, too
    for whole, answer in zip(*found, strict=True):
        distance = (whole - answer).norm() / whole.norm()
        assert 0 < distance < near
    assert all(torch.equal(t, before[name]) for name, t in task.teacher.state_dict().items())


def test_it_holds_a_byte_for_every_weight_of_a_linear_layer_and_learns_nothing() -> None:
    teacher = digits_task().teacher
    linear = sum(m.weight.numel() for m in teacher.modules() if isinstance(m, torch.nn.Linear))
    copy = quantised(teacher, INT8)
    assert not any(p.requires_grad for p in copy.parameters())
    saved = num_bytes(teacher.parameters()) - num_bytes(copy.parameters())
    assert 0.9 * 3 * linear < saved <= 3 * linear  # scales are left


@pytest.mark.slow
def test_a_recovery_from_it_is_near_that_from_the_teacher_and_resumes_exactly(tmp_path: Path) -> None:
    start = tiny.prune(task := digits_task(), decision(task)).state_dict()
    whole, by_copy = recovered(tiny.OutputKD()), recovered(tiny.OutputKD(quantise=INT8))
    apart, moved = (
        sum(float((by_copy[name] - t).square().sum()) for name, t in other.items()) for other in (whole, start)
    )
    assert 0 < apart < 0.1 * moved
    with pytest.raises((KeyboardInterrupt, Interrupted)):
        recovered(tiny.OutputKD(quantise=INT8), tmp_path / "run", replace(TRAINER, callbacks=(interrupted.Stopping(),)))
    interrupted.assert_equal(recovered(tiny.OutputKD(quantise=INT8), tmp_path / "run"), by_copy)


def test_the_plan_counts_what_the_copy_holds_and_says_who_answers(tmp_path: Path) -> None:
    def planned(kd: dict[str, Any]) -> dict[str, str]:
        recipe = {**RECIPE, "recover": {"steps": 4, "kd": {"class_path": "OutputKD", "init_args": kd}}}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        return dict(make_plan(tiny.load_recipe(tmp_path / "recipe.yaml"), hardware=Hardware()).rows)

    whole, by_copy = planned({}), planned({"quantise": INT8})
    assert by_copy["teacher"] == "a quantised copy, 0.33 MB in place of 1.14 MB"
    assert "teacher 1.14 MB, " in whole["recover: memory"]
    assert "teacher 0.33 MB, " in by_copy["recover: memory"]


REFUSED: dict[str, tuple[Any, str]] = {
    "no such": ("Int7Config", r"no torchao\.quantization\.Int7Config .*see Float8WeightOnlyConfig or Int8WeightOnly"),
    "no config": ("torch.nn.Linear", r"torch\.nn\.Linear is no AOBaseConfig"),
    "no path": ({"class_path": "Int8WeightOnlyConfig"}, r"or class_path, torchao\.quantization\.Int8WeightOnlyConfig"),
    "arguments": (
        {"class_path": "torchao.quantization.Int8WeightOnlyConfig", "init_args": {"bits": 3}},
        "cannot be had so: .*unexpected keyword argument",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_config_is_one_message(name: str) -> None:
    named, said = REFUSED[name]
    with pytest.raises(tiny.UserError, match=rf"^Recover\.kd\.quantise: .*{said}"):
        quantised(torch.nn.Linear(4, 4), tiny.OutputKD(quantise=named).quantise)


def test_a_cache_shards_and_a_network_without_linear_layers_are_refused() -> None:
    with pytest.raises(tiny.UserError, match=r"kd\.quantise: with Recover\.kd\.cache no teacher is run"):
        tiny.OutputKD(quantise=INT8, cache=tiny.TeacherCache(folder="cache"))
    with pytest.raises(tiny.UserError, match=r"kd\.quantise: Int8WeightOnlyConfig makes nothing smaller"):
        quantised(torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1)), INT8)
    sharded = replace(TRAINER, sharding="fsdp")
    sharded.__dict__["shards"] = lambda: True
    with pytest.raises(tiny.UserError, match=r"kd\.quantise: does not go with Trainer\.sharding: fsdp"):
        tiny.Recover(kd=tiny.OutputKD(quantise=INT8)).check_trainer(sharded)
