"""One set of weights for several depths: what every step trains, and what is cut out of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tinyfusion_core as tiny
from marks import slow_but
from small_run import RECIPE, digits_task, run
from tinyfusion_core.cli import main
from tinyfusion_core.pipeline.slices import slice_of
from tinyfusion_core.runtime.files import write_text
from tinyfusion_core.training.depths import at_every_depth
from tinyfusion_core.training.distilling.distilled import Distilled
from tinyfusion_core.training.objective import PlainLoss
from toys import Match, Planted, StopAt, planted_data

TRAINER = tiny.Trainer(batch_size=16, precision="fp32", seed=0, log_every=1)
MARGINALS = (0.9, 0.2, 0.8, 0.7, 0.1, 0.6, 0.3, 0.95)


def planted() -> tuple[tiny.Task, tiny.Decision]:
    data = planted_data()
    backbone = Planted(scales=(0.5, 1, 0.3, 1, 1, 0.2, 0.1, 1))
    task = tiny.Task(backbone=backbone, loss=Match(), train=data, held_out=data)
    return task, tiny.Decision(tuple(task.blocks), (0, 2, 3, 5, 7), "Search", marginals=MARGINALS)


def test_smaller_students_are_inside_of_larger_ones() -> None:
    _, decision = planted()
    assert [decision.inside(num) for num in range(1, 6)] == [(4,), (0, 4), (0, 1, 4), (0, 1, 2, 4), (0, 1, 2, 3, 4)]
    scored = replace(decision, marginals=(), provenance={"scores": [50, -7, 20, 10, 0, 5, 1, 40]})
    assert [scored.inside(num) for num in (1, 2, 3)] == [(0,), (0, 4), (0, 1, 4)]
    with pytest.raises(tiny.UserError, match="6 blocks: the student has 5, so inside of it are 1 to 5"):
        decision.inside(6)
    with pytest.raises(tiny.UserError, match="Keep does not say in which order more blocks would go; take a search"):
        replace(decision, marginals=(), method="Keep").inside(2)
    tied = replace(decision, marginals=(1.0, 0.0, 1.0, 1.0, 0.0, 0.5, 0.0, 0.9))
    assert tied.inside(3) == (0, 1, 2)
    with pytest.raises(tiny.UserError, match="2 blocks: of 0, 2, 3 it is not known which should go before the others"):
        tied.inside(2)


def test_the_whole_student_is_judged(tmp_path: Path) -> None:
    judged = {}
    for depths in ([], [1, 3]):
        task, decision = planted()
        run = tiny.RunFolder(tmp_path / str(depths))
        how = tiny.Recover(
            steps=1, lr=1e-12, lr_final=0, ema=0.0, depths=depths, validation=tiny.Validation(samples=16)
        )
        how(task, tiny.prune(task, decision), decision, TRAINER, run)
        judged[len(depths)] = run.metrics()[-1]["validation"]
    assert judged[2] == pytest.approx(judged[0], rel=1e-4)


@pytest.mark.parametrize("distilled", [False, True])
def test_a_step_is_the_mean_of_the_whole_and_of_those_inside(distilled: bool) -> None:
    task, decision = planted()
    student = tiny.prune(task, decision)

    def made() -> Any:
        if not distilled:
            return PlainLoss(student, task)
        return Distilled(student, task, decision, tiny.OutputKD(alpha_kd=0.0, alpha_gt=1.0))

    inputs, rng = (
        task.loss.prepare(planted_data().__getitems__([*range(6)]), tiny.Rng(0, "test")),
        tiny.Rng(0, "recover"),
    )
    whole = task.loss.losses(student, inputs).mean()
    told, terms = task.loss.predict(student, inputs).detach(), {}
    within = replace(task, model=student)
    for depth in (1, 2, 4):
        smaller = tiny.prune(within, slice_of(within, decision, depth))
        found = task.loss.predict(smaller, inputs)
        own = task.loss.distance(found, told, inputs) if distilled else task.loss.loss(found, inputs)
        terms[depth] = own.mean()
    seen = set()
    with at_every_depth(made(), task, student, decision, [4, 1, 2]) as objective:
        for step in range(8):
            loss, losses = objective(inputs, replace(rng, step=step))
            assert torch.equal(losses.mean(), whole.detach())
            sums = {d: (whole + 0.3 * (terms[1] + terms[d])) / 1.6 for d in (2, 4)}
            (between,) = [d for d, mean in sums.items() if torch.allclose(loss, mean, atol=1e-6)]
            assert torch.allclose(objective.terms["shallowest"].mean(), terms[1], atol=1e-6)
            seen.add(between)
    assert seen == {2, 4}
    loss.backward()
    assert all(p.grad is not None for p in student.parameters())
    with at_every_depth(made(), task, student, decision, [1]) as objective:
        loss, _ = objective(inputs, rng)
    assert torch.allclose(loss, (whole + 0.3 * terms[1]) / 1.3, atol=1e-6)
    assert not any("forward" in vars(module) for module in student.modules())


def test_the_whole_student_is_not_drawn_to_those_inside() -> None:
    task, decision = planted()
    student = tiny.prune(task, decision)
    inputs = task.loss.prepare(planted_data().__getitems__([*range(6)]), tiny.Rng(0, "test"))
    objective = Distilled(student, task, decision, tiny.OutputKD(alpha_kd=0.0, alpha_gt=1e-6))
    with at_every_depth(objective, task, student, decision, [1]) as several:
        loss, _ = several(inputs, tiny.Rng(0, "recover"))
        loss.backward()
    # Of the blocks that only the whole student has, nothing but its own loss moves the weights.
    gone = [p.grad.abs().max() for i, block in enumerate(student.blocks) if i != 4 for p in block.parameters()]
    assert max(gone) < 1e-6
    assert all(p.grad.abs().max() > 1e-4 for p in student.blocks[4].parameters())


def test_what_is_cut_out_was_trained(tmp_path: Path) -> None:
    losses: dict[tuple[int, ...], dict[int, float]] = {}
    for depths in ((), (1, 3)):
        task, decision = planted()
        student = tiny.prune(task, decision)
        tiny.Recover(steps=60, lr=1e-2, ema=0.0, depths=depths)(task, student, decision, TRAINER)
        within = replace(task, model=student)
        found = {depth: tiny.prune(within, slice_of(within, decision, depth)) for depth in (1, 2, 3)}
        (loss,) = tiny.HeldOutLoss(draws=2)(task, {str(d): m for d, m in found.items()}, TRAINER)
        losses[depths] = {depth: float(loss.values[str(depth)] or 0) for depth in found}
    for depth in (1, 2, 3):  # the one between as well, which no step ran
        assert losses[1, 3][depth] < 0.8 * losses[()][depth], depth


@pytest.mark.parametrize("units", [(), ("attention", "mlp")])
def test_recomputed_blocks_change_no_number(units: tuple[str, ...]) -> None:
    states = []
    for again in (False, True):
        task = replace(digits_task(), backbone=replace(digits_task().backbone, units=units))
        num = len(task.blocks)
        decision = tiny.Decision(
            tuple(task.blocks), tuple(range(num - 2)), "Search", marginals=tuple(i / num for i in range(num))
        )
        student, trainer = tiny.prune(task, decision), replace(TRAINER, batch_size=4, activation_checkpointing=again)
        recover = tiny.Recover(steps=2, lr=1e-3, ema=0.0, depths=(2, 4), kd=tiny.OutputKD())
        states.append(recover(task, student, decision, trainer).state_dict())
    for one, two in zip(*(state.values() for state in states), strict=True):
        assert torch.allclose(one, two, atol=1e-6)


def test_a_recovery_at_several_depths_resumes_bit_for_bit(tmp_path: Path) -> None:
    recover = tiny.Recover(steps=16, lr=1e-2, ema=0.5, depths=(1, 2, 3), kd=tiny.OutputKD())
    students = []
    for folder in ("whole", "stopped"):
        task, decision = planted()
        student, where = tiny.prune(task, decision), tiny.RunFolder(tmp_path / folder)
        if folder == "stopped":
            with pytest.raises(KeyboardInterrupt, match="stopped at step 12 of 16"):
                recover(replace(task, loss=StopAt()), tiny.prune(task, decision), decision, TRAINER, where)
        students.append(recover(task, student, decision, TRAINER, where))
    for one, two in zip(*(s.state_dict().values() for s in students), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("units", slow_but([(), ("attention", "mlp")], ()))
def test_a_run_is_sliced(units: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe: dict[str, Any] = json.loads(json.dumps(RECIPE))
    recipe["backbone"]["init_args"]["units"] = [*units]
    keep, depths, between = (10, [4, 7], 5) if units else (6, [2, 4], 3)
    what = "branches" if units else "blocks"
    recipe["search"] = {"class_path": "Taylor", "init_args": {"keep": keep, "samples": 32}}
    recipe["recover"] = {"steps": 4, "kd": "MaskedKD", "depths": depths}
    write_text(tmp_path / "recipe.yaml", json.dumps(recipe))
    assert main(["validate", str(tmp_path / "recipe.yaml")]) == 0
    assert f"{depths[0]}, {depths[1]} of {keep} {what}, 3 passes a step" in capsys.readouterr().out
    assert run(tmp_path / "recipe.yaml", tmp_path / "run") == 0
    assert f"{depths[0]} {what}" in capsys.readouterr().out
    measured = json.loads((tmp_path / "run" / "metrics.json").read_text())["measurements"]
    held_out = next(m["values"] for m in measured if m["name"] == "held-out loss")
    assert [*held_out] == ["teacher", "pruned", f"{depths[0]} {what}", f"{depths[1]} {what}", "recovered"]

    folder = str(tmp_path / "run")
    assert main(["slice", folder, "--depth", str(depths[0])]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "run" / "slices" / str(depths[0]))
    sliced = tiny.load_pretrained(tmp_path / "run" / "slices" / str(depths[0]))
    task = digits_task()
    (loss,) = tiny.HeldOutLoss(draws=1)(task, {"sliced": sliced}, tiny.Trainer(batch_size=8, precision="fp32", seed=3))
    assert loss.values["sliced"] == pytest.approx(held_out[f"{depths[0]} {what}"], rel=1e-6)
    assert main(["slice", folder, "--depth", str(between), "--out", str(tmp_path / "between")]) == 0
    record = json.loads((tmp_path / "between" / "decision.json").read_text())
    whole = json.loads((tmp_path / "run" / "decision.json").read_text())
    assert record["blocks"] == whole["blocks"]  # the teacher's
    assert len(record["kept"]) == between
    assert set(record["kept"]) < set(whole["kept"])
    assert f"{len(whole['blocks'])} → {between} {what}" in (tmp_path / "between" / "README.md").read_text()
    assert main(["slice", folder, "--depth", str(between), "--out", str(tmp_path / "between")]) == 0  # again
    for theirs in (tmp_path / "run" / "student", tmp_path):
        assert main(["slice", folder, "--depth", str(between), "--out", str(theirs)]) == 2
    assert len(json.loads((tmp_path / "run" / "student" / "decision.json").read_text())["kept"]) == keep
    capsys.readouterr()
    for wrong in (depths[0] - 1, keep):
        assert main(["slice", folder, "--depth", str(wrong)]) == 2
        assert f"from {depths[0]}, the smallest of recover.depths, to {keep - 1}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("search", "recover", "message"),
    [
        ({"class_path": "Greedy", "init_args": {"keep": 4}}, {"depths": [2]}, "recover.depths: Greedy does not say in"),
        pytest.param(
            {"pattern": [2, 4]},
            {"depths": [2, 4]},
            "recover.depths: 4 is no smaller student; this one keeps 4",
            marks=pytest.mark.slow,
        ),
        (
            {"pattern": [2, 4]},
            {"depths": [0]},
            "depths (of recover or train) is [0]; expected numbers of blocks from 1",
        ),
    ],
)
def test_depths_that_cannot_be_had(search, recover, message, tmp_path: Path, capsys) -> None:
    write_text(tmp_path / "recipe.yaml", json.dumps({**RECIPE, "search": search, "recover": {"steps": 4, **recover}}))
    assert main(["validate", str(tmp_path / "recipe.yaml")]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_of_one_depth_is_not_sliced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_text(tmp_path / "recipe.yaml", json.dumps({**RECIPE, "search": {"pattern": [2, 4], "steps": 2}}))
    assert run(tmp_path / "recipe.yaml", tmp_path / "run") == 0
    capsys.readouterr()
    assert main(["slice", str(tmp_path / "run"), "--depth", "2"]) == 2
    assert "recover.depths names none" in capsys.readouterr().err
