"""Every family of decoders is pruned alike; what is saved is a model that transformers loads and generates with."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import tinyfusion_core as tiny
from llm_toys import FAMILIES, TOKENS, VOCABULARY, decide, folder, logits, settings, task_of
from marks import slow_but
from tinyfusion_core.pruning.gating import Gates
from tinyfusion_llm import CausalLM, NextToken
from tinyfusion_llm.layers.finding import find_layers

pytestmark = [pytest.mark.numerics, pytest.mark.filterwarnings("ignore")]  # of transformers
KEPT = (0, 2, 3, 5)


@pytest.mark.parametrize("family", slow_but(FAMILIES, "llama", "gemma2", "smollm3"))
def test_a_pruned_family_is_a_plain_checkpoint(family: str, tmp_path: Path) -> None:
    task = task_of(folder(tmp_path / "full", family))
    plain, inputs = logits(task.teacher), task.loss.prepare({"tokens": TOKENS, "labels": TOKENS}, tiny.Rng(0, "test"))
    prediction = task.loss.predict(task.teacher, inputs)
    assert torch.allclose(prediction.head(prediction.states), plain, atol=1e-6)  # with its caps and scales

    mask = torch.tensor([float(i in KEPT) for i in range(6)])
    dims = task.batch_dim(task.teacher)
    with (
        Gates(task.teacher, task.blocks, dims, task.backbone.streams, task.backbone.unneeded) as gates,
        torch.no_grad(),
    ):
        gates.mask = torch.ones(3, 6)
        assert torch.equal(task.loss.predict(task.teacher, inputs).states, prediction.states)
        gates.mask = mask.expand(3, 6)
        gated = task.loss.predict(task.teacher, inputs).states
    student = tiny.prune(task, decide(task, KEPT))
    assert torch.equal(logits(task.teacher), plain)
    with torch.no_grad():
        assert torch.allclose(task.loss.predict(student, inputs).states, gated, atol=1e-5)

    tiny.save_pretrained(student, task, decide(task, KEPT), tmp_path / "student")
    again, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "student", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert torch.equal(logits(again), logits(student))
    assert torch.equal(logits(tiny.load_pretrained(tmp_path / "student")), logits(student))
    assert again.config.get_text_config().num_hidden_layers == 4
    assert again.generation_config.temperature == 0.5
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    cached, uncached = (again.generate(TOKENS, use_cache=cache, **options) for cache in (True, False))
    assert torch.equal(cached, uncached)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_gradient_of_the_gates_is_that_of_the_dense_formula(family: str, tmp_path: Path) -> None:
    task = task_of(folder(tmp_path, family))
    task.teacher.double()  # a gate's gradient is a sum that cancels
    inputs = task.loss.prepare({"tokens": TOKENS, "labels": TOKENS}, tiny.Rng(0, "test"))
    mask = (torch.rand(3, 6) < 0.5).double().requires_grad_()
    with Gates(task.teacher, task.blocks, task.batch_dim(task.teacher), unneeded=task.backbone.unneeded) as gates:
        gates.mask = mask
        loss = task.loss.loss(task.loss.predict(task.teacher, inputs), inputs)
        (found,) = torch.autograd.grad(loss.sum(), mask)
    hooks = [
        task.teacher.get_submodule(path).register_forward_hook(
            lambda _m, args, _kw, out, m=mask[:, j, None, None]: args[0] + m * (out - args[0]), with_kwargs=True
        )
        for j, path in enumerate(task.blocks)
    ]
    whole = task.teacher(input_ids=TOKENS, use_cache=False).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(whole.flatten(0, 1), TOKENS[:, 1:].flatten(), reduction="none")
    (expected,) = torch.autograd.grad(losses.view(3, -1).mean(1).sum(), mask)
    for hook in hooks:
        hook.remove()
    assert torch.allclose(found, expected, atol=1e-5)


def test_the_config_says_what_is_left(tmp_path: Path) -> None:
    for family, key, expected in [
        ("qwen2", "layer_types", ["full_attention"] + ["full_attention"] + ["sliding_attention"] * 2),
        ("smollm3", "no_rope_layers", [1, 0, 1, 0]),
        ("qwen2_moe", "mlp_only_layers", [2]),
        ("deepseek_v3", "first_k_dense_replace", 1),
        ("gpt2", "n_layer", 4),
    ]:
        task = task_of(folder(tmp_path / family, family))
        tiny.save_pretrained(tiny.prune(task, decide(task, KEPT)), task, decide(task, KEPT), tmp_path / f"{family} out")
        assert json.loads((tmp_path / f"{family} out" / "config.json").read_text())[key] == expected, family


def test_dtype_and_tied_embeddings_stay(tmp_path: Path) -> None:
    task = task_of(folder(tmp_path / "full", "llama", torch.bfloat16))
    tiny.save_pretrained(tiny.prune(task, decide(task, KEPT)), task, decide(task, KEPT), tmp_path / "student")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert again.dtype == torch.bfloat16
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert json.loads((tmp_path / "student" / "config.json").read_text())["dtype"] == "bfloat16"
    record = json.loads((tmp_path / "student" / "tinyfusion.json").read_text())
    assert set(record["sha256"]) >= {"model.safetensors", "config.json", "generation_config.json", "decision.json"}
    assert "AutoModelForCausalLM" in (tmp_path / "student" / "README.md").read_text()
    (tmp_path / "student" / "generation_config.json").write_text("{}")
    with pytest.raises(tiny.UserError, match="not the file that"):
        tiny.load_pretrained(tmp_path / "student")


def test_layers_that_the_config_cannot_express_are_named(tmp_path: Path) -> None:
    more = {"attn_layer_period": 3, "attn_layer_offset": 1, "num_experts": 2, "mamba_d_state": 4}
    task = task_of(folder(tmp_path, "jamba", **more))
    with pytest.raises(tiny.UserError, match=r"cannot express the layers .0, 2, 3, 5. of 6.*attn_layer_period"):
        tiny.prune(task, decide(task, KEPT))


def test_a_list_of_another_depth_is_not_taken_for_the_layers(tmp_path: Path) -> None:
    model = CausalLM(network=settings("llama")).construct(settings("llama"))
    assert find_layers(model) == "model.layers"
    model.model.layers.append(torch.nn.Linear(1, 1))
    with pytest.raises(tiny.UserError, match="found: none"):
        find_layers(model)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ({"model_type": "t5"}, "encoder-decoder"),
        ({"model_type": "vit"}, "not a decoder-only language model"),
        ({"model_type": "lama"}, "cannot read a config"),
    ],
)
def test_other_models_are_refused(network: dict[str, str], message: str) -> None:
    with pytest.raises(tiny.UserError, match=message):
        CausalLM(network=network).construct(network)


@pytest.mark.parametrize("family", ["gpt2", "gptj"])
def test_the_default_search_fits_layers_of_other_kinds(family: str) -> None:
    backbone = CausalLM(network=settings(family), context=16, _random_seed=0)
    rows = tiny.Tensors(backbone.example(8))
    task = tiny.Task(backbone=backbone, loss=NextToken(), train=rows, held_out=rows)
    decision = tiny.Search(keep=3, steps=2)(task, tiny.Trainer(precision="fp32", batch_size=4))
    assert len(decision.kept) == 3


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation", "experts_implementation"])
def test_a_config_that_names_code_of_the_hub_is_refused(tmp_path: Path, key: str) -> None:
    path = folder(tmp_path / "model", "qwen3_moe")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, key: "org/kernels"}))
    with pytest.raises(tiny.UserError, match=r"names a kernel of the hub, 'org/kernels', whose code would be run"):
        CausalLM(model=str(path)).build()


def test_a_model_that_sees_later_tokens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(tiny.UserError, match="not decoder-only"):
        CausalLM(model=str(folder(tmp_path, "bert"))).build()


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(tiny.UserError, match="no folder '.*none'"):
        CausalLM(model=str(tmp_path / "none")).build()
    path = folder(tmp_path / "full", "llama")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 7}))
    with pytest.raises(tiny.UserError, match=r"do not fit its config.*model.layers.6"):
        CausalLM(model=str(path)).build()
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(tiny.UserError, match="network: hidden_size is 64, in .* it is 32"):
        CausalLM(model=str(path), network={"model_type": "llama", "hidden_size": 64}).config()
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(tiny.UserError, match="cannot be read"):
        CausalLM(model=str(path)).build()
    (path / "adapter_config.json").write_text("{}")
    with pytest.raises(tiny.UserError, match="is an adapter of peft; merge it into its model first"):
        CausalLM(model=str(path)).config()


def test_gguf_without_its_package_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(tiny.UserError, match=r"pip install 'tinyfusion\[gguf\]'"):
        CausalLM(model=str(tmp_path), gguf_file="model.gguf").build()


def test_a_budget_that_removes_all_blocks_is_refused(tmp_path: Path) -> None:
    task = task_of(folder(tmp_path, "llama"))
    with pytest.raises(tiny.UserError, match="no block"):
        decide(task, ())
    with pytest.raises(tiny.UserError):
        tiny.Search(pattern=(0, 6)).preview(task.blocks)


def test_tiny_runs_and_none_of_its_weights_is_zero() -> None:
    model = CausalLM.tiny().build()
    assert all((p != 0).all() for p in model.parameters())
    assert torch.equal(logits(model), logits(CausalLM.tiny().build()))


def test_a_gguf_file_becomes_a_model_that_can_be_pruned_and_saved(tmp_path: Path) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "tiny.gguf", "llama")
    for add, value in [
        (writer.add_context_length, 64), (writer.add_embedding_length, 32), (writer.add_block_count, 6),
        (writer.add_feed_forward_length, 48), (writer.add_head_count, 4), (writer.add_head_count_kv, 4),
        (writer.add_layer_norm_rms_eps, 1e-5), (writer.add_vocab_size, VOCABULARY), (writer.add_rope_freq_base, 1e4),
    ]:  # fmt: skip
        add(value)
    shapes = {
        "attn_q": (32, 32), "attn_k": (32, 32), "attn_v": (32, 32), "attn_output": (32, 32), "ffn_gate": (48, 32),
        "ffn_up": (48, 32), "ffn_down": (32, 48), "attn_norm": (32,), "ffn_norm": (32,),
    }  # fmt: skip
    whole = {f"blk.{i}.{name}": shape for i in range(6) for name, shape in shapes.items()}
    rng = torch.Generator().manual_seed(0)
    values: dict[str, Tensor] = {}
    for name, shape in {
        "token_embd": (VOCABULARY, 32),
        "output_norm": (32,),
        "output": (VOCABULARY, 32),
        **whole,
    }.items():
        values[name] = torch.randn(shape, generator=rng)
        writer.add_tensor(f"{name}.weight", values[name].numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    task = task_of(tmp_path, gguf_file="tiny.gguf", dtype="float32")
    assert torch.equal(task.teacher.get_submodule(task.blocks[3]).mlp.up_proj.weight, values["blk.3.ffn_up"])
    student = tiny.prune(task, decide(task, KEPT))
    tiny.save_pretrained(student, task, decide(task, KEPT), tmp_path / "student")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert torch.equal(logits(again), logits(student))
    assert "quantization_config" not in json.loads((tmp_path / "student" / "config.json").read_text())
