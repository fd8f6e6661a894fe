"""Single files in the names of their publishers, in and out; `variant` of a folder."""

from __future__ import annotations

import json
import re
import shutil
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import tinyfusion_core as tiny
from diffusers_families import FAMILIES
from diffusers_tasks import make, saved, taught
from marks import slow_but
from tinyfusion_core.cli import main
from tinyfusion_core.protocols.checkpoint_backbone import randomise
from tinyfusion_core.runtime.seeding import generator
from tinyfusion_diffusers import DiffusersTransformer
from tinyfusion_diffusers.files.original import NAMES, converter, renamed

pytestmark = [pytest.mark.numerics, pytest.mark.filterwarnings("ignore")]  # of other libraries

WIDTH = 16
"""Of the tiny Flux."""
PUBLISHED = {
    "FluxTransformer2DModel": "flux",
    "SD3Transformer2DModel": "sd3",
    "WanTransformer3DModel": "wan",
    "AuraFlowTransformer2DModel": "auraflow",
    "LTXVideoTransformer3DModel": "ltx-video",
    "ZImageTransformer2DModel": "z-image-turbo",
}
"""Where diffusers says names by which it tells the published files."""
Z_IMAGE = {
    "dim": 16, "n_layers": 3, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "in_channels": 4,
    "cap_feat_dim": 12, "axes_dims": [2, 2, 4], "axes_lens": [32, 8, 8],
}  # fmt: skip


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers reads single files of Flux that are 3072 wide; here it reads those of the tiny one, and else alike."""
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    entry = SINGLE_FILE_LOADABLE_CLASSES["FluxTransformer2DModel"]
    code = entry["checkpoint_mapping_fn"].__code__
    assert 3072 in code.co_consts
    code = code.replace(co_consts=tuple(WIDTH if value == 3072 else value for value in code.co_consts))
    monkeypatch.setitem(
        entry, "checkpoint_mapping_fn", types.FunctionType(code, vars(diffusers.loaders.single_file_utils))
    )


def student_of(name: str) -> Any:
    """A network that has lost its second block, and its last but one."""
    if name == "ZImageTransformer2DModel":
        with torch.random.fork_rng():
            model = diffusers.ZImageTransformer2DModel(**Z_IMAGE)
        randomise(model, generator(0, "z-image"))
        del model.layers[1]
        model.register_to_config(n_layers=2)
        return model.eval()
    task, _ = make(name)
    num = len(task.blocks)
    return tiny.prune(task, tiny.Keep([i for i in range(num) if i not in (1, num - 2)])(task, tiny.Trainer()))


def same(a: Any, b: Any) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(
        torch.equal(value, theirs[key]) and value.dtype == theirs[key].dtype for key, value in ours.items()
    )


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("name", slow_but(NAMES, "FluxTransformer2DModel", "QwenImageTransformer2DModel"))
def test_diffusers_reads_what_is_named_back(name: str, tmp_path: Path) -> None:
    student = student_of(name)
    student.save_pretrained(tmp_path / "folder")
    tensors = renamed(student)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    again = type(student).from_single_file(str(tmp_path / "model.safetensors"), config=str(tmp_path / "folder"))
    assert same(student, again)
    assert (tensors.keys() == student.state_dict().keys()) == (NAMES[name] == ())
    if name in PUBLISHED:
        assert tensors.keys() & {*diffusers.loaders.single_file_utils.CHECKPOINT_KEY_NAMES[PUBLISHED[name]]}
    # The student's blocks are numbered without gaps.
    numbers: dict[str, set[int]] = {}
    for key in tensors:
        if block := re.match(r"(\w*(?:blocks|layers))\.(\d+)\.", key):
            numbers.setdefault(block[1], set()).add(int(block[2]))
    assert numbers and all(found == set(range(len(found))) for found in numbers.values())


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "SD3Transformer2DModel", "WanTransformer3DModel"])
def test_a_teacher_from_a_single_file(name: str, prefix: str, tmp_path: Path) -> None:
    task, _ = make(name)
    saved(task, tmp_path / "pipe" / "transformer")
    path = tmp_path / "teacher.safetensors"
    save_file({prefix + key: value.bfloat16() for key, value in renamed(task.teacher).items()}, path)
    backbone = replace(task.backbone, _random=None, model=str(path), config_from=str(tmp_path / "pipe"))
    assert backbone.config() == task.backbone.config()
    teacher = backbone.build()
    assert teacher.dtype == torch.bfloat16 and not teacher.training
    assert same(teacher, task.teacher.bfloat16())
    assert replace(backbone, dtype="float32").build().dtype == torch.float32
    assert set(backbone.source()) == {"checkpoint", "licence", "sha256"}


@pytest.mark.slow
def test_flux_of_the_published_width() -> None:
    """The real reader, nothing of it changed: 0.9 GB of one double and one single block."""
    sizes = {"num_layers": 1, "num_single_layers": 1, "in_channels": 64, "joint_attention_dim": 64}
    with torch.device("meta"):
        model = diffusers.FluxTransformer2DModel(**sizes, pooled_projection_dim=64, guidance_embeds=True)
    model = model.bfloat16().to_empty(device="cpu")
    for i, tensor in enumerate(model.parameters()):
        tensor.data = torch.arange(i, i + tensor.numel(), dtype=torch.int16).view(tensor.shape).view(torch.bfloat16)
        tensor.data = torch.where(tensor.isfinite(), tensor, torch.zeros((), dtype=torch.bfloat16))
    tensors = renamed(model)
    assert tensors["single_blocks.0.linear1.weight"].shape == (7 * 3072, 3072)
    assert torch.equal(
        tensors["double_blocks.0.txt_attn.qkv.bias"][3072:6144], model.transformer_blocks[0].attn.add_k_proj.bias
    )


@pytest.mark.slow
def test_an_export_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task, _ = make("SD3Transformer2DModel")
    task, batch = taught(task, 12)
    folder, data = saved(task, tmp_path / "sd3"), tmp_path / "data"
    data.mkdir()
    save_file(batch, data / "all.safetensors")
    recipe: dict[str, Any] = {
        "backbone": {"class_path": "DiffusersTransformer", "init_args": {"model": str(folder), "text_length": 5}},
        "loss": "RectifiedFlow",
        "data": {"class_path": "EncodedPrompts", "init_args": {"folder": str(data), "num_held_out": 4}},
        "search": {"class_path": "Keep", "init_args": {"blocks": [0, 2]}},
        "recover": None,
        "evaluate": [],
    }
    path, run = tmp_path / "recipe.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump(recipe))
    assert main(["run", str(path), "--run-dir", str(run)]) == 0
    assert main(["export", str(run), "--to", "single-file"]) == 0
    out = run / "export" / "single-file"
    assert str(out) in capsys.readouterr().out
    file = out / "model.safetensors"
    student = diffusers.AutoModel.from_pretrained(str(run / "student"))
    again = diffusers.SD3Transformer2DModel.from_single_file(str(file), config=str(run / "student"))
    assert same(student, again)
    assert main(["export", str(run), "--to", "single-file"]) == 0  # again, over what is ours
    # The file is a teacher too: planned from its config alone, and run.
    recipe["backbone"]["init_args"] |= {"model": str(file), "config_from": str(run / "student")}
    recipe["search"]["init_args"]["blocks"] = [1]
    path.write_text(yaml.safe_dump(recipe))
    assert main(["validate", str(path)]) == 0
    assert main(["run", str(path), "--run-dir", str(tmp_path / "second")]) == 0
    assert diffusers.AutoModel.from_pretrained(str(tmp_path / "second" / "student")).config.num_layers == 2


def test_what_is_not_known_is_refused() -> None:
    def refused(name: str) -> str:
        with pytest.raises(tiny.UserError) as e:
            renamed(student_of(name))
        return str(e.value)

    assert "publisher of CogVideoXTransformer3DModel gave the weights are not known" in refused(
        "CogVideoXTransformer3DModel"
    )
    # It can be named back, and diffusers reads no Flux that is not 3072 wide.
    assert "read as diffusers reads it: is no FluxTransformer2DModel" in refused("FluxTransformer2DModel")
    assert set(NAMES) <= {*FAMILIES, "ZImageTransformer2DModel"}
    task, _ = make("WanTransformer3DModel", image_dim=6, added_kv_proj_dim=16)
    assert "img_emb.proj.1.weight" in renamed(task.teacher)
    task.teacher.register_parameter("more", torch.nn.Parameter(torch.ones(1)))
    with pytest.raises(tiny.UserError, match="publisher of WanTransformer3DModel has no name for 'more'"):
        renamed(task.teacher)


def test_single_files_that_do_not_fit(tmp_path: Path) -> None:
    task, _ = make("SD3Transformer2DModel")
    folder, path = saved(task, tmp_path / "folder"), tmp_path / "sd3.safetensors"
    tensors = renamed(task.teacher)

    def wrong(message: str, **options: Any) -> None:
        with pytest.raises(tiny.UserError, match=message):
            DiffusersTransformer(**{"model": str(path), "config_from": str(folder), **options}).build()

    wrong("no such file")
    save_file(tensors, path)
    wrong(r"^config_from: not set, and .*sd3\.safetensors does not say how large", config_from=None)
    wrong("holds a config.json; expected", config_from=str(tmp_path))
    other, _ = make("WanTransformer3DModel")
    wrong("no SD3Transformer2DModel as its publisher names it", model=str(_written(renamed(other.teacher), tmp_path)))
    wrong(
        "diffusers reads no single files of CogVideoXT",
        config_from=str(saved(make("CogVideoXTransformer3DModel")[0], tmp_path / "c")),
    )
    shorter = {**task.backbone.config(), "num_layers": 4}
    with pytest.raises(
        tiny.UserError, match=r"sd3.safetensors: the weights do not fit the config: .* unexpected transf"
    ):
        (tmp_path / "shorter").mkdir()
        (tmp_path / "shorter" / "config.json").write_text(json.dumps(shorter))
        DiffusersTransformer(model=str(path), config_from=str(tmp_path / "shorter")).build()
    path.write_bytes(path.read_bytes()[:3000])
    wrong("damaged or cut short")
    # What to plan with is known without the file.
    planned = DiffusersTransformer(model="flux1-dev.safetensors", config_from="black-forest-labs/FLUX.1-dev")
    assert planned.config()["num_single_layers"] == 38


def _written(tensors: dict[str, Any], folder: Path) -> Path:
    save_file(tensors, folder / "other.safetensors")
    return folder / "other.safetensors"


def test_what_the_private_table_says() -> None:
    for name in NAMES:
        assert converter(getattr(diffusers, name)) is not None
    assert converter(diffusers.CogVideoXTransformer3DModel) is None


@pytest.mark.parametrize("shard", ["10GB", "20KB"])
def test_a_variant_of_a_folder(shard: str, tmp_path: Path) -> None:
    task, _ = make("FluxTransformer2DModel")
    task.teacher.half().save_pretrained(tmp_path, variant="fp16", max_shard_size=shard)
    with pytest.raises(tiny.UserError, match=r"variant is None, and .* holds diffusion_pytorch_model\.fp16"):
        DiffusersTransformer(model=str(tmp_path)).build()
    found = DiffusersTransformer(model=str(tmp_path), variant="fp16")
    assert same(found.build(), task.teacher)
    alone = found.source()
    # Beside the whole weights, each is what it is.
    task.teacher.float().save_pretrained(tmp_path / "whole")
    shutil.copy(tmp_path / "whole" / "diffusion_pytorch_model.safetensors", tmp_path)
    assert found.build().dtype == torch.float16 and found.source() == alone
    plain = DiffusersTransformer(model=str(tmp_path))
    assert plain.build().dtype == torch.float32 and plain.source() != alone
    with pytest.raises(tiny.UserError, match="variant is 'bf16', and"):
        replace(found, variant="bf16").build()
    assert len(load_file(tmp_path / "diffusion_pytorch_model.safetensors")) == len(task.teacher.state_dict())
