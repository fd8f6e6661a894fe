"""What a config can say of the layers that are left is known before a search, and more of it is said than was."""

from __future__ import annotations

import copy
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import tinyfusion_core as tiny
from llm_families import masks_within, settings
from llm_toys import decide, folder, logits, recipe_of, task_of
from marks import slow_but
from tinyfusion_core.cli import main
from tinyfusion_llm import CausalLM
from tinyfusion_llm.layers.building import construct
from tinyfusion_llm.layers.limits import limits
from tinyfusion_llm.layers.shortening import corrected
from tinyfusion_llm.layers.stacks import find_stacks

pytestmark = [pytest.mark.numerics, pytest.mark.filterwarnings("ignore")]  # of transformers
LIMITS: dict[str, dict[str, Any]] = {
    "llama": {},
    "jamba": {"period": ["k0", "k1"]},
    "recurrent_gemma": {"period": ["k0", "k1"]},
    "rwkv": {"protect": [0]},
    "zaya": {"protect": [0]},
    "gpt_neox_japanese": {"protect": [5]},
    "gemma3n_text": {"protect": [2, 3, 5]},
    "gemma4_text": {"protect": [2, 3, 5]},
    "diffllama": {"period": ["k0", "k1", "k2", "k3", "k4", "k5"]},
    "deepseek_v3": {},
    "gemma3_text": {},
}


def sayable(model: Any, kept: tuple[int, ...]) -> bool:
    shorter = copy.deepcopy(model)
    (stack,) = find_stacks(model)
    layers = shorter.get_submodule(stack.path)
    for i in sorted({*range(6)} - {*kept}, reverse=True):
        del layers[i]
    return not corrected(shorter, {stack: kept})


@pytest.mark.parametrize("family", slow_but(LIMITS, "jamba"))
def test_limits_are_what_the_config_can_say(family: str) -> None:
    model = construct(settings(family), CausalLM.autos)
    found = limits(model)
    assert found == LIMITS[family]
    can_be_said = [kept for kept in combinations(range(6), 4) if sayable(model, kept)]
    if family == "gemma3n_text":  # any of the last two would do, which no rule says
        can_be_said = [kept for kept in can_be_said if 5 in kept]
    assert masks_within(found) == can_be_said


@pytest.mark.slow
def test_a_family_that_can_lose_no_layer_is_refused_when_the_plan_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder(tmp_path / "full", "minicpm3", **settings("minicpm3"))
    assert main(["validate", recipe_of(path, tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "no layer of a 'minicpm3' can go, since its config could not express the others: layer 0 has" in said
    with pytest.raises(tiny.UserError, match="no layer of a 'minicpm3' can go"):
        tiny.Greedy(keep=4)(task_of(path), tiny.Trainer(precision="fp32", batch_size=2))


@pytest.mark.slow
def test_the_plan_shows_limits_and_patterns_are_told_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_of(folder(tmp_path / "full", "jamba", **settings("jamba")), tmp_path)
    assert main(["validate", recipe]) == 0
    assert "limits\tperiod ['k0', 'k1'], or nothing could save it" in capsys.readouterr().out
    assert main(["validate", recipe, "--search.keep", "null", "--search.pattern", "[1, 2]"]) == 2
    assert "only masks of the constraints period ['k0', 'k1']; search.constraints.period" in capsys.readouterr().err


def test_branches_have_no_limits_of_layers() -> None:
    backbone = CausalLM(network=settings("jamba"), units=["mlp"])
    with torch.device("meta"):
        assert backbone.limits(backbone.construct(backbone.config())) == {}


@pytest.mark.parametrize(
    ("family", "more", "key", "expected"),
    [
        ("gpt_neo", {}, "attention_types", [[["global", "global", "local", "local"], 1]]),
        ("qwen2_moe", {"decoder_sparse_step": 2, "mlp_only_layers": [3]}, "mlp_only_layers", [0, 1, 2]),
        pytest.param("gemma4_text", {"global_head_dim": 16}, "per_layer_config", None, marks=pytest.mark.slow),
        pytest.param("xlstm", {}, "num_blocks", 4, marks=pytest.mark.slow),
        pytest.param("rwkv", {}, "rescale_every", 0, marks=pytest.mark.slow),
    ],
)
def test_configs_say_what_is_left(family: str, more: dict[str, Any], key: str, expected: Any, tmp_path: Path) -> None:
    task = task_of(folder(tmp_path / "full", family, **{**settings(family), **more}))
    kept = (0, 2, 3, 5)
    student = tiny.prune(task, decide(task, kept))
    found = student.config.to_dict()[key]
    if expected is None:  # a table by layer
        before = task.teacher.config.to_dict()[key]
        assert {int(j): v for j, v in found.items()} == {
            j: before[name] for j, i in enumerate(kept) for name in before if int(name) == i
        }
    else:
        assert found == expected
    tiny.save_pretrained(student, task, decide(task, kept), tmp_path / "student")
    assert torch.equal(logits(tiny.load_pretrained(tmp_path / "student")), logits(student))


def test_embeddings_of_each_layer_are_sliced(tmp_path: Path) -> None:
    task = task_of(folder(tmp_path / "full", "gemma4_text", **settings("gemma4_text")))
    kept = (0, 2, 3, 5)
    student = tiny.prune(task, decide(task, kept))
    whole, left = (model.model.embed_tokens_per_layer for model in (task.teacher, student))
    assert left.embedding_dim == left.weight.shape[1] == 4 * 8
    assert torch.equal(left.weight, whole.weight.view(-1, 6, 8)[:, kept].flatten(1))
    assert student.model.per_layer_model_projection.out_features == 4 * 8
    tiny.save_pretrained(student, task, decide(task, kept), tmp_path / "student")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert torch.allclose(logits(again), logits(student), atol=1e-5)
