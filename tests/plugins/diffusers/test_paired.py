"""Latents and prompts that two commands have made in shards are read as one, row by row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import diffusers_prompts as tiny_pipelines
import tinyfusion_core as tiny
from tinyfusion_core.cli import main
from tinyfusion_core.dataloading.order import order_of
from tinyfusion_core.dataloading.shards import FORMAT_VERSION, METADATA, write_shard
from tinyfusion_core.errors import MissingFileError, UserError
from tinyfusion_core.protocols.data import Sharded
from tinyfusion_diffusers import DiffusersTransformer, EncodedPrompts, RectifiedFlow

IMAGES = 20


def shards(folder: Path, size: int, columns: dict[str, Tensor], **more: Any) -> Path:
    folder.mkdir(parents=True)
    num = len(next(iter(columns.values())))
    parts = [{name: column[i : i + size] for name, column in columns.items()} for i in range(0, num, size)]
    made = [write_shard(folder, f"{i:05d}.safetensors", part) for i, part in enumerate(parts)]
    listed = {"format_version": FORMAT_VERSION, **more, "shards": [vars(shard) for shard in made]}
    (folder / METADATA).write_text(json.dumps(listed))
    return folder


def latents(folder: Path, copies: int = 1) -> Path:
    """Of image i the number i, and 100 + i of its mirrored copy."""
    numbers = torch.arange(IMAGES)[:, None] + 100.0 * torch.arange(copies)
    x = numbers.flatten()[:, None, None, None].expand(-1, 4, 2, 2)
    return shards(folder, 4 * copies, {"x": x, "y": numbers.flatten().long()}, flips=copies == 2)


def embeddings(num: int = IMAGES) -> dict[str, Tensor]:
    numbers = torch.arange(num)
    text = numbers[:, None, None].expand(-1, 3, 5).bfloat16()
    return {"text": text, "mask": torch.arange(3) <= numbers[:, None] % 3}


@pytest.mark.parametrize("copies", [1, 2])
def test_every_image_has_its_prompt(tmp_path: Path, copies: int) -> None:
    data = EncodedPrompts(
        folder=str(latents(tmp_path / "latents", copies)),
        prompts=f"file://{shards(tmp_path / 'prompts', 3, embeddings())}",
        num_held_out=5,
        mix=2,
    )
    held, train = data.held_out(), data.train()
    assert (len(held), len(train)) == (5 * copies, (IMAGES - 5) * copies)
    seen = []
    for samples, first in ((held, 0), (train, 5)):
        assert isinstance(samples, Sharded)
        assert sum(samples.sizes) == len(samples)
        order = order_of(samples, 0, "test", 4)
        batch = samples.__getitems__([order[i] for i in range(len(samples))])
        assert {name: column.dtype for name, column in batch.items()} == {
            "x": torch.float32, "y": torch.int64, "text": torch.float32, "mask": torch.bool,
        }  # fmt: skip
        assert torch.equal(batch["text"][:, 0, 0], batch["x"][:, 0, 0, 0] % 100)
        assert torch.equal(batch["mask"].sum(1), batch["y"] % 100 % 3 + 1)
        assert batch["text"].min() == first
        seen += batch["y"].tolist()
        row = samples.__getitems__([copies])  # the second image of these
        assert row["text"][0, 0, 0] == first + 1
    assert sorted(seen) == [i + 100 * copy for copy in range(copies) for i in range(IMAGES)]
    assert train.where("text", copies).endswith("/prompts/00002.safetensors (row 0)")
    assert train.where("x", copies).endswith(f"/latents/00001.safetensors (row {2 * copies})")


def test_arrays_and_shards_go_together(tmp_path: Path) -> None:
    numbers = torch.arange(IMAGES).float()
    (tmp_path / "x").mkdir()
    np.save(tmp_path / "x" / "x.npy", numbers[:, None, None, None].expand(-1, 4, 2, 2).numpy())
    (tmp_path / "text").mkdir()
    save_file({k: v.contiguous() for k, v in embeddings().items()}, tmp_path / "text" / "text.safetensors")
    sharded = {"x": latents(tmp_path / "latents"), "text": shards(tmp_path / "prompts", 3, embeddings())}
    for folder, prompts in (
        ("x", "text"),
        (sharded["x"], "text"),
        ("x", sharded["text"]),
        (sharded["x"], sharded["text"]),
    ):
        data = EncodedPrompts(folder=str(tmp_path / folder), prompts=str(tmp_path / prompts), num_held_out=4)
        batch = data.train().__getitems__(list(range(16)))
        assert torch.equal(batch["text"][:, 0, 0], batch["x"][:, 0, 0, 0])
        held = data.held_out().__getitems__(list(range(4)))
        assert {*batch["text"][:, 0, 0].tolist(), *held["x"][:, 0, 0, 0].tolist()} == {*map(float, range(IMAGES))}
    alone = EncodedPrompts(folder=str(sharded["x"]), num_held_out=4)
    assert alone.held_out().__getitems__([3])["y"].tolist() == [3]


def test_what_does_not_belong_together_is_refused(tmp_path: Path) -> None:
    images, prompts = latents(tmp_path / "latents", 2), shards(tmp_path / "prompts", 3, embeddings(IMAGES + 1))

    def refused(message: str, kind: type[UserError] = UserError, **how: Any) -> None:
        with pytest.raises(kind, match=message):
            EncodedPrompts(**{"folder": str(images), "num_held_out": 2, **how}).train().__getitems__([0])

    refused("prompts has 21 rows, .*latents 20 images, .* encode the prompts in the order of", prompts=str(prompts))
    refused("prompts: .*'x' is in .*; keep one of them", prompts=str(latents(tmp_path / "more")))
    refused("no text, mask, pooled, text_2, mask_2 in .*nowhere", MissingFileError, prompts=str(tmp_path / "nowhere"))
    refused("num_held_out is 20; expected 1 to 19", num_held_out=20)
    refused("mix is 0; expected at least 1", mix=0)
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / METADATA).write_text(json.dumps({"format_version": FORMAT_VERSION, "shards": []}))
    refused("lists no shards; let the command that makes them finish", prompts=str(tmp_path / "unfinished"))
    (tmp_path / "x").mkdir()
    np.save(tmp_path / "x" / "x.npy", np.zeros((IMAGES, 1)))
    refused("x.npy: holds 'x'; expected text, mask, pooled", prompts=str(tmp_path / "x"))


@pytest.mark.slow
def test_from_pictures_and_captions_to_a_student(
    tiny_vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images" / "all").mkdir(parents=True)
    for i in range(24):
        noise = np.random.default_rng(i).integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "images" / "all" / f"{i}.png")
        (tmp_path / "images" / "all" / f"{i}.txt").write_text("a " * (i % 5) + "cat")
    pipeline, folder, prompts = (str(tmp_path / name) for name in ("sd3", "latents", "prompts"))
    tiny_pipelines.pipeline("StableDiffusion3Pipeline").save_pretrained(pipeline)
    words = ["encode", str(tmp_path / "images"), "--out", folder, "--vae", str(tiny_vae), "--size", "16"]
    assert main([*words, "--flip", "--captions", "--scale", "1.5"]) == 0
    words = ["encode-prompts", f"{folder}/captions.jsonl", "--out", prompts, "--model", pipeline, "--empty", "0.1"]
    assert main([*words, "--dtype", "float32", "--text-length", "4", "--shard-size", "5"]) == 0
    tokens = json.loads((tmp_path / "prompts" / METADATA).read_text())["row"]["text"][0]
    data = EncodedPrompts(folder=folder, prompts=prompts, num_held_out=4, mix=2)
    backbone = DiffusersTransformer(model=pipeline, text_length=tokens)
    task = tiny.Task(backbone=backbone, loss=RectifiedFlow(), train=data.train(), held_out=data.held_out())
    # A teacher has to know its objective.
    tiny.Recover(steps=80, lr=1e-2, ema=0)(task, task.teacher, None, tiny.Trainer(batch_size=8))
    task.teacher.save_pretrained(f"{pipeline}/transformer")
    recipe = {
        "backbone": {"class_path": "DiffusersTransformer", "init_args": {"model": pipeline, "text_length": tokens}},
        "loss": "RectifiedFlow",
        "data": {
            "class_path": "EncodedPrompts",
            "init_args": {"folder": folder, "prompts": prompts, "num_held_out": 4, "mix": 2},
        },
        "trainer": {"precision": "fp32", "batch_size": 4},
        "search": {"keep": 3, "steps": 4},
        "recover": {"steps": 4},
        "evaluate": [{"class_path": "HeldOutLoss", "init_args": {"draws": 1}}],
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert main(["validate", str(path)]) == 0, capsys.readouterr().err
    assert main(["run", str(path), "--run-dir", str(tmp_path / "run")]) == 0, capsys.readouterr().err[-3000:]
    student = diffusers.AutoModel.from_pretrained(str(tmp_path / "run" / "student"))
    assert student.config.num_layers == 4  # the last one is protected
