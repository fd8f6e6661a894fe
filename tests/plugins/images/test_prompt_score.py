"""Pictures and their prompts, judged by a CLIP model: its own numbers, and who wins how surely."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import diffusers_whole
import tinyfusion_core as tiny
from shared_work import TRAINER
from small_run import digits_task
from tinyfusion_core.errors import MissingFileError
from tinyfusion_core.runtime.seeding import generator
from tinyfusion_dit import GaussianDiffusion
from tinyfusion_images import PromptScore

TEXTS = [*diffusers_whole.PROMPTS, "a " + "very " * 100 + "long walk"]


@dataclass(frozen=True)
class Painter:
    """Paints noise in which a network's first weight shows; nothing where that is not a number."""

    texts: Sequence[str] = tuple(TEXTS)
    same: Sequence[int] = ()

    def opened(self) -> Callable[[nn.Module, Sequence[int], Sequence[torch.Generator]], Tensor]:
        def draw(model: nn.Module, numbers: Sequence[int], streams: Sequence[torch.Generator]) -> Tensor:
            first = next(model.parameters()).flatten()[0].detach()
            noise = torch.stack([torch.rand(3, 12, 12, generator=stream) for stream in streams])
            own = torch.tensor([number not in self.same for number in numbers])[:, None, None, None]
            return torch.where(own, (noise - first).abs().clamp(0, 1), noise)

        return draw


@dataclass(frozen=True, kw_only=True)
class Painted(GaussianDiffusion):
    pipeline: Painter | None = None


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return diffusers_whole.clip_model(tmp_path_factory.mktemp("judge") / "clip")


def task_of(painter: Painter) -> tuple[tiny.Task, dict[str, nn.Module]]:
    task = replace(digits_task(), loss=Painted(learn_sigma=False, pipeline=painter))
    models = {name: task.backbone.build() for name in ("teacher", "pruned", "student", "diverged")}
    for model, value in zip(models.values(), (0.0, 0.0, 0.3, float("nan")), strict=True):
        nn.init.constant_(next(model.parameters()), value)
    return task, models


def cosines(clip: Path, task: tiny.Task, model: nn.Module) -> Tensor:
    """Worked out by transformers alone, for one picture after the other."""
    judge, processor = (cls.from_pretrained(clip) for cls in (transformers.CLIPModel, transformers.CLIPProcessor))
    streams = [generator(TRAINER.seed, "pictures", i) for i in range(len(TEXTS))]
    images = (255 * task.loss.pipeline.opened()(model, range(len(TEXTS)), streams)).round().to(torch.uint8)
    found = []
    for text, image in zip(TEXTS, images, strict=True):
        told = processor(text=[text], images=[image], return_tensors="pt", truncation=True, max_length=77)
        with torch.no_grad():
            found.append(judge.eval()(**told).logits_per_image[0, 0] / judge.logit_scale.exp())
    return torch.stack(found).double()


def test_scores_are_the_models_own_and_the_better_pictures_win(clip: Path, tmp_path: Path) -> None:
    task, models = task_of(Painter(same=(1, 3)))
    metric = PromptScore(model=str(clip), batch_size=2)
    score, wins = metric.resume(task, models, TRAINER, tmp_path)
    teacher, student = (cosines(clip, task, models[name]) for name in ("teacher", "student"))
    assert teacher.std() > 0.01
    scale = float(transformers.CLIPModel.from_pretrained(clip).logit_scale.detach().exp())
    assert score.name == metric.column == "prompt score (clip)"
    for name, own in (("teacher", teacher), ("student", student)):
        assert score.values[name] == pytest.approx(scale * float(own.clamp(min=0).mean()), abs=1e-5)
    assert score.values["pruned"] is score.values["diverged"] is None
    assert (
        score.note == "one picture for each of 5 prompts, judged by clip; not sampled, or not finite: pruned, diverged"
    )
    won = (student > teacher).double()
    won[[1, 3]] = 0.5  # the same picture
    assert wins.name == "win rate over the teacher (clip)"
    assert wins.values == {
        "teacher": None, "pruned": None, "student": pytest.approx(float(won.mean())), "diverged": None,
    }  # fmt: skip
    assert wins.note.endswith(f"ties half; standard error: student {float(won.std() / 5**0.5):.2g}")

    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert len(kept) == 9
    gone = sorted(kept)[0]
    gone.unlink()
    assert metric.resume(task, models, TRAINER, tmp_path) == [score, wins]
    assert {path for path, when in kept.items() if path.stat().st_mtime_ns != when} == {gone}
    (few, _) = replace(metric, num_prompts=2, pruned=True)(task, models, TRAINER)
    assert few.values["teacher"] == few.values["pruned"]
    assert few.values["student"] == pytest.approx(scale * float(student[:2].clamp(min=0).mean()), abs=1e-5)


def test_what_is_missing_is_said_before_the_run(clip: Path, tmp_path: Path) -> None:
    def refused(message: str, loss: Any = Painted(pipeline=Painter()), **how: Any) -> None:
        with pytest.raises(tiny.UserError, match=message):
            PromptScore(**{"model": str(clip), **how}).check_task(replace(digits_task(), loss=loss))

    PromptScore(model=str(clip)).check_task(replace(digits_task(), loss=Painted(pipeline=Painter())))
    refused("PromptScore needs pictures of prompts; name a pipeline", GaussianDiffusion())
    refused("PromptScore needs pictures of prompts", Painted(pipeline=Painter(texts=())))
    refused("needs at least 2 prompts", Painted(pipeline=Painter(texts=("a cat",))))
    refused("model: 'openai/clip' holds no CLIP model; .* `hf download", model="openai/clip")
    refused("num_prompts is 1; expected at least 2", num_prompts=1)
    refused("batch_size is 0; expected at least 1", batch_size=0)
    broken = tmp_path / "broken"
    shutil.copytree(clip, broken)
    for name in ("model.safetensors", "processor_config.json"):
        (broken / name).rename(tmp_path / name)
        with pytest.raises(MissingFileError, match=r"broken' lacks \*\S+; copy the whole folder"):
            PromptScore(model=str(broken)).check_task(replace(digits_task(), loss=Painted(pipeline=Painter())))
        (tmp_path / name).rename(broken / name)
    (broken / "model.safetensors").write_bytes(b"?")
    task, models = task_of(Painter())
    with pytest.raises(tiny.UserError, match="PromptScore.model: '.*broken' cannot be read"):
        PromptScore(model=str(broken))(task, models, TRAINER)
    (broken / "config.json").write_text(json.dumps({"model_type": "siglip"}))
    refused("holds no CLIP model", model=str(broken))
