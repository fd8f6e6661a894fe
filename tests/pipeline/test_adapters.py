"""A LoRA of the teacher is one of the student, in the libraries that load it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import tinyfusion_core as tiny
from diffusers_tasks import make
from llm_toys import TOKENS, decide, folder, task_of
from marks import slow_but
from small_run import RECIPE, run
from tinyfusion_core.cli import main
from tinyfusion_core.pipeline.exporting.adapters import move_adapter, moved, moves_of
from tinyfusion_core.runtime.files import write_text

pytestmark = pytest.mark.filterwarnings("ignore")  # of peft and transformers


def merged(model: Any) -> Any:
    """The network with its adapter in its weights."""
    model.fuse_lora()
    model.unload_lora()
    return model.eval()


@pytest.mark.parametrize(
    "name", slow_but(["FluxTransformer2DModel", "SD3Transformer2DModel"], "FluxTransformer2DModel")
)
def test_diffusers_loads_it_on_the_student(name: str, tmp_path: Path) -> None:
    from peft import LoraConfig

    task, inputs = make(name)
    teacher: Any = task.backbone.build()
    targets = ["to_q", "attn.to_out.0", "proj_mlp", "ff.net.2"]
    ranks = {"transformer_blocks.2.attn.to_q": 3}
    teacher.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False, rank_pattern=ranks))
    teacher.save_lora_adapter(tmp_path / "teacher")
    (adapter,) = (tmp_path / "teacher").iterdir()

    kept = tuple(i for i in range(len(task.blocks)) if i not in (1, len(task.blocks) - 2))
    decision = tiny.Decision(tuple(task.blocks), kept, "Keep")
    left, number = move_adapter(adapter, moves_of(task.backbone, task.teacher, decision), tmp_path / "lora.safetensors")
    assert 0 < left < number
    student, whole = tiny.prune(task, decision), task.backbone.build()
    for model, file in ((student, tmp_path / "lora.safetensors"), (whole, adapter)):
        model.load_lora_adapter(file, prefix=None)  # type: ignore[operator]
    expected = tiny.prune(replace(task, model=merged(whole)), decision)
    with torch.no_grad():
        ours, theirs = (task.loss.predict(model, inputs) for model in (merged(student), expected))
        plain = task.loss.predict(tiny.prune(task, decision), inputs)
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert not torch.allclose(ours, plain, atol=1e-3)


@pytest.mark.parametrize("layers", [None, [0, 2, 4, 5]])
def test_peft_loads_it_on_the_student(layers: list[int] | None, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    task = task_of(folder(tmp_path / "full", "llama"))
    options: dict[str, Any] = {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": layers}
    made = get_peft_model(task.backbone.build(), LoraConfig(r=2, init_lora_weights=False, **options))
    made.save_pretrained(tmp_path / "teacher")
    decision = decide(task, (0, 2, 3, 5))
    moves = moves_of(task.backbone, task.teacher, decision)
    move_adapter(tmp_path / "teacher", moves, tmp_path / "lora")
    if layers:
        assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["layers_to_transform"] == [0, 1, 3]
    student = PeftModel.from_pretrained(tiny.prune(task, decision), tmp_path / "lora").merge_and_unload()
    expected = tiny.prune(replace(task, model=made.merge_and_unload()), decision)
    with torch.no_grad():
        ours, theirs = (model(input_ids=TOKENS, use_cache=False).logits for model in (student, expected))
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_how_keys_are_renamed() -> None:
    moves: dict[str, str | None] = {f"transformer_blocks.{i}": f"transformer_blocks.{i}" for i in range(2)}
    moves |= {"single_transformer_blocks.0": None, "single_transformer_blocks.1": "single_transformer_blocks.0"}
    moves |= {"transformer_blocks.1.attn": None}
    source = Path("a.safetensors")
    for key, expected in {
        "transformer.single_transformer_blocks.1.proj_mlp.lora_A.weight": "transformer.single_transformer_blocks.0."
        "proj_mlp.lora_A.weight",
        "transformer.single_transformer_blocks.0.proj_mlp.lora_A.weight": None,
        "lora_unet_single_transformer_blocks_1_proj_mlp.lora_down.weight": "lora_unet_single_transformer_blocks_0_"
        "proj_mlp.lora_down.weight",
        "lora_unet_transformer_blocks_1_ff_net_2.alpha": "lora_unet_transformer_blocks_1_ff_net_2.alpha",
        "lora_unet_transformer_blocks_1_attn_to_q.alpha": None,
        "transformer_blocks.1.attn.to_q.lora_B.weight": None,
        "transformer_blocks.0.attn.to_q.lora_B.weight": "transformer_blocks.0.attn.to_q.lora_B.weight",
        "text_encoder.layers.1.q_proj.lora_A.weight": "text_encoder.layers.1.q_proj.lora_A.weight",
    }.items():
        assert moved(key, moves, source) == expected, key
    with pytest.raises(tiny.UserError, match="is of 'transformer_blocks.7', which the teacher does not have"):
        moved("transformer_blocks.7.attn.to_q.lora_A.weight", moves, source)


def adapter_of_digits(path: Path, blocks: int = 8, prefix: str = "blocks") -> dict[str, Tensor]:
    tensors = {
        f"{prefix}.{i}.{name}.lora_{side}.weight": torch.randn((2, 48) if side == "A" else (48, 2))
        for i in range(blocks)
        for name in ("attn.proj", "mlp.fc2")
        for side in "AB"
    }
    save_file(tensors, path)
    return tensors


@pytest.mark.slow
def test_of_a_run_of_two_rounds_in_branches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe: dict[str, Any] = json.loads(json.dumps(RECIPE))
    recipe["backbone"]["init_args"]["units"] = ["attention", "mlp"]
    del recipe["search"], recipe["recover"]
    # The first round loses block 1 and the attention of block 3; the second the MLP of what was block 4.
    keeps = [i for i in range(16) if i not in (1, 3, 9)], [i for i in range(13) if i != 9]
    searches = [{"class_path": "Keep", "init_args": {"blocks": keep}} for keep in keeps]
    recipe["rounds"] = {name: {"search": search} for name, search in zip("ab", searches, strict=True)}
    write_text(tmp_path / "recipe.yaml", json.dumps({**recipe, "evaluate": []}))
    assert run(tmp_path / "recipe.yaml", tmp_path / "run") == 0
    tensors = adapter_of_digits(tmp_path / "style.safetensors")
    command = ["export", str(tmp_path / "run"), "--to", "lora", "--adapter", str(tmp_path / "style.safetensors")]
    capsys.readouterr()
    for _ in range(2):  # what is ours is written again
        assert main(command) == 0
    target = tmp_path / "run" / "export" / "lora" / "style.safetensors"
    assert capsys.readouterr().out.splitlines()[:2] == [str(target), "24 of 32 tensors are left"]
    found = load_file(target)
    student = tiny.load_pretrained(tmp_path / "run" / "b" / "student")
    for key in found:
        module = student.get_submodule(key.partition(".lora")[0])
        assert isinstance(module, torch.nn.Linear), key
    assert torch.equal(found["blocks.2.mlp.fc2.lora_A.weight"], tensors["blocks.3.mlp.fc2.lora_A.weight"])
    assert torch.equal(found["blocks.3.attn.proj.lora_A.weight"], tensors["blocks.4.attn.proj.lora_A.weight"])
    assert "blocks.2.attn.proj.lora_A.weight" not in found
    assert "blocks.3.mlp.fc2.lora_A.weight" not in found
    with safe_open(target, framework="pt") as file:
        assert file.metadata()["tinyfusion"] == "of a student"


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda path: adapter_of_digits(path, prefix="double_blocks"), "names a block of blocks. Is it of another"),
        (lambda path: adapter_of_digits(path, blocks=9), "is of 'blocks.8', which the teacher does not have"),
        (lambda path: save_file({}, path), "none of its keys, such as none at all"),
        (lambda path: path.write_bytes(b"no tensors"), "not an adapter in safetensors"),
        (lambda path: path.mkdir(), "adapter_model.safetensors: no such file"),
        (lambda path: None, "lora.safetensors: no such file"),
    ],
)
def test_what_is_no_adapter_of_the_teacher(
    make_it: Any, message: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_it(tmp_path / "lora.safetensors")
    command = ["export", str(finished), "--to", "lora"]
    assert main([*command, "--adapter", str(tmp_path / "lora.safetensors")]) == 2
    assert message in capsys.readouterr().err
    assert main(command) == 2
    assert "--to lora and --adapter go together" in capsys.readouterr().err
    # A file of somebody else's stays.
    tensors = adapter_of_digits(tmp_path / "good.safetensors")
    save_file(tensors, tmp_path / "theirs.safetensors")
    places = ["--adapter", str(tmp_path / "good.safetensors"), "--out", str(tmp_path / "theirs.safetensors")]
    assert main([*command, *places]) == 2
    assert load_file(tmp_path / "theirs.safetensors").keys() == tensors.keys()
