"""What other tools make of a decision is said beforehand, as the tools show; what would be wrong is refused."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import tinyfusion_core as tiny
from llm_toys import VOCABULARY, folder, tokenizer
from tinyfusion_core.cli import main
from tinyfusion_core.pruning.interop_formats import TEXTS, describe_clients, ranges
from tinyfusion_core.samplers.compiled import compile_constraints
from tinyfusion_core.samplers.constraints import Rules
from tinyfusion_llm import CausalLM, NextToken

pytestmark = [pytest.mark.numerics, pytest.mark.filterwarnings("ignore")]  # of transformers
TOKENS = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))
MIXED, PERIODS, START = (0, 2, 3, 5), (0, 1, 4, 5), (0, 1, 2, 3)
JAMBA = {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "mamba_d_state": 4}
GLOBAL = {"use_sliding_window": False}


def pruned(path: Path, kept: tuple[int, ...]) -> tuple[nn.Module, dict[str, str]]:
    """The student of a folder, and what is said of other tools."""
    backbone = CausalLM(model=str(path), context=12)
    rows = tiny.Tensors({"tokens": TOKENS, "labels": TOKENS})
    task = tiny.Task(backbone=backbone, loss=NextToken(), train=rows, held_out=rows)
    student = tiny.prune(task, tiny.Decision(blocks=tuple(task.blocks), kept=kept, method="Keep"))
    return student, dict(backbone.clients(task.teacher, student, kept))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS, use_cache=False).logits


@pytest.mark.parametrize(
    ("family", "more", "kept"),
    [
        ("llama", {}, MIXED),
        ("smollm3", {"no_rope_layer_interval": 4}, MIXED),  # the layers know whether they rotate
        pytest.param("qwen3", {}, MIXED, marks=pytest.mark.slow),
        ("qwen2", GLOBAL, MIXED),
        pytest.param("qwen2", {}, MIXED, marks=pytest.mark.slow),
        ("gemma2", {}, MIXED),
        ("gemma2", {}, PERIODS),
        pytest.param("gemma3_text", {}, MIXED, marks=pytest.mark.slow),
        pytest.param("gemma3_text", {}, START, marks=pytest.mark.slow),
        ("gpt2", {}, MIXED),
        pytest.param("opt", {}, MIXED, marks=pytest.mark.slow),
    ],
)
def test_peft_makes_the_student_exactly_where_that_is_said(
    family: str, more: dict[str, Any], kept: tuple[int, ...], tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    student, clients = pruned(folder(tmp_path, family, **more), kept)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path)
    config = LoraConfig(layer_replication=ranges(kept), target_modules="all-linear", r=2)
    try:
        right = torch.equal(logits(get_peft_model(whole, config)), logits(student))
    except ValueError:
        right = False
    assert right == (clients["peft"] == ""), clients["peft"]


# What llama.cpp b10605's converter and library made of these students (largest difference of their logits from
# transformers', with a key-value cache in float16): right are 0.0003 to 0.03, wrong 0.01 to 3 and LFM2's file, which is
# not loaded after --prune-layers.
@pytest.mark.parametrize(
    ("family", "more", "kept", "gguf", "pruned_file"),
    [
        ("llama", {}, MIXED, "", ""),
        pytest.param("mixtral", {}, MIXED, "", "", marks=pytest.mark.slow),
        pytest.param("qwen3", {}, MIXED, "", "", marks=pytest.mark.slow),
        ("qwen2", GLOBAL, MIXED, "", ""),
        ("qwen2", {}, MIXED, "not known to tell the layers of a 'qwen2' apart by layer_types", "not known"),
        pytest.param("gemma2", {}, PERIODS, "", "", marks=pytest.mark.slow),
        ("gemma2", {}, (0, 3, 4, 5), "", ""),  # kinds in order, whichever layers they are
        ("gemma2", {}, MIXED, "takes layer 1 for full_attention and it is sliding_attention", "takes layer 1"),
        pytest.param("gemma3_text", {}, START, "", "", marks=pytest.mark.slow),
        ("gemma3_text", {}, MIXED, "takes layer 3 for sliding_attention and it is full_attention", "takes layer 3"),
        pytest.param("smollm3", {"no_rope_layer_interval": 4}, START, "", "", marks=pytest.mark.slow),
        ("smollm3", {"no_rope_layer_interval": 4}, MIXED, "layer 2 for no_rope_layers 1 and it is no_rope", "layer 2"),
        ("lfm2", {}, MIXED, "", "leaves what the file says of the whole model's"),
        ("deepseek_v3", {}, MIXED, "", "leaves what the file says of the whole model's first_k_dense_replace"),
        pytest.param("deepseek_v3", {}, (0, 1, 3, 5), "", "", marks=pytest.mark.slow),
        ("jamba", JAMBA, START, "not known to tell the layers of a 'jamba' apart, which are of 2 kinds", "not known"),
        ("qwen2_moe", {}, MIXED, "not known to tell the layers of a 'qwen2_moe' apart by mlp_only_layers", "not known"),
    ],
)
def test_llama_cpp_counts_layers(
    family: str, more: dict[str, Any], kept: tuple[int, ...], gguf: str, pruned_file: str, tmp_path: Path
) -> None:
    _, clients = pruned(folder(tmp_path, family, **more), kept)
    for found, expected in ((clients["gguf"], gguf), (clients["llama.cpp"], pruned_file)):
        assert expected in found and bool(expected) == bool(found), found


@pytest.mark.slow
def test_a_constraint_keeps_a_search_to_what_llama_cpp_can_express(tmp_path: Path) -> None:
    folder(tmp_path, "gemma2")
    blocks = [f"model.layers.{i}" for i in range(6)]
    within = compile_constraints(blocks, "search", keep=3, constraints=Rules(period=["sliding", "full"]))
    for kept in itertools.combinations(range(6), 3):
        _, clients = pruned(tmp_path, kept)
        assert (clients["gguf"] == "") == within.accepts(kept), kept


MERGED = [("llama", {}), ("mixtral", {}), ("gpt2", {}), ("qwen3", {}), ("gemma2", {}), ("lfm2", {}), ("opt", {})]
RIGHT_IN_MERGEKIT = {"llama", "mixtral", "gpt2"}


@pytest.mark.parametrize(("family", "more"), MERGED)
def test_mergekit_corrects_the_depth_alone(family: str, more: dict[str, Any], tmp_path: Path) -> None:
    _, clients = pruned(folder(tmp_path, family, **more), MIXED)
    assert (clients["mergekit"] == "") == (family in RIGHT_IN_MERGEKIT), clients["mergekit"]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "more"), MERGED)
def test_mergekit_makes_the_student_exactly_where_that_is_said(
    family: str, more: dict[str, Any], tmp_path: Path
) -> None:
    student, clients = pruned(tokenizer(folder(tmp_path / "full", family, **more)), MIXED)
    merge, out = tmp_path / "merge.yaml", tmp_path / "out"
    merge.write_text(TEXTS["mergekit"](MIXED, 6, str(tmp_path / "full")))
    command = [str(Path(sys.executable).with_name("mergekit-yaml")), str(merge), str(out), "--allow-crimes"]
    done = subprocess.run(command, capture_output=True, check=False)
    right = done.returncode == 0 and torch.equal(logits(AutoModelForCausalLM.from_pretrained(out)), logits(student))
    assert right == (clients["mergekit"] == ""), clients["mergekit"]


def test_validate_the_card_and_export_say_where_a_student_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinyfusion_core.pipeline.run.check_teacher", lambda *_: None)  # a random model knows nothing
    model = tokenizer(folder(tmp_path / "full", "gemma2"))
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(" ".join(f"w{3 + i % 90}" for i in range(200)))
    data = {"tokenizer": str(model), "files": [str(tmp_path / f"{name}.txt") for name in "ab"], "context": 12}
    recipe = {
        "backbone": {"class_path": "CausalLM", "init_args": {"model": str(model), "context": 12}},
        "loss": "NextToken",
        "data": {"class_path": "TextTokens", "init_args": {**data, "cache": str(tmp_path / "cache")}},
        "trainer": {"precision": "fp32", "batch_size": 4, "seed": 0},
        "search": {"class_path": "Keep", "init_args": {"blocks": list(MIXED)}},
        "recover": None,
        "evaluate": [],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["validate", str(tmp_path / "recipe.yaml")]) == 0
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "other tools" in said and "not gguf: it takes layer 1" in said
    run = tmp_path / "run"
    assert main(["run", str(tmp_path / "recipe.yaml"), "--run-dir", str(run)]) == 0
    assert "- other tools: none; not mergekit: " in (run / "student" / "README.md").read_text()
    capsys.readouterr()
    for form in ("mergekit", "peft", "llama.cpp"):
        assert main(["export", str(run), "--to", form, "--out", str(tmp_path / form)]) == 2
        assert f"--to {form}: would not be the student" in capsys.readouterr().err
        assert not (tmp_path / form).exists()
    assert main(["export", str(run), "--to", "indices"]) == 0
    assert json.loads(capsys.readouterr().out) == list(MIXED)
    assert main(["export", str(run), "--to", "transformers"]) == 0
    assert "other tools: none; not mergekit: " in capsys.readouterr().out


def test_what_is_known_of_tools_is_one_sentence() -> None:
    assert describe_clients({"a": "", "b": "it cannot", "c": ""}) == "a, c; not b: it cannot"
    assert describe_clients({"a": "it cannot"}) == "none; not a: it cannot"
