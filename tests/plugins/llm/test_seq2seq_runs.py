"""Encoder-decoders through the commands: rounds, whose starts are checked first, and a comparison within limits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import llm_toys
from seq2seq_toys import NETWORKS, WIDTHS, folder
from tinyfusion_core.cli import main

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of transformers, and of what cannot generate


def recipe(work: Path, family: str, **more: Any) -> Path:
    words = llm_toys.tokenizer(folder(work / "words", "t5"))
    rows = [{"source": f"w{5 + i} w{6 + i}", "target": f"w{8 + i} w{9 + i}"} for i in range(40)]
    (work / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = {"source_context": 8, "context": 6}
    network = {"model_type": family, **NETWORKS.get(family, {**WIDTHS, "max_position_embeddings": 64})}
    data = {"tokenizer": str(words), "files": [str(work / "pairs.jsonl")], "cache": str(work / "cache"), **sizes}
    content = {
        "backbone": {"class_path": "EncoderDecoder", "init_args": {"network": network, **sizes}},
        "loss": "NextToken",
        "data": {"class_path": "TextPairs", "init_args": data},
        "trainer": {"precision": "fp32", "batch_size": 4, "seed": 0},
        "train": {"steps": 60, "lr": 0.01},
        "evaluate": ["HeldOutLoss"],
        **more,
    }
    (work / "recipe.yaml").write_text(yaml.safe_dump(content))
    return work / "recipe.yaml"


def rounds(**last: Any) -> dict[str, Any]:
    search = {"class_path": "Search", "init_args": {"keep": 5, "steps": 2}}
    second = {"class_path": "BlockInfluence", "init_args": {"keep": 3, "samples": 8}}
    return {"a": {"search": search, "recover": {"steps": 2}}, "b": {"search": second, "recover": {"steps": 2, **last}}}


def test_two_rounds_and_a_comparison_of_a_t5(tmp_path: Path) -> None:
    path = recipe(tmp_path, "t5", rounds=rounds(kd="MaskedKD", start="Refit"))
    assert main(["run", str(path), "--run-dir", str(tmp_path / "run")]) == 0
    config = json.loads((tmp_path / "run" / "b" / "student" / "config.json").read_text())
    assert config["num_layers"] + config["num_decoder_layers"] == 3
    content = yaml.safe_load(path.read_text())
    del content["train"], content["rounds"]
    trained = {"model": str(tmp_path / "run" / "teacher"), "source_context": 8, "context": 6}
    bi = {"class_path": "BlockInfluence", "init_args": {"keep": 5, "samples": 8}}
    content |= {"backbone": {"class_path": "EncoderDecoder", "init_args": trained}, "recover": {"steps": 1}}
    content["compare"] = {"candidates": {"bi": bi}, "random": 20, "seeds": 1}
    path.write_text(yaml.safe_dump(content))
    assert main(["compare", str(path), "--run-dir", str(tmp_path / "compare")]) == 0
    found = json.loads((tmp_path / "compare" / "findings.json").read_text())
    kept = [tuple(entry["kept"]) for entry in found["masks"]]
    assert len(kept) == 10 and all({0, 4} < set(blocks) for blocks in kept)  # T5's first layers hold the biases


def test_a_start_that_is_not_for_a_marian_is_refused_before_the_first_search(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe(tmp_path, "marian", rounds=rounds(start="Refit"))
    assert main(["run", str(path), "--run-dir", str(tmp_path / "run")]) == 2
    assert "recover.start: Refit needs a linear layer whose output is added to the stream" in capsys.readouterr().err
    assert (tmp_path / "run" / "teacher").is_dir()
    assert not list((tmp_path / "run").glob("*/decision.json"))
