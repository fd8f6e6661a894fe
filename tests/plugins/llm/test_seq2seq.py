"""Encoder-decoders lose layers of both lists; what is saved is a model that transformers loads and generates with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq

import tinyfusion_core as tiny
from marks import slow_but
from seq2seq_toys import LISTS, NETWORKS, WIDTHS, batch, decide, folder, states, task_of
from tinyfusion_core.pruning.gating import Gates
from tinyfusion_llm import CausalLM, EncoderDecoder, Generation, NextToken
from tinyfusion_llm.layers.stacks import find_stacks

pytestmark = [pytest.mark.numerics, pytest.mark.filterwarnings("ignore")]  # of transformers
KEPT = (0, 2, 3, 4, 6)
DEPTHS = {
    "t5": ("num_layers", "num_decoder_layers"),
    **dict.fromkeys(("bart", "whisper"), ("encoder_layers", "decoder_layers")),
}


@pytest.fixture(params=slow_but(NETWORKS, "t5", "whisper"))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def speech(family: str) -> bool:
    return family == "whisper"


def test_a_pruned_family_is_a_plain_checkpoint(family: str, tmp_path: Path) -> None:
    task = task_of(folder(tmp_path / "full", family), speech(family))
    inputs = task.loss.prepare(batch(3, speech(family)), tiny.Rng(0, "test"))
    encoder, decoder = LISTS[family]
    assert task.lists == {encoder: 4, decoder: 3}
    with torch.no_grad():  # attention is summed otherwise where a bias learns
        prediction = task.loss.predict(task.teacher, inputs)
    given = {"attention_mask": inputs.get("source_mask"), "decoder_input_ids": inputs["tokens"]}
    read = {task.teacher.main_input_name: inputs["features" if speech(family) else "source"]}
    plain = task.teacher(**read, **given, use_cache=False).logits
    assert torch.allclose(prediction.head(prediction.states), plain, atol=1e-6)  # with bias and scale
    losses = torch.nn.functional.cross_entropy(
        plain[:, :-1].flatten(0, 1), inputs["targets"].flatten(), reduction="none", ignore_index=-100
    )
    expected = losses.view(3, -1).sum(1) / (inputs["targets"] != -100).sum(1)
    assert torch.allclose(task.loss.loss(prediction, inputs), expected, atol=1e-6)

    rows = [KEPT, tuple(range(7)), (0, 4)]
    mask = torch.tensor([[float(i in kept) for i in range(7)] for kept in rows], requires_grad=True)
    with Gates(task.teacher, task.blocks, task.batch_dim(task.teacher), task.streams, task.backbone.unneeded) as gates:
        gates.mask = torch.ones(3, 7)
        assert torch.equal(states(task, task.teacher, inputs), prediction.states)
        gates.mask = mask.detach()
        alone = states(task, task.teacher, inputs)
        gates.mask = mask
        gated = task.loss.predict(task.teacher, inputs)
        (gradient,) = torch.autograd.grad(task.loss.loss(gated, inputs).sum(), mask)
    assert gradient.isfinite().all() and (gradient != 0).any(0).all()
    for i, kept in enumerate(rows):
        student = tiny.prune(task, decide(task, kept))
        found = states(task, student, inputs)[i]
        for under in (alone[i], gated.states[i]):
            assert torch.allclose(found, under, atol=1e-5)

    student = tiny.prune(task, decide(task, KEPT))
    tiny.save_pretrained(student, task, decide(task, KEPT), tmp_path / "student")
    reader = AutoModelForSpeechSeq2Seq if speech(family) else AutoModelForSeq2SeqLM
    again, loading = reader.from_pretrained(tmp_path / "student", output_loading_info=True)
    assert not any(loading.values())
    for read_back in (again, tiny.load_pretrained(tmp_path / "student")):
        assert torch.equal(states(task, read_back, inputs), states(task, student, inputs))
    config = json.loads((tmp_path / "student" / "config.json").read_text())
    assert [config[key] for key in DEPTHS[family]] == [3, 2]
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached, uncached = (again.generate(*read.values(), use_cache=cache, **options) for cache in (True, False))
    assert torch.equal(cached, uncached)


def test_the_gradient_of_the_gates_is_that_of_the_dense_formula(family: str, tmp_path: Path) -> None:
    task = task_of(folder(tmp_path, family), speech(family))
    task.teacher.double()  # a gate's gradient is a sum that cancels
    inputs = task.loss.prepare(batch(3, speech(family)), tiny.Rng(0, "test"))
    mask = (torch.rand(3, 7, generator=torch.Generator().manual_seed(0)) < 0.5).double()
    mask[:, [0, 4]] = 1  # which T5 cannot do without
    mask.requires_grad_()
    dims = task.batch_dim(task.teacher)
    with Gates(task.teacher, task.blocks, dims, unneeded=task.backbone.unneeded) as gates:
        gates.mask = mask
        loss = task.loss.loss(task.loss.predict(task.teacher, inputs), inputs)
        (found,) = torch.autograd.grad(loss.sum(), mask)

    def dense(_block: Any, args: Any, output: Any, m: torch.Tensor) -> Any:
        stream = output if isinstance(output, torch.Tensor) else output[0]
        merged = args[0] + m * (stream - args[0])
        return merged if stream is output else (merged, *output[1:])

    hooks = [
        task.teacher.get_submodule(path).register_forward_hook(
            lambda block, args, output, m=mask[:, j, None, None]: dense(block, args, output, m)
        )
        for j, path in enumerate(task.blocks)
    ]
    loss = task.loss.loss(task.loss.predict(task.teacher, inputs), inputs)
    (expected,) = torch.autograd.grad(loss.sum(), mask)
    for hook in hooks:
        hook.remove()
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("option", ["context", "source_context"])
def test_no_more_tokens_than_positions(option: str, tmp_path: Path) -> None:
    positions = {"max_position_embeddings": 16}
    backbone = EncoderDecoder(model=str(folder(tmp_path, "bart", **positions)), **{"context": 8, option: 17})
    with pytest.raises(tiny.UserError, match=rf"{option} is 17; expected at most 16, the network's positions"):
        backbone.lookups(backbone.build())


@pytest.mark.slow
def test_the_first_layers_of_t5_stay_and_are_found_by_trial(tmp_path: Path) -> None:
    task = task_of(folder(tmp_path, "t5"))
    assert task.backbone.limits(task.teacher) == {"protect": [0, 4]}
    assert (
        EncoderDecoder(network={"model_type": "bart", **NETWORKS["bart"]}).limits(
            EncoderDecoder(network={"model_type": "bart"}).construct({"model_type": "bart", **NETWORKS["bart"]})
        )
        == {}
    )
    with pytest.raises(
        tiny.UserError, match=r"cannot express the layers \[1, 2, 3\] of 4 and \[0, 1, 2\] of 3: .*bias"
    ):
        tiny.prune(task, decide(task, (1, 2, 3, 4, 5, 6)))
    trainer = tiny.Trainer(precision="fp32", batch_size=2)
    keep = {"encoder.block": 2, "decoder.block": 1}
    decision = tiny.Search(keep=keep, steps=2)(task, trainer)
    assert {0, 4} < set(decision.kept) and len(decision.kept) == 3


def test_a_t5_that_transformers_gives_too_short_a_cache_is_told_of(tmp_path: Path) -> None:
    task = task_of(folder(tmp_path, "t5"))
    with pytest.warns(
        UserWarning, match="cannot generate, it runs with use_cache=False only .*; keep as many layers in the"
    ):
        student: Any = tiny.prune(task, decide(task, (0, 3, 4, 5, 6)))
    with pytest.raises(IndexError):  # its own fault, not that of the student
        student.generate(batch(2)["source"], max_new_tokens=2)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ({"model_type": "llama"}, "is not an encoder-decoder"),
        ({"model_type": "bert"}, "is not an encoder-decoder"),
        ({"model_type": "t6"}, "cannot read a config"),
    ],
)
def test_other_models_are_refused(network: dict[str, Any], message: str) -> None:
    with pytest.raises(tiny.UserError, match=message):
        EncoderDecoder(network=network).construct(network)


def test_data_without_what_the_encoder_reads_are_refused(tmp_path: Path) -> None:
    task = task_of(folder(tmp_path, "bart"))
    inputs = task.loss.prepare(batch(2, features=True), tiny.Rng(0, "test"))
    with pytest.raises(
        tiny.UserError, match=r"no column 'source', which the encoder of a 'bart' reads \(found: features"
    ):
        task.loss.predict(task.teacher, inputs)


def test_memory_and_operations_of_speech_are_counted(tmp_path: Path) -> None:
    for family in NETWORKS:
        backbone = EncoderDecoder(model=str(folder(tmp_path / family, family)), source_context=12, context=8)
        with torch.device("meta"):
            model = backbone.construct(backbone.config())
        inputs = {name: t.to("meta") for name, t in NextToken().prepare(backbone.example(2), tiny.Rng(0, "x")).items()}
        assert NextToken().predict(model, inputs).states.shape == (2, 8, 32)


def test_a_head_that_reads_more_than_states_is_refused() -> None:
    network = {
        "model_type": "prophetnet", "hidden_size": 32, "num_encoder_layers": 2, "num_decoder_layers": 2,
        "num_encoder_attention_heads": 2, "num_decoder_attention_heads": 2, "encoder_ffn_dim": 32, "vocab_size": 97,
        "decoder_ffn_dim": 32,
    }  # fmt: skip
    with pytest.raises(
        tiny.UserError, match="the head of a 'prophetnet' reads more than its decoder's last hidden states"
    ):
        EncoderDecoder(network=network, _random_seed=0).build()


def test_layers_that_skip_themselves_at_random_do_not(tmp_path: Path) -> None:
    task = task_of(folder(tmp_path, "bart", encoder_layerdrop=0.5, decoder_layerdrop=0.5, dropout=0.0))
    assert task.teacher.config.encoder_layerdrop == task.teacher.model.decoder.layerdrop == 0  # type: ignore[union-attr]


def test_tied_weights_of_the_tiny_one_stay_tied() -> None:
    model = EncoderDecoder.tiny().build()
    assert all((p != 0).all() for p in model.parameters())
    assert model.model.shared.weight is model.lm_head.weight  # type: ignore[union-attr]


def test_generation_is_timed_with_the_encoder_as_prefill(family: str, tmp_path: Path) -> None:
    task = task_of(folder(tmp_path, family), speech(family))
    models = {"teacher": task.teacher, "student": tiny.prune(task, decide(task, (0, 1, 2, 3, 4)))}
    trainer = tiny.Trainer(precision="fp32", batch_size=2)
    found = {m.name: m for m in Generation(prompt=10, new_tokens=4, rounds=1, batch_size=2)(task, models, trainer)}
    assert set(found) == {"prefill", "decode", "memory"} and all(
        v > 0 for m in found.values() for v in m.values.values()
    )
    # Keys and values of each decoder layer, 32 channels of 4 bytes: those of 5 tokens and of the 10 that were encoded.
    cached = 2 * 32 * 4 * 2 * (5 + 10)
    layer = sum(p.numel() for p in task.teacher.get_submodule(task.blocks[-1]).parameters()) * 4
    saved = (found["memory"].values["teacher"] - found["memory"].values["student"]) * 2**20
    assert saved == pytest.approx(2 * (layer + cached), rel=1e-6)


def test_tools_for_decoders_are_given_no_decision(tmp_path: Path) -> None:
    task = task_of(folder(tmp_path, "bart"))
    found = task.backbone.clients(task.teacher, tiny.prune(task, decide(task, KEPT)), KEPT)
    assert set(found) >= {"mergekit", "peft", "llama.cpp"} and all(
        "one list of layers" in why for why in found.values()
    )


def test_a_list_by_layer_is_that_of_the_layers_that_it_is_about() -> None:
    network = {
        "model_type": "led", **WIDTHS, "encoder_layers": 3, "decoder_layers": 3, "attention_window": [4, 8, 16],
        "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64,
    }  # fmt: skip
    backbone = EncoderDecoder(network=network, source_context=32, context=8, _random_seed=0)
    assert [(stack.key, stack.listed) for stack in find_stacks(backbone.build())] == [
        ("encoder_layers", True),
        ("decoder_layers", False),
    ]
    rows = tiny.Tensors(backbone.example(2))
    task = tiny.Task(backbone=backbone, loss=NextToken(), train=rows, held_out=rows)
    for kept, windows in (((0, 2, 4, 5), [4, 16]), ((0, 1, 2, 3), [4, 8, 16])):
        config: Any = tiny.prune(task, decide(task, kept)).config
        assert config.attention_window == windows
        assert (config.encoder_layers, config.decoder_layers) == (len(windows), len(kept) - len(windows))


def test_pairs_for_a_decoder_alone_are_refused() -> None:
    model = CausalLM.tiny().build()
    assert CausalLM.tiny().lookups(model)["source"].size == 0
    with pytest.raises(tiny.UserError, match="'t5' .*is an encoder-decoder; take the backbone EncoderDecoder"):
        CausalLM(network={"model_type": "t5"}).construct({"model_type": "t5"})


def test_sizes_that_a_recipe_leaves_out_are_those_of_the_library() -> None:
    network = {"model_type": "whisper", **WIDTHS, "num_mel_bins": 8}  # of 1500 positions, two frames each
    assert EncoderDecoder(network=network, context=4).example(1)["features"].shape == (1, 8, 3000)
