"""How a recovery moves: warm-up, rates beside gaps, and judgements that keep the best and end it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import tinyfusion_core as tiny
from interrupted import assert_equal, lines
from marks import slow_but
from small_run import RECIPE, run
from tinyfusion_core.cli import main
from tinyfusion_core.dataloading.set_apart import set_apart
from tinyfusion_core.errors import UserError
from tinyfusion_core.registry import registry as plugins
from tinyfusion_core.training.objective import cosine, warmed
from tinyfusion_core.training.validation import mean_loss
from toys import Match, Planted, planted_data

pytestmark = pytest.mark.numerics
TRAINER = tiny.Trainer(batch_size=16, precision="fp32", seed=0, checkpoint_every=4, log_every=3)
JUDGED = tiny.Validation(every=5, samples=16)


def task_of(loss: tiny.LossAdapter | None = None, train: Any = None) -> tiny.Task:
    return tiny.Task(backbone=Planted(), loss=loss or Match(), train=train or planted_data(), held_out=planted_data(16))


def recovered(recover: tiny.Recover, run: tiny.RunFolder | None = None, **given: Any) -> dict[str, torch.Tensor]:
    task, trainer = given.get("task") or task_of(), given.get("trainer", TRAINER)
    decision = tiny.Decision(blocks=tuple(task.blocks), kept=given.get("kept", (1, 3, 4)), method="Keep")
    return recover(task, tiny.prune(task, decision), decision, trainer, run).state_dict()


def judged(run: tiny.RunFolder) -> dict[int, float]:
    return {entry["step"]: entry["validation"] for entry in run.metrics() if "validation" in entry}


def test_the_rate_rises_and_then_falls() -> None:
    schedule = warmed(cosine(0.1), 11, 0.4)
    found = [schedule(step / 10) for step in range(11)]
    assert found[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert found[4] == 1.0
    assert found[10] == pytest.approx(0.1)
    assert found[4:] == sorted(found[4:], reverse=True)
    plain = cosine(0.1)
    assert warmed(plain, 11, 0.0) is plain
    assert warmed(plain, 1, 0.9)(0.0) == 0.5  # the only step is one of the warm-up


def test_blocks_beside_gaps_are_those_next_to_removed_ones_in_their_list() -> None:
    names = (*(f"a.{i}" for i in range(5)), *(f"b.{i}" for i in range(4)))
    decision = tiny.Decision(blocks=names, kept=(0, 1, 3, 4, 6, 8), method="Keep")
    # a: 0 1 . 3 4, b: . 6 . 8; the end of one list is no neighbour of the other.
    assert decision.beside_gaps == (1, 2, 4, 5)
    assert tiny.Decision(blocks=names, kept=tuple(range(9)), method="Keep").beside_gaps == ()


def test_rates_are_what_was_asked_for(tmp_path: Path) -> None:
    folder = tiny.RunFolder(tmp_path)
    how = tiny.Recover(steps=6, lr=1e-2, lr_final=1e-3, warmup=0.5, gap_lr=4.0)
    recovered(how, folder, kept=(0, 1, 2, 6))
    (middle, end) = [entry["lr"] for entry in folder.metrics() if entry["step"] in (3, 6)]
    assert middle == pytest.approx([0.75e-2, 3e-2])
    assert end == pytest.approx([1e-3, 4e-3])


def test_the_best_is_kept_and_what_judges_is_not_trained_on(tmp_path: Path) -> None:
    seen: set[int] = set()

    class Watched:
        def __len__(self) -> int:
            return 64

        def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
            seen.update(indices)
            return planted_data().__getitems__(indices)

    task, folder = task_of(train=Watched()), tiny.RunFolder(tmp_path)
    how = tiny.Recover(steps=40, lr=0.3, schedule="constant", ema=0.0, validation=JUDGED)
    found = recovered(how, folder, task=task)
    _, apart = set_apart(task.train, 16, 0, "validation")
    losses = judged(folder)
    assert list(losses) == [5, 10, 15, 20, 25, 30, 35, 40]
    best = min(losses, key=losses.__getitem__)
    assert best < 40, losses  # the rate is far too high to end with the best
    student = tiny.prune(task, tiny.Decision(blocks=tuple(task.blocks), kept=(1, 3, 4), method="Keep"))
    student.load_state_dict(found)
    assert mean_loss(task, student, apart, TRAINER) == losses[best]
    seen.clear()
    rest, _ = set_apart(task.train, 16, 0, "validation")
    rest.__getitems__(list(range(len(rest))))
    assert seen.isdisjoint(apart.indices)
    assert len(seen) == 48


def test_the_average_is_judged_if_there_is_one(tmp_path: Path) -> None:
    folder, task = tiny.RunFolder(tmp_path), task_of()
    found = recovered(tiny.Recover(steps=10, lr=1e-2, ema=0.8, validation=JUDGED), folder)
    student = tiny.prune(task, tiny.Decision(blocks=tuple(task.blocks), kept=(1, 3, 4), method="Keep"))
    student.load_state_dict(found)
    _, apart = set_apart(task.train, 16, 0, "validation")
    assert mean_loss(task, student, apart, TRAINER) == min(judged(folder).values())


@pytest.mark.parametrize("update", [None, tiny.LoRA(rank=2)])
def test_patience_ends_it(update: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny.RunFolder(tmp_path)
    how = tiny.Recover(
        steps=400, lr=0.3, schedule="constant", ema=0.0, update=update, validation=replace(JUDGED, patience=2)
    )
    found = recovered(how, folder)
    losses = judged(folder)
    best = min(losses, key=losses.__getitem__)
    assert max(losses) == best + 10 < 400
    said = " ".join(capsys.readouterr().err.split())
    assert f"recover: ended at step {best + 10} of 400: 2 judgements brought no new best" in said
    again = recovered(how, folder)  # finished: nothing is trained again
    assert_equal(found, again)
    assert judged(folder) == losses


def test_a_quality_ends_it(tmp_path: Path) -> None:
    task, reached = task_of(), []
    _, apart = set_apart(task.train, 16, 0, "validation")
    assert mean_loss(task, task.teacher, apart, TRAINER) == 0  # the toy's target is the teacher's output
    for name, until in (("number", 0.05), ("unreached", 1e-9)):
        folder = tiny.RunFolder(tmp_path / name)
        (tmp_path / name).mkdir()
        recovered(tiny.Recover(steps=60, lr=1e-2, validation=replace(JUDGED, until=until)), folder)
        reached.append(judged(folder))
    assert max(reached[0]) < 60
    assert reached[0][max(reached[0])] <= 0.05 < min([*reached[0].values()][:-1])
    assert max(reached[1]) == 60


def test_a_multiple_is_of_the_teachers_loss_on_the_same_samples(tmp_path: Path) -> None:
    class Noisy(Match):
        """A loss that even the teacher has."""

        def loss(self, prediction: torch.Tensor, inputs: Any) -> torch.Tensor:
            return super().loss(prediction, inputs) + 1.0

    folder = tiny.RunFolder(tmp_path)
    how = tiny.Recover(steps=60, lr=1e-2, validation=replace(JUDGED, until="1.05x"))
    recovered(how, folder, task=task_of(Noisy()))
    losses = judged(folder)
    assert losses[max(losses)] <= 1.05 < min([*losses.values()][:-1])
    assert max(losses) < 60


ITS_OWN_TARGET = """
import tinyfusion_core as tiny
from tinyfusion_dit import GaussianDiffusion

class Own(GaussianDiffusion):
    \"\"\"The teacher has no loss, as a network that is its own target.\"\"\"

    def loss(self, prediction, inputs):
        return 0 * super().loss(prediction, inputs)

    def trivial(self, prediction, inputs):
        return None

@tiny.hookimpl
def tinyfusion_register_losses():
    return [Own]
"""


@pytest.mark.parametrize("command", slow_but(["run", "compare"], "run"))
def test_a_multiple_of_nothing_is_refused_before_the_search(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugins, "_files", {})  # what is loaded here is not seen by other tests
    (tmp_path / "own.py").write_text(ITS_OWN_TARGET)
    own = {**RECIPE["loss"], "class_path": "Own"}
    search = {"class_path": "Search", "init_args": {"keep": 4, "steps": 2}}
    recover = {"steps": 2, "validation": {"samples": 8, "until": "1.03x"}}
    recipe = {**RECIPE, "plugins": ["own.py"], "loss": own, "search": search, "recover": recover}
    recipe["compare"] = {"candidates": {"first": {"class_path": "FirstN", "init_args": {"keep": 4}}}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main([command, str(tmp_path / "recipe.yaml"), "--run-dir", str(tmp_path / "run")]) == 2
    assert "until, validation (of recover) is 1.03x, and the teacher's is 0; give a number" in capsys.readouterr().err
    left = {path.name for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert not left & {"decision.json", "metrics.jsonl"} and not [n for n in left if n.startswith("decision-")]
    with pytest.raises(UserError, match="the teacher's is 0"):
        replace(JUDGED, until="1.05x").check_teacher(task_of(), TRAINER)
    replace(JUDGED, until=0.1).check_teacher(task_of(), TRAINER)


def test_it_goes_on_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    how = tiny.Recover(steps=20, lr=0.1, ema=0.0, warmup=0.2, gap_lr=2.0, validation=JUDGED)
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    whole = recovered(how, tiny.RunFolder(tmp_path / "whole"))
    log = tiny.RunFolder.log

    def stopping(self: tiny.RunFolder, stage: str, step: int, values: dict[str, Any]) -> None:
        log(self, stage, step, values)
        if step == 15:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tiny.RunFolder, "log", stopping)
        with pytest.raises(KeyboardInterrupt):
            recovered(how, tiny.RunFolder(tmp_path / "stopped"))
    assert_equal(recovered(how, tiny.RunFolder(tmp_path / "stopped")), whole)
    assert lines(tiny.RunFolder(tmp_path / "stopped")) == lines(tiny.RunFolder(tmp_path / "whole"))
    foretold = tiny.RunFolder(tmp_path / "whole").forecasts()
    assert foretold is not None and foretold["first"]["step"] == 15
    assert tiny.RunFolder(tmp_path / "stopped").forecasts() == foretold


def test_with_a_cache_no_draw_of_what_judges_is_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tinyfusion_core.training.teacher_cache import samples

    cache, task, seen = tiny.TeacherCache(folder=str(tmp_path / "kept"), draws=3), task_of(), set()
    tiny.write_cache(cache, task, TRAINER)
    read = samples.CachedSamples.__getitems__

    def noting(self: Any, indices: list[int]) -> Any:
        seen.update(index % 64 for index in indices)
        return read(self, indices)

    monkeypatch.setattr(samples.CachedSamples, "__getitems__", noting)
    recovered(tiny.Recover(steps=12, lr=1e-2, kd=tiny.OutputKD(cache=cache), validation=JUDGED))
    _, apart = set_apart(task.train, 16, 0, "validation")
    assert len(seen) == 48
    assert seen.isdisjoint(apart.indices)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "warmup": ({"warmup": 1.0}, "warmup .of recover or train. is 1.0; expected a fraction from 0 to below 1"),
    "gap_lr": ({"gap_lr": 0.0}, "gap_lr .of recover or train. is 0.0; expected a factor above 0"),
    "every": ({"validation": {"every": 0}}, "every, validation"),
    "samples": ({"validation": {"samples": 0}}, "samples, validation"),
    "patience": ({"validation": {"patience": 0}}, "patience, validation"),
    "until": ({"validation": {"until": "good"}}, "until, validation .of recover. is 'good'; expected a multiple"),
    "until zero": ({"validation": {"until": 0.0}}, "until, validation .of recover. is 0.0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_settings_are_one_message(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given, said = BAD[name]
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, "recover": {"steps": 4, **given}}))
    assert run(path, tmp_path / "run") == 2
    assert re.search(said, " ".join(capsys.readouterr().err.split()))


def test_a_fresh_network_has_no_gaps_and_no_teacher() -> None:
    for how, said in (
        (tiny.Recover(steps=2, gap_lr=2.0), "Recover.gap_lr"),
        (tiny.Recover(steps=2, validation=replace(JUDGED, until="1.1x")), "Recover.validation.until"),
    ):
        with pytest.raises(UserError, match=said):
            how(task_of(), Planted().build(), None, TRAINER)


def test_a_recipe_says_it_and_the_plan_shows_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tinyfusion_core.cli import main

    path = tmp_path / "small.yaml"
    validation = {"every": 1, "samples": 16, "patience": 3, "until": "1.01x"}
    search = {"class_path": "Keep", "init_args": {"blocks": [0, 1, 6, 7]}}
    recover = {"steps": 4, "warmup": 0.25, "gap_lr": 3.0, "validation": validation}
    path.write_text(yaml.safe_dump({**RECIPE, "search": search, "recover": recover, "evaluate": []}))
    assert main(["validate", str(path)]) == 0
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert (
        "judged every 1 steps on 16 training samples set apart, until 3 in a row are no better, until the loss" in said
    )
    assert "judged on" not in said
    assert main(["validate", str(path), "--recover.validation.samples", "751"]) == 0
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "recover: judged on 750 samples, half of those to train on" in said
    assert run(path, tmp_path / "run") == 0
    assert list(judged(tiny.RunFolder(tmp_path / "run"))) == [1, 2, 3, 4]
    assert "recover: after 3 of 4 steps" in capsys.readouterr().err
    report = (tmp_path / "run" / "report.html").read_text()
    assert "Recover: after 3 steps" in report and "forecast after 3 steps" in report
