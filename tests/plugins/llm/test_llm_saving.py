"""What is saved of a language model is what is in memory; weights in other encodings are decoded or refused."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import tinyfusion_core as tiny
from llm_toys import VOCABULARY, folder
from marks import slow_but
from tinyfusion_llm import CausalLM, NextToken

pytestmark = [pytest.mark.numerics, pytest.mark.filterwarnings("ignore")]  # of transformers
TOKENS = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))
TILE = 16


def task_of(path: Path, **more: object) -> tiny.Task:
    rows = tiny.Tensors({"tokens": TOKENS, "labels": TOKENS})
    backbone = CausalLM(model=str(path), context=12, **more)  # type: ignore[arg-type]
    return tiny.Task(backbone=backbone, loss=NextToken(), train=rows, held_out=rows)


def save(task: tiny.Task, path: Path, *kept: int) -> torch.nn.Module:
    decision = tiny.Decision(blocks=tuple(task.blocks), kept=kept, method="Keep")
    student = tiny.prune(task, decision)
    tiny.save_pretrained(student, task, decision, path)
    return student


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits


def fp8(path: Path, family: str) -> Path:
    """A folder as DeepSeek and Qwen publish them: float8 weights, and the scale of every tile. Beside it, `plain`."""
    weights: dict[str, Tensor] = load_file(folder(path, family) / "model.safetensors")
    values, stored = {}, {}
    for name, tensor in weights.items():
        stored[name] = values[name] = tensor.bfloat16()
        if ".layers." in name and tensor.ndim == 2 and not any(size % TILE for size in tensor.shape):
            tiles = tensor.unfold(0, TILE, TILE).unfold(1, TILE, TILE)  # rows, columns, height, width
            scales = tiles.abs().amax((2, 3)) / 448
            whole = scales.repeat_interleave(TILE, 0).repeat_interleave(TILE, 1)
            stored[name] = (tensor / whole).to(torch.float8_e4m3fn)
            stored[f"{name}_scale_inv"] = scales
            values[name] = stored[name].float() * whole
    config = json.loads((path / "config.json").read_text()) | {"dtype": "bfloat16"}
    encoding = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [TILE, TILE]}
    (path.parent / "plain").mkdir()
    for place, tensors, more in (
        (path, stored, {"quantization_config": encoding}),
        (path.parent / "plain", values, {}),
    ):
        save_file(tensors, place / "model.safetensors", {"format": "pt"})
        (place / "config.json").write_text(json.dumps(config | more))
    return path


def mxfp4(path: Path) -> Path:
    """A folder as gpt-oss is published: numbers of four bits in blocks of 32 with a scale, two to a byte."""
    sizes = {"hidden_size": 64, "intermediate_size": 32, "head_dim": 16, "num_local_experts": 4}
    weights: dict[str, Tensor] = load_file(folder(path, "gpt_oss", **sizes) / "model.safetensors")
    stored, rng = {}, torch.Generator().manual_seed(0)
    for name, tensor in weights.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, inner, outer = tensor.shape
            blocks = (experts, outer, inner // 32)
            stored[f"{name}_blocks"] = torch.randint(0, 256, (*blocks, 16), generator=rng, dtype=torch.uint8)
            stored[f"{name}_scales"] = torch.full(blocks, 122, dtype=torch.uint8)
        else:
            stored[name] = tensor.bfloat16()
    save_file(stored, path / "model.safetensors", {"format": "pt"})
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    encoding = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16", "quantization_config": encoding}))
    return path


def check_student(task: tiny.Task, path: Path, dtype: torch.dtype) -> None:
    student = save(task, path, 0, 1, 4, 5)
    again, loading = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(loading.values())
    assert again.dtype == dtype
    assert torch.equal(logits(again), logits(student))
    assert {tensor.dtype for tensor in load_file(path / "model.safetensors").values()} == {dtype}
    assert "quantization_config" not in json.loads((path / "config.json").read_text())
    assert "dequantised to" in (path / "README.md").read_text()


@pytest.mark.parametrize(("asked", "dtype"), [("auto", torch.bfloat16), ("float32", torch.float32)])
@pytest.mark.parametrize("family", slow_but(["qwen3", "llama", "qwen3_moe"], "qwen3_moe"))
def test_a_student_of_float8_weights_is_a_plain_one(
    family: str, asked: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    task = task_of(fp8(tmp_path / "full", family), dtype=asked)
    said = str(dtype).removeprefix("torch.")
    with pytest.warns(UserWarning, match=rf"are fp8, dequantised to {said}: \S+ MB from \S+ MB"):
        found = logits(task.teacher)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=dtype)
    assert torch.equal(found, logits(plain))
    check_student(task, tmp_path / "student", dtype)


def test_float8_weights_that_are_not_said_to_be_scaled_are_refused(tmp_path: Path) -> None:
    path = fp8(tmp_path / "full", "llama")
    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"]
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(tiny.UserError, match=r"do not fit its config: model.layers.0\.\S+weight_scale_inv"):
        CausalLM(model=str(path)).build()


def test_a_checkpoint_may_hold_a_further_head(tmp_path: Path) -> None:
    path = folder(tmp_path, "llama")
    weights = load_file(path / "model.safetensors")
    save_file({**weights, "value_head.weight": torch.ones(1, 32)}, path / "model.safetensors", {"format": "pt"})
    assert torch.equal(logits(CausalLM(model=str(path)).build()), logits(AutoModelForCausalLM.from_pretrained(path)))


def test_a_student_of_four_bits_is_a_plain_one(tmp_path: Path) -> None:
    task = task_of(mxfp4(tmp_path / "full"))
    with pytest.warns(UserWarning, match=r"are mxfp4, dequantised to bfloat16: \S+ MB from \S+ MB"):
        assert logits(task.teacher).abs().max() > 0.1
    check_student(task, tmp_path / "student", torch.bfloat16)


@pytest.mark.parametrize(
    "encoding",
    [
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq"},
        {"quant_method": "torchao"},
        {"quant_method": "of tomorrow"},
    ],
)
def test_other_encodings_are_refused_when_the_plan_is_made(encoding: dict[str, object], tmp_path: Path) -> None:
    path = folder(tmp_path, "llama")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": encoding}))
    with pytest.raises(tiny.UserError, match=rf"quantised \({encoding['quant_method']}\) and cannot be dequantised"):
        CausalLM(model=str(path)).config()


def change(name: str, repair: Callable[[Tensor], Tensor | None]) -> Callable[[torch.nn.Module, Path], list[str]]:
    """A way of saving that changes or leaves out one tensor, or, of a name that is not there, adds one."""

    def saving(model: torch.nn.Module, path: Path) -> list[str]:
        model.save_pretrained(path)  # type: ignore[operator]
        weights = load_file(path / "model.safetensors")
        changed = repair(weights.pop(name, torch.zeros(1)))
        save_file(weights if changed is None else {**weights, name: changed}, path / "model.safetensors")
        return sorted(p.name for p in path.iterdir())

    return saving


NORM, HEAD = "model.norm.weight", "lm_head.weight"


@pytest.mark.parametrize(
    ("saving", "message"),
    [
        (change(NORM, lambda t: t + 1e-6), "model.norm.weight has other values"),
        (change(NORM, lambda t: None), "do not fit its config: model.norm.weight"),
        (change(NORM, lambda t: t[:-1]), "do not fit its config: .*model.norm.weight"),
        (change("model.further", lambda t: t), "do not fit its config: model.further"),
        (change(HEAD, lambda t: t.bfloat16()), None),  # read in the dtype of the config
    ],
)
def test_what_is_read_otherwise_is_not_saved(
    saving: Callable[[torch.nn.Module, Path], list[str]],
    message: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task = task_of(folder(tmp_path / "full", "qwen3"))
    monkeypatch.setattr(CausalLM, "save", lambda self, model, path: saving(model, path))
    with pytest.raises(tiny.UserError, match=message or "lm_head.weight has other values"):
        save(task, tmp_path / "student", 0, 2)
    assert not any((tmp_path / "student").iterdir())


def test_a_setting_that_the_files_do_not_hold_is_found_by_a_forward(tmp_path: Path) -> None:
    task = task_of(folder(tmp_path / "full", "llama"))
    student = tiny.prune(task, decision := tiny.Decision(blocks=tuple(task.blocks), kept=(0, 2), method="Keep"))
    student.model.norm.variance_epsilon = 1e-4  # the config says 1e-6
    with pytest.raises(tiny.UserError, match="has the same weights and predicts otherwise"):
        tiny.save_pretrained(student, task, decision, tmp_path / "student")


def test_no_shards_of_an_older_student_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = task_of(folder(tmp_path / "full", "llama"))
    whole = CausalLM.save

    def sharded(self: CausalLM, model: torch.nn.Module, path: Path) -> list[str]:
        model.save_pretrained(path, max_shard_size="40KB")  # type: ignore[operator]
        return sorted(p.name for p in path.iterdir())

    monkeypatch.setattr(CausalLM, "save", sharded)
    save(task, tmp_path / "student", 0, 1, 2, 3)
    assert (tmp_path / "student" / "model.safetensors.index.json").exists()
    assert len(list((tmp_path / "student").glob("*.safetensors"))) > 2
    monkeypatch.setattr(CausalLM, "save", whole)
    student = save(task, tmp_path / "student", 0, 2)
    assert [p.name for p in (tmp_path / "student").glob("*.safetensors*")] == ["model.safetensors"]
    assert torch.equal(logits(tiny.load_pretrained(tmp_path / "student")), logits(student))


def test_weights_of_others_are_neither_mixed_with_ours_nor_removed(tmp_path: Path) -> None:
    task = task_of(folder(tmp_path / "full", "llama"))
    AutoModelForCausalLM.from_pretrained(tmp_path / "full").save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    before = {p.name: p.read_bytes() for p in (tmp_path / "theirs").iterdir()}
    with pytest.raises(tiny.UserError, match=r"holds weights of another network \(model-00001-of"):
        save(task, tmp_path / "theirs", 0, 2)
    assert {p.name: p.read_bytes() for p in (tmp_path / "theirs").iterdir()} == before


ATTENTION, MAMBA = "attention", "mamba"


def test_a_shared_block_that_counts_on_a_removed_layer_is_found_out(tmp_path: Path) -> None:
    sizes = {"mamba_d_state": 8, "mamba_headdim": 16, "n_mamba_heads": 4, "attention_head_dim": 16, "num_mem_blocks": 1}
    kinds = {"layers_block_type": [MAMBA, "hybrid"] * 2 + [MAMBA] * 2, "num_key_value_heads": 4, "adapter_rank": 4}
    more = {"mamba_ngroups": 1, "chunk_size": 4, "use_shared_attention_adapter": False}
    task = task_of(folder(tmp_path / "full", "zamba2", **sizes, **kinds, **more))
    with pytest.raises(
        tiny.UserError, match=r"a 'zamba2' of the layers \[0, 1, 3, 5\] alone does not run \(KeyError: 2\)"
    ):
        save(task, tmp_path / "student", 0, 1, 3, 5)
    student = save(task, tmp_path / "student", 0, 1, 2, 3)
    assert torch.equal(logits(tiny.load_pretrained(tmp_path / "student")), logits(student))


def test_a_student_that_has_lost_all_attention_is_said_not_to_generate(tmp_path: Path) -> None:
    sizes = {"head_dim": 8, "mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1}
    kinds = {"layers_block_type": [MAMBA, ATTENTION, "mlp"] * 2, "chunk_size": 4}
    task = task_of(folder(tmp_path / "full", "nemotron_h", **sizes, **kinds))
    with pytest.warns(UserWarning, match=r"'nemotron_h' of the layers \[0, 2, 3, 5\] alone cannot generate"):
        student = save(task, tmp_path / "student", 0, 2, 3, 5)
    with pytest.raises(ValueError, match="Attention layers"):  # as was said
        student.generate(TOKENS, max_new_tokens=2)  # type: ignore[operator]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "backbone")
        with_attention = save(task, tmp_path / "student", 0, 1, 3, 5)
    assert with_attention.generate(TOKENS, max_new_tokens=2, min_new_tokens=2).shape == (2, 14)  # type: ignore[operator]
