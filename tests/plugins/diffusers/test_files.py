"""Checkpoints of diffusers, in and out: layouts, dtypes, what is refused, and pipelines that take the student."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import tinyfusion_core as tiny
from diffusers_tasks import ROWS, make, published, saved
from tinyfusion_core.cli import main
from tinyfusion_core.protocols.data import Tensors
from tinyfusion_core.runtime.seeding import Rng
from tinyfusion_diffusers import DiffusersTransformer, RectifiedFlow
from tinyfusion_diffusers.files.checkpoints import SHIPPED, WEIGHTS


def test_dit_with_different_copies_is_refused(tmp_path: Path) -> None:
    task, inputs = make("DiTTransformer2DModel")
    plain = published(task)
    plain.save_pretrained(tmp_path)
    built = DiffusersTransformer(model=str(tmp_path)).build()
    told = {"timestep": inputs["t"], "class_labels": inputs["y"], "return_dict": False}
    assert torch.equal(built(inputs["x_t"], **told)[0], plain(inputs["x_t"], **told)[0])

    weights = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    weights["transformer_blocks.2.norm1.emb.timestep_embedder.linear_1.bias"] += 1
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    with pytest.raises(tiny.UserError, match=r"embedders of 'transformer_blocks.0' and 'transformer_blocks.2' differ"):
        DiffusersTransformer(model=str(tmp_path)).build()


def test_configs_and_weights_of_the_time_before_dit_had_a_class(tmp_path: Path) -> None:
    task, inputs = make("DiTTransformer2DModel")
    config = {**task.backbone.config(), "_class_name": "Transformer2DModel", "only_cross_attention": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(task.teacher.state_dict(), tmp_path / "diffusion_pytorch_model.bin")
    backbone = DiffusersTransformer(model=str(tmp_path))
    assert backbone.config() == task.backbone.config()
    assert torch.equal(task.loss.predict(backbone.build(), inputs), task.loss.predict(task.teacher, inputs))
    assert re.fullmatch("[0-9a-f]{64}", backbone.source()["sha256"])


def test_the_dtype_is_that_of_the_file_unless_told(tmp_path: Path) -> None:
    task, _ = make("FluxTransformer2DModel")
    task.teacher.to(torch.bfloat16).save_pretrained(tmp_path)
    assert DiffusersTransformer(model=str(tmp_path)).build().dtype == torch.bfloat16
    assert DiffusersTransformer(model=str(tmp_path), dtype="float32").build().dtype == torch.float32


def test_a_pipeline_generates_with_the_pruned_transformer(tmp_path: Path) -> None:
    task, _ = make("DiTTransformer2DModel", num_embeds_ada_norm=1000)  # the pipeline's null class is the thousandth
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=8)
    names = {i: str(i) for i in range(10)}
    pipe = diffusers.DiTPipeline(published(task), vae.eval(), diffusers.DDIMScheduler(), names)
    pipe.save_pretrained(tmp_path / "pipe")
    # From the pipeline's folder, and back into it.
    backbone = DiffusersTransformer(model=str(tmp_path / "pipe"))
    task = tiny.Task(backbone=backbone, loss=task.loss, train=task.train, held_out=task.held_out)
    decision = tiny.Keep([1, 3])(task, tiny.Trainer())
    tiny.save_pretrained(tiny.prune(task, decision), task, decision, tmp_path / "student")
    shutil.rmtree(tmp_path / "pipe" / "transformer")
    shutil.copytree(tmp_path / "student", tmp_path / "pipe" / "transformer")
    again = diffusers.DiTPipeline.from_pretrained(tmp_path / "pipe")
    again.set_progress_bar_config(disable=True)
    assert len(again.transformer.transformer_blocks) == 2
    rng = torch.Generator().manual_seed(0)
    images = again([1, 2], num_inference_steps=2, generator=rng, output_type="np").images
    assert images.shape == (2, 8, 8, 3)
    assert torch.isfinite(torch.from_numpy(images)).all()
    assert images.std() > 0


def test_flux_from_a_pipeline_without_its_encoders(tmp_path: Path) -> None:
    task, _ = make("FluxTransformer2DModel")
    none = dict.fromkeys(["vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"])
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    diffusers.FluxPipeline(scheduler=scheduler, transformer=task.teacher, **none).save_pretrained(tmp_path / "pipe")
    decision = tiny.Keep([1, 2, 4])(task, tiny.Trainer())
    student = tiny.prune(task, decision)
    shutil.rmtree(tmp_path / "pipe" / "transformer")
    tiny.save_pretrained(student, task, decision, tmp_path / "pipe" / "transformer")
    pipe = diffusers.FluxPipeline.from_pretrained(tmp_path / "pipe", **none)
    pipe.set_progress_bar_config(disable=True)
    assert (len(pipe.transformer.transformer_blocks), len(pipe.transformer.single_transformer_blocks)) == (2, 1)
    told = {"prompt_embeds": torch.randn(1, 5, 12), "pooled_prompt_embeds": torch.randn(1, 10)}
    out = pipe(**told, height=32, width=32, num_inference_steps=2, output_type="latent").images
    assert torch.isfinite(out).all()


def test_shipped_configs_are_complete_and_of_the_published_sizes() -> None:
    sizes = {
        "facebook/DiT-XL-2-256": 674_834_720,  # the published one has 27 copies of the embedder more
        "black-forest-labs/FLUX.1-dev": 11_901_408_320,
        "stabilityai/stable-diffusion-3.5-large": 8_056_627_520,
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": 1_418_996_800,
    }
    assert {p.stem.replace("--", "/") for p in SHIPPED.glob("*.json")} == set(sizes)
    for model, parameters in sizes.items():
        backbone = DiffusersTransformer(model=model)
        with torch.device("meta"):
            network = backbone.construct(backbone.config())
        assert sum(p.numel() for p in network.parameters()) == parameters


def test_a_checkpoint_that_is_not_the_published_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The hub cannot be had in tests: its client finds this folder.
    task, _ = make("FluxTransformer2DModel")
    saved(task, tmp_path / "transformer")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **how: str(tmp_path))
    backbone = DiffusersTransformer(model="black-forest-labs/FLUX.1-dev")
    assert backbone.source() == {
        "checkpoint": "black-forest-labs/FLUX.1-dev",
        "licence": "unknown",
        "revision": "main",
    }
    with pytest.raises(tiny.UserError, match=r"config\.json: in_channels is 16; the published model's"):
        backbone.build()
    other = DiffusersTransformer(model="me/flux", licence="mine")
    assert other.build().config.in_channels == 16
    assert other.config() == task.backbone.config()


def test_bad_input(tmp_path: Path) -> None:
    task, inputs = make("FluxTransformer2DModel")
    folder = saved(task, tmp_path / "flux")

    def wrong(message: str, **options: Any) -> None:
        with pytest.raises(tiny.UserError, match=message):
            DiffusersTransformer(**options).build()

    wrong("^model: not set")
    wrong("is no folder, and the Hugging Face hub does not give it", model="no/where")
    (tmp_path / "empty").mkdir()
    wrong("holds a config.json; expected a pipeline's folder", model=str(tmp_path / "empty"))
    (tmp_path / "empty" / "config.json").write_text("{}")
    wrong("names no _class_name", model=str(tmp_path / "empty"))
    shutil.copy(folder / "config.json", tmp_path / "empty")
    with pytest.raises(tiny.UserError, match=r"holds no diffusion_pytorch_model\.safetensors"):
        DiffusersTransformer(model=str(tmp_path / "empty")).source()
    wrong(r"holds no diffusion_pytorch_model\.safetensors", model=str(tmp_path / "empty"))
    weights = (folder / "diffusion_pytorch_model.safetensors").read_bytes()
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(weights[:5000])
    wrong("damaged or cut short", model=str(folder))
    tensors = {**task.teacher.state_dict()}
    tensors.pop("proj_out.bias")
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    wrong(r"do not fit the config: proj_out\.bias", model=str(folder))
    tensors["proj_out.bias"] = torch.zeros(3)
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    wrong("weights cannot be read", model=str(folder))

    with pytest.raises(tiny.UserError, match=r"^latent is \[4\]; expected \[height, width\]"):
        DiffusersTransformer(latent=[4])
    with pytest.raises(tiny.UserError, match=r"^text_length is 0; expected at least 1"):
        DiffusersTransformer(text_length=0)
    with pytest.raises(tiny.UserError, match=r"^latent: \[2, 4, 4\]; FluxTransformer2DModel takes \[h"):
        replace(task.backbone, latent=[2, 4, 4]).example(1)
    with pytest.raises(tiny.UserError, match=r"^latent: not set, and the config does not say"):
        replace(task.backbone, latent=None).example(1)
    with pytest.raises(tiny.UserError, match=r"^guidance: FluxTransformer2DModel as configured takes a guidance"):
        RectifiedFlow().predict(task.teacher, inputs)
    other, told = make("SanaTransformer2DModel")
    labelled = {**told, "y": torch.arange(ROWS), "drop": torch.ones(ROWS, dtype=torch.bool)}  # of no use to it
    assert torch.equal(other.loss.predict(other.teacher, labelled), other.loss.predict(other.teacher, told))
    with pytest.raises(tiny.UserError, match=r"^guidance is 3\.5, but SanaTransformer2DModel"):
        RectifiedFlow(guidance=3.5).predict(other.teacher, told)
    with pytest.raises(tiny.UserError, match=r"takes 'text' \(encoder_hidden_states\), which the samples do not have"):
        other.loss.predict(other.teacher, {k: v for k, v in told.items() if k != "text"})
    dit, told = make("DiTTransformer2DModel")
    with pytest.raises(tiny.UserError, match="not known how DiTTransformer2DModel counts time; set scale"):
        RectifiedFlow().predict(dit.teacher, told)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("CogVideoXTransformer3DModel", {"text_length": 6}, r"text_length is 6; CogVideoX\w+ as configured takes 5"),
        ("CogVideoXTransformer3DModel", {"text_length": 4}, r"text_length is 4; CogVideoX\w+ as configured takes 5"),
        ("CogVideoXTransformer3DModel", {"latent": [8, 8]}, r"latent: \[8, 8\]; .* takes \[frames, height, width\]"),
        ("CogVideoXTransformer3DModel", {"latent": [2, 7, 8]}, r"patches of \[1, 2, 2\], and the sizes have to be"),
        ("WanTransformer3DModel", {"latent": [2, 4, 5]}, r"latent: \[2, 4, 5\]; Wan\w+ cuts latents into patches"),
        ("WanTransformer3DModel", {"latent": [2, 4, 2050]}, r"as configured takes at most \[1024, 2048, 2048\]"),
        ("FluxTransformer2DModel", {"latent": [4, 5]}, r"patches of \[2, 2\], and the sizes have to be multiples"),
        ("SD3Transformer2DModel", {"latent": [9, 8]}, r"patches of \[2, 2\], and the sizes have to be multiples"),
        ("Lumina2Transformer2DModel", {"text_length": 16}, r"text_length is 16; .* as configured takes at most 15"),
        ("Lumina2Transformer2DModel", {"latent": [18, 8]}, r"as configured takes at most \[16, 16\]"),
    ],
)
def test_sizes_that_a_network_does_not_take(name: str, options: dict[str, Any], message: str) -> None:
    task, _ = make(name)
    with pytest.raises(tiny.UserError, match=message):
        replace(task.backbone, **options).example(1)


def test_the_largest_sizes_run() -> None:
    lumina, _ = make("Lumina2Transformer2DModel")
    backbone = replace(lumina.backbone, text_length=15, latent=[16, 16])
    inputs = lumina.loss.prepare(backbone.example(2), Rng(0, "test"))
    assert lumina.loss.predict(lumina.teacher, inputs).shape == (2, 4, 16, 16)
    # Rotated positions leave the length of the text free, up to what the pipeline cuts it to.
    rotated = {"use_rotary_positional_embeddings": True, "attention_head_dim": 16}
    cog, _ = make("CogVideoXTransformer3DModel", **rotated)
    inputs = cog.loss.prepare(replace(cog.backbone, text_length=3).example(2), Rng(0, "test"))
    assert cog.loss.predict(cog.teacher, inputs).shape == (2, 2, 4, 8, 8)
    with pytest.raises(tiny.UserError, match="takes at most 5"):
        replace(cog.backbone, text_length=6).example(2)


@pytest.mark.slow
def test_published_videos_are_planned_by_their_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {"_class_name": "CogVideoXTransformer3DModel"}  # CogVideoX-2b's, which are the defaults
    newer = {
        "patch_size_t": 2, "sample_frames": 81, "sample_height": 96, "sample_width": 170, "max_text_seq_length": 224,
    }  # fmt: skip
    for changes, text, x in (({}, 226, [13, 16, 60, 90]), (newer, 224, [22, 16, 96, 170])):  # 21 frames make no pairs
        found = DiffusersTransformer.random({**config, **changes}).example(1)
        assert {name: list(column.shape[1:]) for name, column in found.items()} == {"x": x, "text": [text, 4096]}
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_layers": 3}))  # of 30, which are alike
    options = {"scheduler": "CogVideoXDDIMScheduler", "settings": {"prediction_type": "v_prediction"}}
    recipe = {
        "backbone": {"class_path": "DiffusersTransformer", "init_args": {"model": str(tmp_path)}},
        "loss": {"class_path": "ScheduledDiffusion", "init_args": options},
        "data": {"class_path": "EncodedPrompts", "init_args": {"folder": str(tmp_path / "data")}},
        "search": {"pattern": [2, 3], "steps": 10},
        "recover": {"steps": 10},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert main(["validate", str(path)]) == 0
    assert "the plan works out, once these are there" in capsys.readouterr().out


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_pickled_weights_run_no_code(tmp_path: Path) -> None:
    task, _ = make("FluxTransformer2DModel")
    (tmp_path / "config.json").write_text(json.dumps(task.backbone.config()))
    torch.save({"proj_out.bias": Payload(tmp_path / "was-here")}, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(tiny.UserError, match="weights cannot be read"):
        DiffusersTransformer(model=str(tmp_path)).build()
    assert not (tmp_path / "was-here").exists()


def test_without_diffusers_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(tiny.UserError, match=r"DiffusersTransformer needs .*: pip install 'tinyfusion\[diffusers\]'"):
        DiffusersTransformer.construct({"_class_name": "FluxTransformer2DModel"})


def test_listing_the_plugin_imports_neither_diffusers_nor_its_like() -> None:
    code = "import sys, tinyfusion_diffusers; print(sorted({'diffusers', 'transformers', 'peft'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.slow
def test_a_run_ends_in_a_folder_that_diffusers_loads(tmp_path: Path) -> None:
    task, inputs = make("FluxTransformer2DModel")
    batch = {name: column.repeat(4, *[1] * (column.ndim - 1)) for name, column in task.train.columns.items()}
    batch["x"] *= 0.45
    # A teacher has to know its objective.
    task = replace(task, train=Tensors(batch), model=task.teacher)
    tiny.Recover(steps=80, lr=1e-2, ema=0)(task, task.teacher, None, tiny.Trainer(batch_size=12))
    folder = saved(task, tmp_path / "flux")
    (tmp_path / "data").mkdir()
    save_file(batch, tmp_path / "data" / "all.safetensors")
    recipe = {
        "backbone": {
            "class_path": "DiffusersTransformer",
            "init_args": {"model": str(folder), "latent": [4, 4], "text_length": 5, "licence": "mine"},
        },
        "loss": {"class_path": "RectifiedFlow", "init_args": {"guidance": 3.5}},
        "data": {"class_path": "EncodedPrompts", "init_args": {"folder": str(tmp_path / "data"), "num_held_out": 8}},
        "trainer": {"precision": "fp32", "batch_size": 4, "log_every": 4},
        "search": {
            "pattern": {"transformer_blocks": [2, 3], "single_transformer_blocks": [[1, 3]]},
            "steps": 8,
        },
        "recover": {
            "steps": 4,
            "kd": {"class_path": "MaskedKD", "init_args": {"alpha_kd": 1.0, "alpha_gt": 0.0, "beta": [0.1, 0.1]}},
        },
        "evaluate": [{"class_path": "HeldOutLoss", "init_args": {"draws": 1}}],
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert main(["run", str(path), "--run-dir", str(tmp_path / "run")]) == 0
    student = diffusers.AutoModel.from_pretrained(str(tmp_path / "run" / "student"))
    assert (student.config.num_layers, student.config.num_single_layers) == (2, 1)
    again = tiny.load_pretrained(tmp_path / "run" / "student")
    assert torch.equal(task.loss.predict(student, inputs), task.loss.predict(again, inputs))
    assert main(["export", str(tmp_path / "run"), "--to", "diffusers"]) == 0
    exported = diffusers.AutoModel.from_pretrained(str(tmp_path / "run" / "export" / "diffusers"))
    assert torch.equal(task.loss.predict(exported, inputs), task.loss.predict(again, inputs))
    card = (tmp_path / "run" / "student" / "README.md").read_text()
    assert "library_name: diffusers" in card and "from diffusers import AutoModel" in card
    # The same command finds everything done; the student is a model to prune on.
    assert main(["run", str(path), "--run-dir", str(tmp_path / "run")]) == 0
    recipe["backbone"]["init_args"]["model"] = str(tmp_path / "run" / "student")
    path.write_text(yaml.safe_dump({**recipe, "search": {"class_path": "Keep", "init_args": {"blocks": [0, 2]}}}))
    assert main(["validate", str(path)]) == 0


def test_a_file_that_is_cut_short_is_named_without_being_read(tmp_path: Path) -> None:
    task, _ = make("FluxTransformer2DModel")
    backbone, path = DiffusersTransformer(model=str(saved(task, tmp_path))), tmp_path / WEIGHTS
    backbone.check_weights()
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(tiny.UserError, match=rf"{WEIGHTS}: damaged or cut short \(.*not fully covered"):
        backbone.check_weights()
