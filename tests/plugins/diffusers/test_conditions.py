"""Networks that take channels beside the noisy latents: videos from images, fill and control."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pixel_unshuffle
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

import tinyfusion_core as tiny
from diffusers_families import CONDITIONED, FAMILIES
from diffusers_tasks import check_samples, make, sampled, saved, taught
from marks import slow_but
from tinyfusion_core.cli import main
from tinyfusion_core.pruning.gating import Gates
from tinyfusion_core.runtime.seeding import Rng, generator
from tinyfusion_diffusers import DiffusersTransformer

pytestmark = [pytest.mark.numerics, pytest.mark.filterwarnings("ignore")]  # of other libraries

WAN, COG = "WanImageToVideoPipeline", "CogVideoXImageToVideoPipeline"
VIDEO = {"guidance_scale": 1.0, "height": 64, "width": 64, "num_frames": 5}
IMAGE = {"guidance_scale": 3.5, "height": 32, "width": 32}
PIPELINES: dict[str, tuple[str, dict[str, Any]]] = {
    "Wan 2.2 from images": (WAN, {"guidance_scale": 1.0, "height": 32, "width": 32, "num_frames": 5}),
    "Wan 2.1 from images": (WAN, {"guidance_scale": 1.0, "height": 32, "width": 32, "num_frames": 5}),
    "CogVideoX from images": (COG, VIDEO),
    "CogVideoX from images, learned positions": (COG, VIDEO),
    "CogVideoX 1.5 from images": (COG, VIDEO),
    "Flux Fill": ("FluxFillPipeline", {**IMAGE, "strength": 1.0}),
    "Flux Control": ("FluxControlPipeline", IMAGE),
}


def conditioned(name: str) -> tuple[tiny.Task, dict[str, Tensor]]:
    cls, changes = CONDITIONED[name]
    return make(cls, **changes)


def autoencoder(pipeline: str) -> Any:
    """A small random VAE of the pipeline's kind, whose latents hardly vary."""
    torch.manual_seed(0)
    if pipeline == WAN:
        vae = diffusers.AutoencoderKLWan(
            base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.1] * 4, latents_std=[2.0] * 4
        )
        return vae.eval()
    levels = (4, 4, 4, 4)
    small = {"block_out_channels": levels, "layers_per_block": 1, "latent_channels": 4}
    if pipeline == COG:
        vae: Any = diffusers.AutoencoderKLCogVideoX(
            **small,
            norm_num_groups=2,
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
        )
        last = vae.encoder.conv_out.conv
    else:
        vae = diffusers.AutoencoderKL(
            **small,
            norm_num_groups=2,
            shift_factor=0.1,
            use_quant_conv=False,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )
        last = vae.encoder.conv_out
    with torch.no_grad():
        last.weight[4:], last.bias[4:] = 0.0, -30.0
    return vae.eval()


def encoded(pipeline: str, vae: Any, image: Tensor, size: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """The condition that the data are to have, as docs/diffusers.md says, and what the pipeline is told instead."""
    with torch.no_grad():
        if pipeline == WAN:
            video = torch.cat([image[:, :, None], image.new_zeros(*image.shape[:2], 4, *image.shape[2:])], 2)
            latents = (vae.encode(video).latent_dist.mode() - 0.1) / 2.0
            first = latents.new_zeros(len(image), 4, *latents.shape[2:])
            first[:, :, 0] = 1  # the frames that are given
            return torch.cat([first, latents], 1), {"image": image}
        if pipeline == COG:
            first = vae.encode(image[:, :, None]).latent_dist.mode().transpose(1, 2) * vae.config.scaling_factor
            frames = torch.cat([first, size.new_zeros(len(image), 1, *first.shape[2:])], 1)
            return frames, {"image": image}
        if pipeline == "FluxFillPipeline":
            latents = (vae.encode(image * (1 - mask)).latent_dist.mode() - 0.1) * vae.config.scaling_factor
            return torch.cat([latents, pixel_unshuffle(mask, 8)], 1), {"image": image, "mask_image": mask}
        latents = (vae.encode(image).latent_dist.mode() - 0.1) * vae.config.scaling_factor
        return latents, {"control_image": image}


@pytest.mark.parametrize("name", CONDITIONED)
def test_the_objective_samples_what_the_pipeline_samples(name: str) -> None:
    task, _ = conditioned(name)
    batch = {key: value[:1] for key, value in task.train.columns.items()}
    (pipeline, options), loss = PIPELINES[name], task.loss
    image = torch.rand(1, 3, options["height"], options["width"], generator=generator("image")) * 2 - 1
    mask = (torch.rand(1, 1, *image.shape[2:], generator=generator("mask")) < 0.5).float()
    vae = autoencoder(pipeline)
    condition, told = encoded(pipeline, vae, image, batch["x"], mask)
    assert condition.shape == batch["condition"].shape
    batch["condition"], parts = condition, {"vae": vae}
    if "image" in batch:
        sizes = {"hidden_size": 6, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2}
        encoder = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=224, patch_size=14)).eval()
        parts |= {"image_encoder": encoder, "image_processor": CLIPImageProcessor()}
        pixels = parts["image_processor"](images=image, return_tensors="pt")
        batch["image"] = encoder(**pixels, output_hidden_states=True).hidden_states[-2].detach()
    flow = not hasattr(loss, "scheduler")
    scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler()
    if not flow:
        scheduler = getattr(diffusers, loss.scheduler)(**loss.settings)
    found = sampled(task.teacher, batch, pipeline, scheduler, {**options, **told}, **parts)
    x = batch["x"]
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            time = scheduler.sigmas[i] if flow else t
            out = loss.predict(task.teacher, {**batch, "x_t": x, "t": time.expand(1)})
            assert out.shape == x.shape
            x = x + (scheduler.sigmas[i + 1] - time) * out if flow else scheduler.step(out, t, x, return_dict=False)[0]
        without = loss.predict(task.teacher, {**batch, "x_t": x, "t": time.expand(1), "condition": 0 * condition})
        assert not torch.allclose(loss.predict(task.teacher, {**batch, "x_t": x, "t": time.expand(1)}), without)
    check_samples(found, x, batch["x"])


@pytest.mark.parametrize("name", slow_but(CONDITIONED, "Wan 2.1 from images"))
def test_gates_and_search(name: str) -> None:
    task, inputs = conditioned(name)
    assert torch.equal(inputs["condition"], task.train.columns["condition"])  # never noised
    assert inputs["target"].shape == inputs["x_t"].shape == task.train.columns["x"].shape
    model = task.teacher
    kept = [i for i in range(len(task.blocks)) if i != 1]
    student = tiny.prune(task, tiny.Keep(kept)(task, tiny.Trainer()))
    mask = torch.ones(len(inputs["t"]), len(task.blocks))
    plain = task.loss.predict(model, inputs)
    with torch.no_grad(), Gates(model, task.blocks, task.batch_dim(model), task.backbone.streams) as gates:
        gates.mask = mask
        assert torch.equal(task.loss.predict(model, inputs), plain)
        mask[:, 1] = 0
        gates.mask = mask
        assert torch.equal(task.loss.predict(model, inputs), task.loss.predict(student, inputs))
    search = tiny.Search(pattern={path: [[2, depth]] for path, depth in task.lists.items()}, steps=2)
    assert len(search(task, tiny.Trainer(batch_size=4, seed=0)).kept) == 2 * len(task.lists)
    lacking = {key: value for key, value in inputs.items() if key != "condition"}
    with pytest.raises(tiny.UserError, match="takes 'condition', which the samples do not have"):
        task.loss.predict(model, lacking)


@pytest.mark.slow
def test_a_run_from_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task, inputs = conditioned("Wan 2.1 from images")
    task, batch = taught(task, 9)
    folder, data = saved(task, tmp_path / "wan"), tmp_path / "data"
    data.mkdir()
    np.save(data / "x.npy", batch.pop("x").numpy())
    save_file(batch, data / "rest.safetensors")
    recipe = {
        "backbone": {"class_path": "DiffusersTransformer", "init_args": {"model": str(folder), "latent": [2, 4, 4]}},
        "loss": "RectifiedFlow",
        "data": {"class_path": "EncodedPrompts", "init_args": {"folder": str(data), "num_held_out": 8}},
        "trainer": {"precision": "fp32", "batch_size": 4},
        "search": {"pattern": [2, 4], "steps": 4},
        "recover": {"steps": 4},
        "evaluate": [{"class_path": "HeldOutLoss", "init_args": {"draws": 1}}],
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert main(["run", str(path), "--run-dir", str(tmp_path / "run")]) == 0
    student = diffusers.AutoModel.from_pretrained(str(tmp_path / "run" / "student"))
    assert (student.config.num_layers, student.config.in_channels, student.config.out_channels) == (2, 12, 4)
    again = tiny.load_pretrained(tmp_path / "run" / "student")
    assert torch.equal(task.loss.predict(student, inputs), task.loss.predict(again, inputs))

    for name, message in {
        "condition": f"data: 'condition' of a sample is missing, the network of {folder} takes [8, 2, 4, 4]",
        "image": f"data: 'image' of a sample is missing, the network of {folder} takes [257, 6]",
    }.items():
        save_file({key: value for key, value in batch.items() if key != name}, data / "rest.safetensors")
        capsys.readouterr()
        assert main(["validate", str(path)]) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    save_file({**batch, "condition": batch["condition"][:, :4].contiguous()}, data / "rest.safetensors")
    assert main(["validate", str(path)]) == 2
    assert "'condition' of a sample is [4, 2, 4, 4]" in " ".join(capsys.readouterr().err.split())


def test_latents_of_published_variants() -> None:
    """The channels of the published configs, with nothing built."""
    published = {
        "WanTransformer3DModel": ({"in_channels": 36, "out_channels": 16, "text_dim": 4096}, [21, 60, 104], 16, 20),
        "CogVideoXTransformer3DModel": ({"in_channels": 32, "out_channels": 16}, None, 16, 16),
        "FluxTransformer2DModel": ({"in_channels": 384, "out_channels": 64}, [128, 128], 16, 80),
        "QwenImageTransformer2DModel": ({}, [128, 128], 16, 0),
        "LTXVideoTransformer3DModel": ({}, [2, 4, 4], 128, 0),
    }
    for name, (config, latent, noisy, condition) in published.items():
        batch = DiffusersTransformer.random({"_class_name": name, **config}, latent=latent).example(1)
        axis = 2 if name.startswith("CogVideoX") else 1
        assert batch["x"].shape[axis] == noisy
        assert ("condition" in batch) == (condition > 0)
        assert not condition or batch["condition"].shape[axis] == condition
    assert set(FAMILIES) > {name for name, _ in CONDITIONED.values()}


def test_the_seed_of_the_noise_is_that_of_the_latents_alone() -> None:
    task, inputs = conditioned("Flux Fill")
    again = task.loss.prepare({**task.train.columns, "condition": 0 * inputs["condition"]}, Rng(0, "test"))
    assert torch.equal(again["x_t"], inputs["x_t"]) and torch.equal(again["target"], inputs["target"])
