"""Transformers of diffusers: gated exactly, pruned for good, saved as what diffusers itself loads."""

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
from torch import Tensor

import tinyfusion_core as tiny
from diffusers_families import FAMILIES, HUNYUAN
from places import ROOT
from tinyfusion_core.cli import main
from tinyfusion_core.protocols.backbone import Stream, streams_of
from tinyfusion_core.protocols.data import Tensors
from tinyfusion_core.pruning.gating import Gates
from tinyfusion_core.pruning.weight_update import WeightUpdate
from tinyfusion_core.runtime.seeding import Rng, generator
from tinyfusion_diffusers import DiffusersTransformer, RectifiedFlow
from tinyfusion_diffusers.backbone import SHIPPED
from tinyfusion_diffusers.structure import construct, shorten

pytestmark = pytest.mark.filterwarnings("ignore")  # of other libraries

# As many as the tiny Flux has tokens, whose tables of positions have no batch dimension.
ROWS = 9


def make(name: str, **changes: Any) -> tuple[tiny.Task, dict[str, Tensor]]:
    """A task on a random network, and prepared inputs."""
    backbone, loss = FAMILIES[name].backbone(name, **changes), FAMILIES[name].loss
    batch = backbone.example(ROWS)
    for key, value in batch.items():
        if value.is_floating_point():
            value.normal_(generator=generator("diffusers", key))
    data = Tensors(batch)
    task = tiny.Task(backbone=backbone, loss=loss, train=data, held_out=data)
    return task, loss.prepare(batch, Rng(0, "test"))


def gated(task: tiny.Task) -> Gates:
    return Gates(task.teacher, task.blocks, task.batch_dim(task.teacher), task.backbone.streams)


def dense(task: tiny.Task, mask: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """The published formula by forward hooks, for every stream of a block."""
    hooks = []
    for j, path in enumerate(task.blocks):
        block, streams = task.teacher.get_submodule(path), streams_of(task.backbone.streams, path)

        def hook(module, args, kwargs, output, m=mask[:, j, None, None], streams=streams):
            after = list(output) if isinstance(output, tuple) else [output]
            for stream in streams:
                x = kwargs[stream.argument] if stream.argument in kwargs else args[0]
                i = stream.output or 0
                after[i] = after[i] * m + x * (1 - m)
            return tuple(after) if isinstance(output, tuple) else after[0]

        hooks.append(block.register_forward_hook(hook, with_kwargs=True))
    try:
        return task.loss.predict(task.teacher, inputs)
    finally:
        for h in hooks:
            h.remove()


def relative(a: Tensor, b: Tensor) -> float:
    """Largest difference, beside the largest value; gradients that are zero but for rounding do not count."""
    return float((a - b).abs().max()) / max(1e-4, float(b.abs().max()))


@pytest.mark.parametrize("name", FAMILIES)
def test_identities(name: str, tmp_path: Path) -> None:
    task, inputs = make(name)
    model, num = task.teacher, len(task.blocks)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plain = task.loss.predict(model, inputs)
    mask = (torch.rand(ROWS, num) < 0.5).float()
    mask[:, 1], mask[:, 2] = 0, 1
    mask.requires_grad_()
    parameters = list(model.parameters())
    wanted = torch.autograd.grad(dense(task, mask, inputs).square().mean(), [mask, *parameters], allow_unused=True)
    hard = [float(i % 3 != 1) for i in range(num)]
    with Gates(model, task.blocks, task.batch_dim(model), task.backbone.streams) as gates:
        gates.mask = torch.ones(ROWS, num)
        assert torch.equal(task.loss.predict(model, inputs), plain)
        gates.mask = mask
        found = torch.autograd.grad(
            task.loss.predict(model, inputs).square().mean(), [mask, *parameters], allow_unused=True
        )
        gates.mask = torch.tensor(hard).repeat(ROWS, 1)
        dropped = task.loss.predict(model, inputs)
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert relative(ours, theirs) < 1e-4
    assert found[0].abs().sum(0).min() > 0  # every block is told something
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    decision = tiny.Keep([i for i, keep in enumerate(hard) if keep])(task, tiny.Trainer())
    student = tiny.prune(task, decision)
    assert relative(dropped, plain) > 1e-3
    pruned = task.loss.predict(student, inputs)
    assert torch.equal(dropped, pruned)
    folder = tiny.save_pretrained(student, task, decision, tmp_path)
    for again in (
        tiny.load_pretrained(folder),
        type(student).from_pretrained(folder),  # type: ignore[attr-defined]
        diffusers.AutoModel.from_pretrained(str(folder)),
        DiffusersTransformer(model=str(folder)).build(),
    ):
        assert type(again) is type(student)
        assert torch.equal(task.loss.predict(again, inputs), pruned)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_block_may_be_the_one_that_goes(name: str) -> None:
    task, inputs = make(name)
    for gone in (0, len(task.blocks) - 1):
        kept = [i for i in range(len(task.blocks)) if i != gone]
        student = tiny.prune(task, tiny.Keep(kept)(task, tiny.Trainer()))
        mask = torch.ones(ROWS, len(task.blocks))
        mask[:, gone] = 0
        with (
            torch.no_grad(),
            Gates(task.teacher, task.blocks, task.batch_dim(task.teacher), task.backbone.streams) as g,
        ):
            g.mask = mask
            gated = task.loss.predict(task.teacher, inputs)
        assert torch.equal(gated, task.loss.predict(student, inputs))


@pytest.mark.parametrize("name", ["DiTTransformer2DModel", "FluxTransformer2DModel", "SD3Transformer2DModel"])
def test_gradient_checkpointing_changes_no_gradient(name: str) -> None:
    task, inputs = make(name)
    model = task.teacher
    other = replace(task.backbone, gradient_checkpointing=True).build()
    assert other.is_gradient_checkpointing
    mask = (torch.rand(ROWS, len(task.blocks)) < 0.5).float()
    found = []
    for network in (model, other):
        gate = mask.clone().requires_grad_()
        with Gates(network, task.blocks, task.batch_dim(network), task.backbone.streams) as gates:
            gates.mask = gate
            loss = task.loss.loss(task.loss.predict(network.train(), inputs), inputs).mean()
            found.append(torch.autograd.grad(loss, [gate, *network.parameters()], allow_unused=True))
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None)
        assert a is None or relative(a, b) < 1e-4


@pytest.mark.parametrize("update", [tiny.LoRA(rank=2), tiny.Full()], ids=["LoRA", "Full"])
@pytest.mark.parametrize("name", ["DiTTransformer2DModel", "AuraFlowTransformer2DModel"])
def test_search_leaves_the_weights_as_they_were(name: str, update: WeightUpdate) -> None:
    task, _ = make(name)
    before = {key: value.clone() for key, value in task.teacher.state_dict().items()}
    state = torch.random.get_rng_state()
    search = tiny.Search(pattern={path: [[2, depth]] for path, depth in task.lists.items()}, steps=4, update=update)
    decision = search(task, tiny.Trainer(batch_size=4, seed=0))
    assert len(decision.kept) == 2 * len(task.lists)
    after = task.teacher.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_criteria_compare_the_streams_of_each_list() -> None:
    task, _ = make("AuraFlowTransformer2DModel")
    keep = dict.fromkeys(task.lists, 2)
    decision = tiny.BlockInfluence(keep=keep, samples=4)(task, tiny.Trainer(batch_size=4))
    assert len(decision.kept) == 4


def test_what_the_private_registry_says() -> None:
    from diffusers.hooks._helpers import TransformerBlockRegistry

    TransformerBlockRegistry._register()
    known = {cls.__name__: data for cls, data in TransformerBlockRegistry._registry.items()}
    for block, indices in {
        "BasicTransformerBlock": (0, None),
        "JointTransformerBlock": (1, 0),
        "FluxTransformerBlock": (1, 0),
        "FluxSingleTransformerBlock": (1, 0),
        "CogVideoXBlock": (0, 1),
        "LTXVideoTransformerBlock": (0, None),
        "QwenImageTransformerBlock": (1, 0),
        "WanTransformerBlock": (0, None),
    }.items():
        data = known[block]
        assert (data.return_hidden_states_index, data.return_encoder_hidden_states_index) == indices
        assert data.hidden_states_argument_name == "hidden_states"
        assert data.encoder_hidden_states_argument_name == "encoder_hidden_states"
    # Those that the plugin has to know by itself; when diffusers registers them, its own entries count.
    unknown = ("AuraFlowJointTransformerBlock", "AuraFlowSingleTransformerBlock", "SanaTransformerBlock")
    assert not known.keys() & {*unknown, "Lumina2TransformerBlock", "HunyuanDiTBlock"}


def test_streams_by_list() -> None:
    both = (Stream("hidden_states", 1), Stream("encoder_hidden_states", 0))
    assert FAMILIES["AuraFlowTransformer2DModel"].backbone("AuraFlowTransformer2DModel").streams == {
        "joint_transformer_blocks": both,
        "single_transformer_blocks": (Stream("hidden_states"),),
    }
    cog = FAMILIES["CogVideoXTransformer3DModel"].backbone("CogVideoXTransformer3DModel").streams
    assert cog == {"transformer_blocks": (Stream("hidden_states", 0), Stream("encoder_hidden_states", 1))}


def test_the_last_block_of_sd3_stays_and_its_dual_layers_are_renumbered() -> None:
    task, _ = make("SD3Transformer2DModel")
    assert task.blocks == [f"transformer_blocks.{i}" for i in range(4)]
    student = tiny.prune(task, tiny.Keep([0, 2])(task, tiny.Trainer()))
    assert [block.context_pre_only for block in student.transformer_blocks] == [False, False, True]
    assert (student.config.num_layers, list(student.config.dual_attention_layers)) == (3, [0, 1])
    student = tiny.prune(task, tiny.Keep([2, 3])(task, tiny.Trainer()))
    assert list(student.config.dual_attention_layers) == [0]


def test_dit_shares_one_embedder_and_drops_no_labels_itself() -> None:
    task, inputs = make("DiTTransformer2DModel")
    model = task.teacher
    assert len({id(block.norm1.emb) for block in model.transformer_blocks}) == 1
    assert inputs["drop"].any()
    state = torch.random.get_rng_state()
    with torch.no_grad():
        assert torch.equal(task.loss.predict(model.train(), inputs), task.loss.predict(model.eval(), inputs))
    assert torch.equal(torch.random.get_rng_state(), state)
    dropped = {**inputs, "y": torch.full_like(inputs["y"], 3)}
    row = int(inputs["drop"].nonzero()[0])
    assert torch.equal(task.loss.predict(model, dropped)[row], task.loss.predict(model, inputs)[row])


def published(task: tiny.Task) -> Any:
    """DiT as diffusers has it, with a copy of the embedder for every block."""
    plain = diffusers.DiTTransformer2DModel.from_config(task.teacher.config)
    plain.load_state_dict(task.teacher.state_dict())
    return plain.eval()


def saved(task: tiny.Task, folder: Path) -> Path:
    """The full network in a folder, as diffusers itself saves it."""
    task.teacher.save_pretrained(folder)
    return folder


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


def refusal(config: dict[str, Any]) -> str:
    with torch.device("meta"), pytest.raises(tiny.UserError) as e:
        construct(config)
    return str(e.value)


def test_networks_whose_blocks_cannot_go_are_refused_with_the_reason() -> None:
    assert "long skips" in refusal({"_class_name": "HunyuanDiT2DModel", **HUNYUAN})
    assert "has no block list of a known name" in refusal({"_class_name": "AutoencoderKL"})
    assert "has no model 'FluxTransformer3DModel'; did you mean 'FluxTransformer2DModel'" in refusal(
        {"_class_name": "FluxTransformer3DModel"}
    )
    # Registered, but its depth is nowhere in the config.
    assert "refuses its config" in refusal(
        {"_class_name": "DiTTransformer2DModel", "norm_type": "ada_norm_single", "num_layers": 1}
    )


def test_a_config_that_cannot_say_what_is_left_is_refused() -> None:
    task, _ = make("SD3Transformer2DModel")
    del task.teacher.transformer_blocks[4]  # the one that has to be last
    with pytest.raises(tiny.UserError, match="cannot express these blocks"):
        shorten(task.teacher, {"transformer_blocks": [0, 1, 2, 3]})


def test_networks_without_a_table() -> None:
    # A relative of Wan that nothing here names: its list, streams, data and depth can be told all the same.
    config = FAMILIES["WanTransformer3DModel"].config
    backbone = DiffusersTransformer.random(
        {"_class_name": "SkyReelsV2Transformer3DModel", **config}, latent=[2, 4, 4], text_length=5
    )
    data = Tensors(backbone.example(ROWS))
    loss = RectifiedFlow(scale=1000.0)
    task = tiny.Task(backbone=backbone, loss=loss, train=data, held_out=data)
    inputs = loss.prepare(data.columns, Rng(0, "test"))
    student = tiny.prune(task, tiny.Keep([0, 3])(task, tiny.Trainer()))
    with torch.no_grad(), gated(task) as gates:
        gates.mask = torch.tensor([1.0, 0, 0, 1]).repeat(ROWS, 1)
        assert torch.equal(loss.predict(task.teacher, inputs), loss.predict(student, inputs))
    wants_more = DiffusersTransformer.random({"_class_name": "WanVACETransformer3DModel", **config, "vace_layers": [0]})
    with pytest.raises(tiny.UserError, match="WanVACETransformer3DModel cannot be called with latents"):
        loss.predict(wants_more.build(), inputs)
    assert "it is no block that takes `hidden_states` and gives one tensor" in refusal(
        {"_class_name": "LongCatImageTransformer2DModel", "num_layers": 1, "num_single_layers": 1}
    )


def test_sharding_may_put_a_class_of_its_own_before_the_networks() -> None:
    task, inputs = make("FluxTransformer2DModel")
    plain, config = task.loss.predict(task.teacher, inputs), task.backbone.config(task.teacher)
    task.teacher.__class__ = type("FSDPFlux", (type(task.teacher),), {})  # as fully_shard does
    assert torch.equal(task.loss.predict(task.teacher, inputs), plain)
    assert task.backbone.config(task.teacher) == config


def test_only_blocks_that_are_known_are_offered() -> None:
    task, _ = make("Lumina2Transformer2DModel")
    assert task.lists == {"layers": 4}  # not the refiners, whose depth is one setting for two lists


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

    wrong("backbone.model: not set")
    wrong("is no folder, and the Hugging Face hub does not give it", model="no/where")
    (tmp_path / "empty").mkdir()
    wrong("holds a config.json; expected a pipeline's folder", model=str(tmp_path / "empty"))
    (tmp_path / "empty" / "config.json").write_text("{}")
    wrong("names no _class_name", model=str(tmp_path / "empty"))
    shutil.copy(folder / "config.json", tmp_path / "empty")
    with pytest.raises(tiny.UserError, match=r"holds no diffusion_pytorch_model\.safetensors"):
        DiffusersTransformer(model=str(tmp_path / "empty")).source()
    wrong("weights cannot be read", model=str(tmp_path / "empty"))
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

    with pytest.raises(tiny.UserError, match=r"backbone\.latent is \[4\]; expected \[height, width\]"):
        DiffusersTransformer(latent=[4])
    with pytest.raises(tiny.UserError, match=r"backbone\.latent: \[2, 4, 4\]; FluxTransformer2DModel takes \[h"):
        replace(task.backbone, latent=[2, 4, 4]).example(1)
    with pytest.raises(tiny.UserError, match=r"backbone\.latent: not set, and the config does not say"):
        replace(task.backbone, latent=None).example(1)
    with pytest.raises(tiny.UserError, match=r"loss\.guidance: FluxTransformer2DModel as configured takes a guidance"):
        RectifiedFlow().predict(task.teacher, inputs)
    other, told = make("SanaTransformer2DModel")
    labelled = {**told, "y": torch.arange(ROWS), "drop": torch.ones(ROWS, dtype=torch.bool)}  # of no use to it
    assert torch.equal(other.loss.predict(other.teacher, labelled), other.loss.predict(other.teacher, told))
    with pytest.raises(tiny.UserError, match=r"loss\.guidance is 3\.5, but SanaTransformer2DModel"):
        RectifiedFlow(guidance=3.5).predict(other.teacher, told)
    with pytest.raises(tiny.UserError, match=r"takes 'text' \(encoder_hidden_states\), which the samples do not have"):
        other.loss.predict(other.teacher, {k: v for k, v in told.items() if k != "text"})
    dit, told = make("DiTTransformer2DModel")
    with pytest.raises(tiny.UserError, match="not known how DiTTransformer2DModel counts time; set loss.scale"):
        RectifiedFlow().predict(dit.teacher, told)


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
    with pytest.raises(tiny.UserError, match=r"needs diffusers .*; pip install 'diffusers>=0\.36'"):
        DiffusersTransformer.construct({"_class_name": "FluxTransformer2DModel"})


def test_listing_the_plugin_imports_neither_diffusers_nor_its_like() -> None:
    code = "import sys, tinyfusion_diffusers; print(sorted({'diffusers', 'transformers', 'peft'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_table_in_the_docs_is_what_is_tested() -> None:
    table = (ROOT / "docs" / "diffusers.md").read_text().split("## Families")[1].split("\n## ")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("| `")
    ]
    documented = {re.findall("`(.*?)`", row[0])[0]: row for row in rows}
    assert set(documented) == {*FAMILIES, "HunyuanDiT2DModel"}
    for name in FAMILIES:
        task, _ = make(name)
        _, lists, streams, protected, identities = documented[name]
        assert re.findall("`(.*?)`", lists) == list(task.lists)
        assert streams == " · ".join(_spoken(found) for found in task.backbone.streams.values())
        free = sum(len(getattr(task.teacher, path)) for path in task.lists) == len(task.blocks)
        assert protected.startswith("nothing") == free
        assert identities == "all"
    assert documented["HunyuanDiT2DModel"][-1] == "refused: long skips"


def _spoken(streams: tuple[Stream, ...]) -> str:
    """The outputs of a block in their order."""
    names = {"hidden_states": "image", "encoder_hidden_states": "text"}
    ordered = sorted(streams, key=lambda stream: stream.output or 0)
    return "one" if len(streams) == 1 else ", ".join(names[str(stream.argument)] for stream in ordered)


def test_a_run_ends_in_a_folder_that_diffusers_loads(tmp_path: Path) -> None:
    task, inputs = make("FluxTransformer2DModel")
    batch = {name: column.repeat(4, *[1] * (column.ndim - 1)) for name, column in task.train.columns.items()}
    batch["x"] *= 0.1
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
