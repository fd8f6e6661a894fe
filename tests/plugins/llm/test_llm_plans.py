"""Plans are made for every family, without weights: mixtures of experts, state spaces, numbers that JSON lacks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_toys import folder, recipe_of
from marks import slow_but
from tinyfusion_core.cli import main
from tinyfusion_core.evaluation.metrics import count_flops
from tinyfusion_llm import CausalLM, NextToken

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers
SPACE = {"n_groups": 1, "state_size": 8, "chunk_size": 4}
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen3_moe": {},
    "deepseek_v3": {},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 8},
    "qwen3_next": {},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "mamba_d_state": 4},
}


def recipe(tmp_path: Path, family: str, **more: Any) -> str:
    return recipe_of(folder(tmp_path / "full", family, **more), tmp_path)


@pytest.mark.parametrize("family", slow_but(MIXTURES))
def test_mixtures_of_experts_are_planned(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", recipe(tmp_path, family, **MIXTURES[family])]) == 0
    said = capsys.readouterr().out
    assert "cannot be counted" not in said
    assert said.count("activations") == 2


@pytest.mark.parametrize("family", slow_but(MIXTURES, "qwen3_moe"))
def test_operations_do_not_depend_on_the_dtype(family: str, tmp_path: Path) -> None:
    backbone = CausalLM(model=str(folder(tmp_path, family, **MIXTURES[family])), context=12)
    narrow, wide = (backbone.config() | {"dtype": dtype} for dtype in ("bfloat16", "float32"))
    counts = [count_flops(backbone, NextToken(), config) for config in (narrow, wide)]
    assert counts[0] == counts[1]
    inactive = count_flops(backbone, NextToken(), wide | {"num_experts_per_tok": 1})
    assert isinstance(counts[0], int) and isinstance(inactive, int)
    assert inactive < counts[0]  # the products of the experts are among them


@pytest.mark.parametrize(
    ("family", "more"),
    [
        pytest.param("mamba2", {**SPACE, "num_heads": 4, "head_dim": 16}, marks=pytest.mark.slow),
        pytest.param(
            "falcon_h1",
            {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "head_dim": 8},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_infinity_survives_a_config(
    family: str, more: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe(tmp_path, family, **more)
    assert main(["validate", path]) == 0
    config = CausalLM(model=str(tmp_path / "full")).config()
    json.dumps(config, allow_nan=False)
    with torch.device("meta"):
        model: Any = CausalLM.construct(config)
    assert model.config.time_step_limit[1] == math.inf
    capsys.readouterr()
    assert main(["validate", path, "--search.update", "{class_path: LoRA, init_args: {targets: '.*out_proj'}}"]) == 2
    assert "search.update: peft cannot adapt these layers" in capsys.readouterr().err
