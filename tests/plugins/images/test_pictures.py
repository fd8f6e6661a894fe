"""What every run shows of its networks, whatever release its plugins were written for."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import tinyfusion_core as tiny
from shared_work import TRAINER
from small_run import digits_task
from tinyfusion_core.evaluation.evaluate import known_exhibits, with_standing
from tinyfusion_core.evaluation.generation import sample_rows, training_conditions
from tinyfusion_dit import GaussianDiffusion
from tinyfusion_images import Digits
from tinyfusion_images.pictures import Pictures, by_label, has_pictures, pictures


@dataclass(frozen=True)
class OldData(tiny.DataSource):
    """Has `pixels`, as data had before, and nothing else about pictures."""

    def train(self) -> tiny.Tensors:
        return Digits().train()

    def held_out(self) -> tiny.Tensors:
        return Digits().held_out()

    def pixels(self, x: Tensor) -> Tensor:
        return Digits().pixels(x)


@dataclass(frozen=True)
class Hidden(OldData):
    has_pixels = False


class OldLoss(GaussianDiffusion):
    """Calls conditions labels, as objectives did before."""

    def sample(self, model, like, labels, rng):
        return super().sample(model, like, labels, rng)


def shown(task: tiny.Task, folder: Path) -> dict[str, Tensor]:
    assert Pictures().resume(task, {"teacher": task.teacher}, TRAINER, folder) == []
    return load_file(folder / "samples.safetensors")


def test_plugins_of_before_are_shown_as_ever(tmp_path: Path) -> None:
    now = shown(digits_task(), tmp_path / "now")
    task = digits_task()
    task.loss = OldLoss(learn_sigma=False, sampler="ddim", sampling_steps=3, guided_channels=None)
    old = shown(replace(task, data=OldData()), tmp_path / "old")
    assert now["teacher"].shape == (40, 1, 8, 8)
    assert now["labels"].tolist() == Digits().train().columns["y"][:40].tolist()
    assert old.keys() == now.keys()
    assert all(torch.equal(old[name], now[name]) for name in now)


def test_a_mixture_is_shown_by_its_first_part(tmp_path: Path) -> None:
    mixed = tiny.Mixture(parts={"inner": tiny.Mixture(parts={"digits": OldData()}), "hidden": Hidden()})
    found = shown(replace(digits_task(), data=mixed), tmp_path / "mixed")
    expected = shown(digits_task(), tmp_path / "digits")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_data_that_cannot_be_shown_leave_nothing(tmp_path: Path) -> None:
    for data in (None, Hidden()):
        task = replace(digits_task(), data=data)
        assert not has_pictures(task)
        Pictures().resume(task, {"teacher": task.teacher}, TRAINER, tmp_path)
        assert not list(tmp_path.iterdir())
        with pytest.raises(tiny.UserError, match="cannot show its examples as pictures"):
            pictures(task, task.train.columns["x"][:1])


def test_every_run_shows_pictures_once_and_forgets_them_with_its_evaluation(tmp_path: Path) -> None:
    asked = [tiny.HeldOutLoss(), Pictures()]
    assert with_standing(asked[:1]) == asked
    assert with_standing(asked) == asked
    folder = tiny.RunFolder(tmp_path)
    (tmp_path / "samples.safetensors").touch()
    folder.restart("evaluate", known_exhibits())
    assert not (tmp_path / "samples.safetensors").exists()


def test_generation_is_given_the_column_that_the_data_name() -> None:
    @dataclass(frozen=True)
    class Described(OldData):
        conditions = "text"

    class Echo(GaussianDiffusion):
        def sample(self, model, like, conditions, rng):
            return conditions.sum(1)[:, None, None, None].expand_as(like)

    texts = torch.arange(24.0).view(8, 3)
    rows = tiny.Tensors({"x": torch.zeros(8, 1, 8, 8), "text": texts})
    task = replace(digits_task(), data=Described(), train=rows, loss=Echo(learn_sigma=False))
    conditions = training_conditions(task, range(10))
    made = sample_rows(task, task.teacher, TRAINER, range(10), conditions)
    assert torch.equal(conditions, torch.cat([texts, texts[:2]]))
    assert torch.equal(made[:, 0, 0, 0], conditions.sum(1))
    assert torch.equal(by_label(made, conditions), made)  # no single numbers to sort by
    with pytest.raises(tiny.UserError, match="the data's `text` are no classes"):
        tiny.Frechet(num_samples=10, features=Digits().feature_space())(task, {}, TRAINER)
    with pytest.raises(tiny.UserError, match="the data have no `text`"):
        training_conditions(replace(task, train=Digits().train()), range(10))


def test_large_images_are_small_in_the_report_and_their_prompts_are_told(tmp_path: Path) -> None:
    rows = [{"name": "x", "values": {"teacher": 1.0}, "unit": "", "better": "", "note": ""}]
    (tmp_path / "metrics.json").write_text(json.dumps({"measurements": rows}))
    save_file(
        {"teacher": torch.full((4, 3, 100, 640), 7, dtype=torch.uint8), "labels": torch.tensor([0, 1, 0, 1])},
        tmp_path / "samples.safetensors",
    )
    (tmp_path / "prompts.json").write_text(json.dumps(["a cat", "a dog " * 99]))
    (section,) = Pictures().show(tiny.RunFolder(tmp_path))
    assert "The prompts are 0: a cat; 1: a dog a dog" in section.caption
    assert len(section.caption) < 250
    with Image.open(tmp_path / "figures" / "samples_teacher.png") as picture:
        assert picture.width == 4 * 321 - 1
        assert picture.getpixel((10, 10)) == (7, 7, 7)


def test_the_report_shows_a_few_images_of_many_labels_with_their_labels(tmp_path: Path) -> None:
    folder = tiny.RunFolder(tmp_path)
    rows = [{"name": "x", "values": {"teacher": 1.0}, "unit": "", "better": "", "note": ""}]
    (tmp_path / "metrics.json").write_text(json.dumps({"measurements": rows}))
    labels = torch.tensor([3] * 20 + [0, 1] * 9 + [2, 7])
    images = torch.arange(40, dtype=torch.uint8)[:, None, None, None].expand(40, 1, 8, 8).contiguous()
    save_file({"teacher": images, "labels": labels}, tmp_path / "samples.safetensors")
    (section,) = Pictures().show(folder)
    assert section.caption.endswith("The labels are below the images.")
    assert section.command.format(run="RUN") == "tinyfusion sample RUN --num 64"
    with Image.open(tmp_path / "figures" / "samples_teacher.png") as picture:
        width, height = picture.width / 4, picture.height / 3
        chosen = [picture.getpixel((int((i % 4 + 0.5) * width), int((i // 4 + 0.3) * height))) for i in range(12)]
        below = picture.crop((0, int(0.85 * height), picture.width, int(height)))
        assert below.getextrema() == (0, 255), "labels are written"
    assert labels[chosen].tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 3, 3, 3, 7]
    texts = torch.arange(80.0).view(40, 2)
    save_file({"teacher": images, "labels": texts}, tmp_path / "samples.safetensors")
    (section,) = Pictures().show(folder)
    assert "labels are below" not in section.caption
    with Image.open(tmp_path / "figures" / "samples_teacher.png") as picture:
        assert picture.getpixel((picture.width - 1, picture.height - 1)) == 11, "the first twelve"
