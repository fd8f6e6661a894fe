"""Quantised weights: GGUF files become the numbers that gguf and diffusers make of them; others are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import gguf
import numpy as np
import pytest
import torch
import yaml
from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor
from safetensors.torch import load_file

import tinyfusion_core as tiny
from diffusers_tasks import make, saved, taught
from tinyfusion_core.cli import main
from tinyfusion_diffusers import DiffusersTransformer
from tinyfusion_diffusers.files.original import renamed

pytestmark = [pytest.mark.numerics, pytest.mark.filterwarnings("ignore")]  # of other libraries

Kind = gguf.GGMLQuantizationType
WIDE = {"attention_head_dim": 128, "caption_projection_dim": 256, "num_layers": 2, "dual_attention_layers": [0]}
"""Of a network whose rows are whole blocks of 256 numbers."""


def raw(kind: Any, numbers: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Numbers as a file holds them. gguf cannot quantise to Q4_K: of that they are any bytes, with small scales."""
    if kind != Kind.Q4_K:
        return np.asarray(gguf.quants.quantize(numbers, kind))
    block, size = gguf.GGML_QUANT_SIZES[kind]
    found = np.random.default_rng(0).integers(0, 256, (*numbers.shape[:-1], numbers.shape[-1] // block, size), np.uint8)
    found[..., :4] = np.array([0.001, 0.002], np.float16).view(np.uint8)  # scales of scales and of minima
    return found.reshape(*numbers.shape[:-1], -1)


def ended(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def written(model: Any, path: Path, kind: Any) -> dict[str, Any]:
    """Write a file as others do: matrices quantised as far as their rows allow, the rest in float16 or float32.

    Returns the numbers that gguf makes of what was written, by the names in the file.
    """
    writer, meant = gguf.GGUFWriter(path, "sd3"), {}
    for name, tensor in renamed(model).items():
        numbers, now = tensor.float().numpy(), Kind.F32 if tensor.ndim < 2 else Kind.F16
        if tensor.ndim == 2 and tensor.shape[1] % gguf.GGML_QUANT_SIZES[kind][0] == 0:
            now = kind
        if tensor.ndim > 4:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(tensor.shape))
            numbers = numbers.reshape(len(numbers), -1)
        held = raw(now, numbers)
        writer.add_tensor(name, held, raw_dtype=now)
        meant[name] = torch.from_numpy(np.array(gguf.quants.dequantize(held, now))).reshape(tensor.shape)
    ended(writer)
    return meant


def teacher_of(name: str, kind: Any, folder: Path, **changes: Any) -> tuple[DiffusersTransformer, dict[str, Any]]:
    task, _ = make(name, **changes)
    saved(task, folder / "transformer")
    meant = written(task.teacher, folder / "teacher.gguf", kind)
    backbone = replace(
        task.backbone, _random=None, model=str(folder / "teacher.gguf"), config_from=str(folder / "transformer")
    )
    return backbone, meant


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_K, Kind.BF16], ids=lambda kind: kind.name)
def test_a_file_is_dequantised(kind: Any, tmp_path: Path) -> None:
    backbone, meant = teacher_of("SD3Transformer2DModel", kind, tmp_path, **WIDE)
    teacher = backbone.build()
    assert {t.dtype for t in teacher.state_dict().values()} == {torch.float32}
    again = renamed(teacher)
    assert again.keys() == meant.keys()
    assert all(torch.equal(again[name], value) for name, value in meant.items())
    # diffusers has code of its own for it, which computes in float16.
    theirs = diffusers.SD3Transformer2DModel.from_single_file(
        str(tmp_path / "teacher.gguf"),
        config=str(tmp_path / "transformer"),
        quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32),
        torch_dtype=torch.float32,
    )
    ours = teacher.state_dict()
    for name, held in theirs.state_dict().items():
        numbers = dequantize_gguf_tensor(held) if hasattr(held, "quant_type") else held
        assert torch.allclose(ours[name], numbers.float(), rtol=0, atol=2e-3 * float(ours[name].abs().max())), name
    half = replace(backbone, dtype="bfloat16")
    assert all(torch.equal(value, meant[name].bfloat16()) for name, value in renamed(half.build()).items())
    told = half.source()["weights"]
    assert f" in {kind.name}, " in told or f", {kind.name}" in told
    size = 2 * sum(value.numel() for value in again.values())
    assert told.endswith(f"dequantised to bfloat16: {size / 1e6:.3g} MB")


def test_tensors_of_five_dimensions(tmp_path: Path) -> None:
    backbone, meant = teacher_of("WanTransformer3DModel", Kind.Q8_0, tmp_path)
    assert meant["patch_embedding.weight"].ndim == 5
    assert all(torch.equal(value, meant[name]) for name, value in renamed(backbone.build()).items())


def test_a_student_of_a_file_is_a_plain_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task, batch = taught(make("SD3Transformer2DModel")[0], 8)
    saved(task, tmp_path / "transformer")
    written(task.teacher, tmp_path / "teacher.gguf", Kind.Q8_0)
    (tmp_path / "data").mkdir()
    for name, column in batch.items():
        np.save(tmp_path / "data" / f"{name}.npy", column.numpy())
    recipe: dict[str, Any] = {
        "backbone": {
            "class_path": "DiffusersTransformer",
            "init_args": {
                "model": str(tmp_path / "teacher.gguf"),
                "config_from": str(tmp_path / "transformer"),
                "text_length": 5,
            },
        },
        "loss": {"class_path": "RectifiedFlow", "init_args": {"shift": 3.0}},
        "data": {"class_path": "EncodedPrompts", "init_args": {"folder": str(tmp_path / "data"), "num_held_out": 4}},
        "trainer": {"precision": "fp32", "batch_size": 8},
        "search": {"class_path": "Keep", "init_args": {"blocks": [0, 2]}},
        "recover": {"steps": 2},
        "evaluate": [],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["validate", str(tmp_path / "recipe.yaml")]) == 0
    assert "dequantised to float32" in " ".join(capsys.readouterr().out.split())
    assert main(["run", str(tmp_path / "recipe.yaml"), "--run-dir", str(tmp_path / "run")]) == 0
    folder = tmp_path / "run" / "student"
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    held = load_file(folder / "diffusion_pytorch_model.safetensors")
    assert {t.dtype for t in held.values()} == {torch.float32}
    student = diffusers.AutoModel.from_pretrained(str(folder))
    assert student.config.num_layers == 3 and not hasattr(student, "hf_quantizer")


def test_what_cannot_be_dequantised(tmp_path: Path) -> None:
    backbone, _ = teacher_of("SD3Transformer2DModel", Kind.Q8_0, tmp_path)
    path = tmp_path / "teacher.gguf"
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"GGUF", b"none at all" * 9):
        path.write_bytes(content)
        with pytest.raises(tiny.UserError, match="damaged or cut short"):
            backbone.source()
        with pytest.raises(tiny.UserError, match="damaged or cut short"):
            backbone.build()
    path.unlink()
    with pytest.raises(tiny.UserError, match="no such file"):
        backbone.source()
    writer = gguf.GGUFWriter(path, "sd3")
    writer.add_tensor("a", np.zeros((2, gguf.GGML_QUANT_SIZES[Kind.Q8_K][1]), np.uint8), raw_dtype=Kind.Q8_K)
    ended(writer)
    with pytest.raises(tiny.UserError, match="holds weights in Q8_K, which gguf cannot dequantise"):
        backbone.source()
    writer = gguf.GGUFWriter(path, "sd3")
    writer.add_tensor("a", np.zeros((2, 3), np.float32))
    writer.add_array("comfy.gguf.orig_shape.a", [2, 4])
    ended(writer)
    with pytest.raises(tiny.UserError, match=r"damaged: a is said to be \[2, 4\]"):
        backbone.build()
    teacher_of("WanTransformer3DModel", Kind.Q8_0, tmp_path)
    with pytest.raises(tiny.UserError, match="is no SD3Transformer2DModel as its publisher names it"):
        replace(backbone, config_from=str(saved(make("SD3Transformer2DModel")[0], tmp_path / "sd3"))).build()


def test_folders_of_quantised_weights_are_refused(tmp_path: Path) -> None:
    task, _ = make("SD3Transformer2DModel")
    path = saved(task, tmp_path) / "config.json"
    told = json.loads(path.read_text())
    for given, method in (
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "torchao"}, "torchao"),
        ({"load_in_8bit": True}, "by a method that is not named"),
        ("int8", "by a method that is not named"),
    ):
        path.write_text(json.dumps({**told, "quantization_config": given}))
        for ask in (DiffusersTransformer.config, DiffusersTransformer.build):
            with pytest.raises(tiny.UserError, match=rf"are quantised \({method}\); give those") as e:
                ask(DiffusersTransformer(model=str(tmp_path)))
            assert "dequantize()" in str(e.value)
