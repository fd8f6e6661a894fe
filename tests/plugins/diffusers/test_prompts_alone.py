"""Prompts alone suffice: a teacher makes latents for them, and a student learns from these."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

import tinyfusion_core as tiny
from diffusers_tasks import make, saved
from tinyfusion_core.cli import main
from tinyfusion_core.dataloading.shards import write_shard
from tinyfusion_core.runtime.files import write_json

pytestmark = pytest.mark.filterwarnings("ignore")  # of other libraries


def test_a_student_learns_from_prompts_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task, _ = make("FluxTransformer2DModel")
    folder, out = saved(task, tmp_path / "flux"), tmp_path / "made"
    prompts = {name: t for name, t in task.train.columns.items() if name != "x"}
    (tmp_path / "prompts").mkdir()
    shard = write_shard(tmp_path / "prompts", "00000-of-00001.safetensors", prompts)
    write_json(tmp_path / "prompts" / "metadata.json", {"format_version": 1, "shards": [vars(shard)]})
    backbone, loss = task.backbone, task.loss
    content = {
        "backbone": {
            "class_path": "DiffusersTransformer",
            "init_args": {"model": str(folder), "latent": list(backbone.latent), "text_length": backbone.text_length},
        },
        "loss": {"class_path": "RectifiedFlow", "init_args": {"guidance": loss.guidance, "sampling_steps": 2}},
        "data": {"class_path": "Generated", "init_args": {"folder": str(tmp_path / "prompts"), "num_held_out": 0}},
        "trainer": {"precision": "fp32", "batch_size": 4, "seed": 0},
        "evaluate": [],
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(content))
    words = ["generate-data", str(recipe), "--out", str(out), "--samples", "12", "--batch-size", "5"]
    assert main(words) == 0
    found = tiny.Generated(folder=str(out), num_held_out=0).train().__getitems__(list(range(12)))
    for name, t in prompts.items():
        assert torch.equal(found[name], t[[i % len(t) for i in range(12)]].to(found[name].dtype))
    rng = tiny.Rng(0, "generated data", rows=(10,))
    asked = {name: t[1:2] for name, t in task.train.columns.items()}
    expected = type(loss)(guidance=loss.guidance, sampling_steps=2).generated(task.teacher, asked, "y", rng)
    torch.testing.assert_close(found["x"][10:11], expected["x"].detach(), rtol=1e-4, atol=1e-4)

    save_file({"text": torch.zeros(3, 1, 1)}, tmp_path / "prompts" / "00000-of-00001.safetensors")
    assert main([*words[:3], str(tmp_path / "other"), *words[4:]]) == 2
    assert "cut short, damaged or replaced" in capsys.readouterr().err
