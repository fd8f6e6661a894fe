"""What is left of abilities that a recovery did not train."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml

import tinyfusion_core as tiny
from small_run import RECIPE, digits_task, run
from tinyfusion_images import Digits

TRAINER = tiny.Trainer(batch_size=32, precision="fp32", seed=0, progress=False)


@dataclass(frozen=True)
class Some(Digits):
    """The digits of some labels."""

    labels: tuple[int, ...] = ()

    def train(self) -> tiny.Tensors:
        return self._of(super().train())

    def held_out(self) -> tiny.Tensors:
        return self._of(super().held_out())

    def _of(self, samples: tiny.Samples) -> tiny.Tensors:
        batch = samples.__getitems__(list(range(len(samples))))
        chosen = torch.isin(batch["y"], torch.tensor(self.labels))
        return tiny.Tensors({name: column[chosen] for name, column in batch.items()})


def test_of_the_recipes_own_data_it_is_the_held_out_loss() -> None:
    task = digits_task()
    models = {"teacher": task.teacher, "pruned": tiny.prune(task, tiny.Keep([0, 1, 3, 6])(task, TRAINER))}
    retention = tiny.Retention(data={"digits": Digits()}, draws=1)
    loss, kept = tiny.evaluate(task, models, [tiny.HeldOutLoss(draws=1), retention], TRAINER)[-2:]
    assert kept.name == "loss on digits"
    assert kept.values == loss.values


@pytest.mark.slow
def test_what_a_recovery_did_not_see_it_gets_worse_at() -> None:
    """The same steps on all labels and on one: on the others the second student is behind."""
    others = tiny.Retention(data={"others": Some(labels=(1, 2, 3, 4, 5, 6, 7, 8, 9))}, draws=2)
    whole, one = digits_task(), digits_task()
    one.train = Some(labels=(0,)).train()
    found = []
    for task in (whole, one):
        decision = tiny.Keep([0, 1, 3, 6])(task, TRAINER)
        student = tiny.prune(task, decision)
        tiny.Recover(steps=40, lr=1e-3, ema=0.0)(task, student, decision, TRAINER)
        (kept,) = others(task, {"student": student}, TRAINER)
        found.append(float(kept.values["student"] or 0))
    assert found[1] > 1.1 * found[0]


PLUGIN = """
from dataclasses import dataclass

import torch

import tinyfusion_core as tiny
from tinyfusion_images import Digits


@dataclass(frozen=True)
class Fives(Digits):
    side: int = 8

    def held_out(self):
        samples = super().held_out()
        batch = samples.__getitems__(list(range(len(samples))))
        of = batch["y"] == 5
        return tiny.Tensors({"x": batch["x"][of][..., : self.side], "y": batch["y"][of]})


@tiny.hookimpl
def tinyfusion_register_data():
    return [Fives]
"""


def recipe_at(folder: Path, **arguments: int) -> Path:
    (folder / "fives.py").write_text(PLUGIN)
    fives = {"class_path": "Fives", "init_args": arguments}
    retention = {"class_path": "Retention", "init_args": {"data": {"fives": fives}, "draws": 1}}
    keep = {"class_path": "Keep", "init_args": {"blocks": [0, 1, 3, 6]}}
    recipe = {**RECIPE, "plugins": ["fives.py"], "search": keep, "recover": {"steps": 3}, "evaluate": [retention]}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def test_a_recipe_names_its_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(recipe_at(tmp_path), tmp_path / "run") == 0
    measured = json.loads((tmp_path / "run" / "metrics.json").read_text())["measurements"]
    (row,) = [m for m in measured if m["name"] == "loss on fives"]
    assert 0 < row["values"]["teacher"] < row["values"]["pruned"]
    assert "loss on fives" in capsys.readouterr().out


def test_data_that_the_network_cannot_read_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(recipe_at(tmp_path, side=6), tmp_path / "run") == 2
    told = capsys.readouterr().err
    assert (
        "Retention.data.fives: its held-out samples have the columns {'x': [1, 8, 6], 'y': []}, those of data" in told
    )
    assert not (tmp_path / "run").exists()  # before anything is spent


def test_settings_outside_of_their_range() -> None:
    with pytest.raises(tiny.UserError, match=r"Retention\.data is \{\}; expected at least one data set"):
        tiny.Retention(data={})
    with pytest.raises(tiny.UserError, match=r"Retention\.draws is 0"):
        tiny.Retention(data={"digits": Digits()}, draws=0)
