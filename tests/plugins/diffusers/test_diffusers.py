"""Transformers of diffusers: gated exactly, pruned for good, saved as what diffusers itself loads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import tinyfusion_core as tiny
from diffusers_families import FAMILIES, HUNYUAN
from diffusers_tasks import ROWS, dense, make, relative
from marks import slow_but
from tinyfusion_core.protocols.blocks.streams import Stream
from tinyfusion_core.protocols.data import Tensors
from tinyfusion_core.pruning.gating import Gates
from tinyfusion_core.pruning.weight_update import WeightUpdate
from tinyfusion_core.runtime.seeding import Rng
from tinyfusion_diffusers import DiffusersTransformer, RectifiedFlow
from tinyfusion_diffusers.structure import shorten

pytestmark = [pytest.mark.numerics, pytest.mark.filterwarnings("ignore")]  # of other libraries

QUICK = ("SD3Transformer2DModel", "WanTransformer3DModel")
"""One stream and several, images and videos; those of the other families are slow tests."""


def gated(task: tiny.Task) -> Gates:
    return Gates(task.teacher, task.blocks, task.batch_dim(task.teacher), task.backbone.streams)


@pytest.mark.parametrize("name", slow_but(FAMILIES, *QUICK))
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


@pytest.mark.parametrize("name", slow_but(FAMILIES, *QUICK))
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
@pytest.mark.parametrize(
    "name", slow_but(["DiTTransformer2DModel", "AuraFlowTransformer2DModel"], "AuraFlowTransformer2DModel")
)
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


def refusal(config: dict[str, Any]) -> str:
    with pytest.raises(tiny.UserError) as e:
        _ = DiffusersTransformer.random(config).streams
    return str(e.value)


def test_networks_whose_blocks_cannot_go_are_refused_with_the_reason() -> None:
    assert "long skips" in refusal({"_class_name": "HunyuanDiT2DModel", **HUNYUAN})
    assert "has no list whose config can say it one block shorter (there is none)" in refusal(
        {"_class_name": "AutoencoderKL"}
    )
    assert "has no model 'FluxTransformer3DModel'; did you mean 'FluxTransformer2DModel'" in refusal(
        {"_class_name": "FluxTransformer3DModel"}
    )
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


def test_sharding_may_put_a_class_of_its_own_before_the_networks() -> None:
    task, inputs = make("FluxTransformer2DModel")
    plain, config = task.loss.predict(task.teacher, inputs), task.backbone.config(task.teacher)
    task.teacher.__class__ = type("FSDPFlux", (type(task.teacher),), {})  # as fully_shard does
    assert torch.equal(task.loss.predict(task.teacher, inputs), plain)
    assert task.backbone.config(task.teacher) == config


def test_only_blocks_that_are_known_are_offered() -> None:
    task, _ = make("Lumina2Transformer2DModel")
    assert task.lists == {"layers": 4}  # not the refiners, whose depth is one setting for two lists
