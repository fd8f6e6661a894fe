"""Models that read images: their decoder is pruned as any; data come through the model's own processor."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor

import tinyfusion_core as tiny
from llm_toys import decide
from marks import slow_but
from tinyfusion_core.cli import main
from tinyfusion_core.pruning.gating import Gates
from tinyfusion_llm import CausalLM, ImageText, NextToken
from tinyfusion_llm.layers.finding import num_fed
from vision_toys import FAMILIES, captions, folder

pytestmark = [pytest.mark.numerics, pytest.mark.filterwarnings("ignore")]  # of transformers
CONTEXT = 160
MASKS = ((0, 1, 3, 5), (0, 1, 2, 3, 4, 5), (0, 1, 4, 5))
"""One for each of three samples: with one image, two and none."""


def task_of(path: Path, rows: Path) -> tiny.Task:
    data = ImageText(processor=str(path), files=[str(rows)], context=CONTEXT, held_out_files=[str(rows)])
    backbone = CausalLM(model=str(path), context=CONTEXT)
    return tiny.Task(backbone=backbone, loss=NextToken(), train=data.train(), held_out=data.held_out(), data=data)


def states(task: tiny.Task, model: nn.Module, rows: list[int]) -> Tensor:
    inputs = task.loss.prepare(task.held_out.__getitems__(rows), tiny.Rng(0, "test"))
    with torch.no_grad():
        found: Tensor = task.loss.predict(model, inputs).states
    return found


@pytest.mark.parametrize("family", slow_but(FAMILIES, "qwen3_vl"))
def test_a_pruned_family_reads_images_as_under_gates(family: str, tmp_path: Path) -> None:
    task = task_of(folder(tmp_path / "full", family), captions(tmp_path / "rows"))
    plain = states(task, task.teacher, [0, 1, 2])
    for i in range(3):  # padding, and images of other samples, change nothing
        assert torch.allclose(states(task, task.teacher, [i])[0], plain[i], atol=1e-5)
    inputs = task.loss.prepare(task.held_out.__getitems__([0, 1, 2]), tiny.Rng(0, "test"))
    dims = task.batch_dim(task.teacher)
    with Gates(task.teacher, task.blocks, dims, task.streams, task.backbone.unneeded) as gates:
        gates.mask = torch.ones(3, 6)
        assert torch.equal(states(task, task.teacher, [0, 1, 2]), plain)
        gates.mask = torch.tensor([[float(i in kept) for i in range(6)] for kept in MASKS], requires_grad=True)
        prediction = task.loss.predict(task.teacher, inputs)
        (gradient,) = torch.autograd.grad(task.loss.loss(prediction, inputs).sum(), gates.mask)
    assert gradient.isfinite().all() and (gradient != 0).any(0).all()
    for i, kept in enumerate(MASKS):
        student = tiny.prune(task, decide(task, kept))
        assert torch.allclose(states(task, student, [0, 1, 2])[i], prediction.states[i], atol=1e-5)


@pytest.mark.parametrize("family", slow_but(FAMILIES, "qwen3_vl"))
def test_what_is_saved_is_a_plain_folder_that_writes_about_images(family: str, tmp_path: Path) -> None:
    task = task_of(folder(tmp_path / "full", family), captions(tmp_path / "rows"))
    student = tiny.prune(task, decide(task, MASKS[0]))
    tiny.save_pretrained(student, task, decide(task, MASKS[0]), tmp_path / "student")
    again, loading = AutoModelForImageTextToText.from_pretrained(tmp_path / "student", output_loading_info=True)
    assert not any(loading.values()), loading
    assert type(again) is type(task.teacher)
    assert torch.equal(states(task, again.eval(), [0, 1, 2]), states(task, student, [0, 1, 2]))
    assert torch.equal(states(task, tiny.load_pretrained(tmp_path / "student"), [1]), states(task, student, [1]))
    assert again.config.get_text_config().num_hidden_layers == 4
    processor: Any = AutoProcessor.from_pretrained(tmp_path / "student")
    example = task.held_out.examples[1]  # type: ignore[attr-defined]
    inputs = processor(
        text=[example.prompt], images=[[Image.open(path) for path in example.images]], return_tensors="pt"
    )
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached, plain = (again.generate(**inputs, use_cache=cache, **options) for cache in (True, False))
    assert torch.equal(cached, plain)


@pytest.mark.slow
def test_layers_that_are_given_features_of_images_stay(tmp_path: Path) -> None:
    task = task_of(folder(tmp_path / "full", "qwen3_vl"), captions(tmp_path / "rows"))
    assert num_fed(task.teacher) == 2
    assert task.backbone.limits(task.teacher) == {"protect": [0, 1]}
    for kept in ((1, 2, 3, 4), (0, 2, 3, 5)):
        with pytest.raises(
            tiny.UserError, match="features of images are given to the layers before 2, which must stay"
        ):
            tiny.prune(task, decide(task, kept))
    # What transformers would make of such a student: features of the second layer go to the third.
    wrong, mask = without(task.teacher, 1), torch.tensor([[1.0, 0.0, 1.0, 1.0, 1.0, 1.0]] * 3)
    with Gates(task.teacher, task.blocks, task.batch_dim(task.teacher), task.streams, task.backbone.unneeded) as gates:
        gates.mask = mask
        right = states(task, task.teacher, [0, 1, 2])
    assert not torch.allclose(states(task, wrong, [0, 1]), right[:2], atol=1e-3)
    assert torch.allclose(states(task, wrong, [2])[0], right[2], atol=1e-5)  # the sample without images


def without(model: nn.Module, index: int) -> nn.Module:
    shorter: Any = copy.deepcopy(model)
    del shorter.model.language_model.layers[index]
    shorter.config.text_config.num_hidden_layers -= 1
    return shorter


@pytest.mark.parametrize("family", slow_but(("llava", "gemma3")))
def test_a_recipe_prunes_and_recovers(family: str, tmp_path: Path) -> None:
    full, rows = folder(tmp_path / "full", family), captions(tmp_path / "rows", 12)
    teach(full, rows)
    options = {"context": 64}
    content = {
        "backbone": {"class_path": "CausalLM", "init_args": {"model": str(full), **options}},
        "loss": "NextToken",
        "data": {"class_path": "ImageText", "init_args": {"processor": str(full), "files": [str(rows)], **options}},
        "trainer": {"precision": "fp32", "batch_size": 2, "seed": 0, "checkpoint_every": 1},
        "search": {"class_path": "Search", "init_args": {"keep": 4, "steps": 3}},
        "recover": {"steps": 3, "kd": {"class_path": "OutputKD", "init_args": {}}},
        "evaluate": ["HeldOutLoss", "Generation"],
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(content))
    assert main(["validate", str(recipe)]) == 0
    assert main(["run", str(recipe), "--run-dir", str(tmp_path / "run")]) == 0
    student = tiny.load_pretrained(tmp_path / "run" / "student")
    assert student.config.get_text_config().num_hidden_layers == 4  # type: ignore[union-attr, operator]
    assert (tmp_path / "run" / "student" / "processor_config.json").is_file()


def teach(path: Path, rows: Path) -> None:
    """Train a model until it predicts better than one that has learned nothing."""
    task = task_of(path, rows)
    model: Any = task.teacher
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    inputs = task.loss.prepare(task.train.__getitems__(list(range(12))), tiny.Rng(0, "test"))
    for _ in range(12):
        optimizer.zero_grad()
        task.loss.losses(model, inputs).mean().backward()
        optimizer.step()
    model.save_pretrained(path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"images": ["00.png"], "text": 3}, "row 13: 'text' is 3; expected a text"),
        ({"images": ["00.png"], "prompt": None, "text": "w3"}, "row 13: 'prompt' is None; expected a text"),
        ({"images": ["../rows"], "text": "w3"}, "row 13: .*rows: is a folder; expected a file"),
        ({"images": ["no.png"], "text": "w3"}, "row 13: no image .*no.png; files are looked for beside"),
        ({"images": [3], "text": "w3"}, "row 13: 'images' is no list of files"),
        ({"images": ["00.png"], "text": ""}, "row 13: 'text' is empty"),
        ({"images": ["00.png"], "prompt": "w4 " * 200, "text": "w3"}, "row 13: prompt and images take 22. tokens"),
        ({"images": ["bad.png"], "text": "w3"}, "row 13: .*bad.png is damaged or no image"),
        ({"images": ["00.png"], "text": "w3 <image>"}, "row 13: the processor refuses it|row 13: an image stands in"),
    ],
)
def test_a_wrong_row_is_named(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    path, rows = folder(tmp_path / "full", "llava"), captions(tmp_path / "rows", 12)
    (rows.parent / "bad.png").write_bytes(b"no image")
    rows.write_text(rows.read_text() + json.dumps(row) + "\n")
    with pytest.raises(tiny.UserError, match=message):
        samples = task_of(path, rows).held_out
        samples.__getitems__([12])


def test_without_a_processor_there_are_no_images(tmp_path: Path) -> None:
    path, rows = folder(tmp_path / "full", "llava"), captions(tmp_path / "rows")
    (path / "processor_config.json").unlink()
    with pytest.raises(tiny.UserError, match="no processor of images and text in '.*full'"):
        task_of(path, rows)
    with pytest.raises(tiny.UserError, match="hold one row; give more of them, or held_out_files"):
        ImageText(processor=str(folder(path, "llava")), files=[str(captions(tmp_path / "one", 1))]).train()
    (tmp_path / "none").mkdir()
    with pytest.raises(tiny.UserError, match="holds no .txt"):
        ImageText(processor=str(path), files=[str(tmp_path / "none")]).train()


def test_without_a_template_prompt_and_text_are_put_together(tmp_path: Path) -> None:
    path, rows = folder(tmp_path / "full", "llava"), tmp_path / "rows" / "captions.jsonl"
    captions(rows.parent, 2)
    (path / "chat_template.jinja").unlink()
    found = [{"images": "00.png", "prompt": "<image> w5", "text": " w6 w7"}, {"text": "w8"}]
    rows.write_text("".join(json.dumps(row) + "\n" for row in found))
    batch = task_of(path, rows).held_out.__getitems__([0, 1])
    assert batch["tokens"][:, :20].tolist() == [[70] * 16 + [5, 6, 7, 2], [8, 2] + [0] * 18]
    assert [row[row >= 0].tolist() for row in batch["labels"]] == [[6, 7, 2], [8, 2]]
    assert batch["images.pixel_values"].shape == (2, 1, 3, 16, 16)
    assert batch["count.pixel_values"].tolist() == [1, 0]


def test_texts_alone_are_continued(tmp_path: Path) -> None:
    task = task_of(folder(tmp_path / "full", "llava"), captions(tmp_path / "rows"))
    with pytest.raises(tiny.UserError, match=r"columns beside the text is \['count\..*texts alone are continued"):
        tiny.GenerateData(samples=2)(task, tiny.Trainer(precision="fp32", batch_size=2), tmp_path / "made")
