"""Words that a model gets wrong: one that has learned what tones are called, and texts that say otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import WhisperForConditionalGeneration

import tinyfusion_core as tiny
from forks import command, start, wait
from speech_toys import folder, learned, recordings, speech
from tinyfusion_core.cli import main
from tinyfusion_images import Digits
from tinyfusion_llm import EncoderDecoder, NextToken, WordErrorRate
from tinyfusion_llm.speech.words import normaliser

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers
HEARD = [("red", "Red light"), ("green", "grey colour"), ("blue", "20 blue")]
SAID = [("red", "red, LIGHT!"), ("green", "green color"), ("blue", "I say twenty blue birds"), ("red", "light")]
"""Beside what is learned: the same, one word wrong, three missing, one too many."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return learned(tmp_path_factory.mktemp("learned") / "model", HEARD)


def task_of(model: Path, rows: Path) -> tiny.Task:
    data, backbone = speech(model, rows), EncoderDecoder(model=str(model), context=32)
    return tiny.Task(backbone=backbone, loss=NextToken(), train=data.train(), held_out=data.held_out(), data=data)


def measured(run: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((run / "metrics.json").read_text())["measurements"]
    return found


def test_errors_are_counted_after_normalising(model: Path, tmp_path: Path) -> None:
    task = task_of(model, recordings(tmp_path, SAID))
    silent: Any = WhisperForConditionalGeneration.from_pretrained(folder(tmp_path / "silent"))
    torch.nn.init.zeros_(silent.model.decoder.layer_norm.weight)
    end = silent.model.decoder.embed_tokens.weight[silent.config.eos_token_id]
    silent.model.decoder.layer_norm.bias.data.copy_(100 * end)  # the end is all that it writes
    models = {"teacher": task.teacher, "student": silent.eval()}
    said, against = WordErrorRate(batch_size=3)(task, models, tiny.Trainer(precision="fp32"))
    assert (said.name, said.unit, said.better) == ("word error rate", "%", "lower")
    assert said.note == "4 held-out recordings, greedy"
    assert said.values == {"teacher": 50.0, "student": 100.0}  # 5 of 10 words, and all of them
    assert against.values == {"teacher": 0.0, "student": 100.0}
    first, _ = WordErrorRate(num_samples=2)(task, {"teacher": task.teacher}, tiny.Trainer(precision="fp32"))
    assert first.values == {"teacher": 25.0}


def test_nothing_said_has_no_rate(model: Path, tmp_path: Path) -> None:
    task = task_of(model, recordings(tmp_path, [("red", "(laughs)")]))
    said, against = WordErrorRate()(task, {"teacher": task.teacher}, tiny.Trainer(precision="fp32"))
    assert said.values == {"teacher": None}
    assert against.values == {"teacher": 0.0}


def test_words_are_normalised_by_their_language(model: Path, tmp_path: Path) -> None:
    rows = recordings(tmp_path, SAID)

    def normalised(language: str | None) -> str:
        tokenizer = speech(model, rows, language=language).held_out().processor.tokenizer
        return normaliser(tokenizer)("Twenty colours, it's the COLOUR!").strip()

    assert normalised("en") == normalised(None) == "20 colours it is the color"
    assert normalised("de") == "twenty colours it s the colour"


def test_what_it_cannot_measure_is_said_before_anything_is_spent() -> None:
    with pytest.raises(tiny.UserError, match="WordErrorRate needs recordings: data SpeechText; leave it out"):
        WordErrorRate().check(Digits())
    with pytest.raises(tiny.UserError, match="num_samples is 0; expected at least 1, or None"):
        WordErrorRate(num_samples=0)
    with pytest.raises(tiny.UserError, match="batch_size is 0"):
        WordErrorRate(batch_size=0)


@pytest.mark.slow
def test_a_recipe_prunes_recovers_and_counts_words_alike_on_two_processes(model: Path, tmp_path: Path) -> None:
    rows = recordings(tmp_path / "rows", SAID)
    content = {
        "backbone": {"class_path": "EncoderDecoder", "init_args": {"model": str(model), "context": 32}},
        "loss": "NextToken",
        "data": {
            "class_path": "SpeechText",
            "init_args": {
                "processor": str(model), "files": [str(model.parent / "heard")], "held_out_files": [str(rows)],
                "context": 32,
            },
        },
        "trainer": {"precision": "fp32", "batch_size": 2, "seed": 0},
        "search": {
            "class_path": "Search",
            "init_args": {"keep": {"model.encoder.layers": 4, "model.decoder.layers": 3}, "steps": 2},
        },
        "recover": {"steps": 2, "kd": "OutputKD"},
        "evaluate": [{"class_path": "WordErrorRate", "init_args": {"batch_size": 1}}],
    }  # fmt: skip
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(content))
    assert main(["validate", str(recipe)]) == 0
    assert main(["run", str(recipe), "--run-dir", str(tmp_path / "one")]) == 0
    decision = json.loads((tmp_path / "one" / "decision.json").read_text())
    assert decision["kept"][:4] == [0, 1, 2, 3] and len(decision["kept"]) == 7
    again: Any = WhisperForConditionalGeneration.from_pretrained(tmp_path / "one" / "student")
    assert (again.config.encoder_layers, again.config.decoder_layers) == (4, 3)
    assert (tmp_path / "one" / "student" / "processor_config.json").is_file()  # it may be the next one's teacher
    (flops,) = (one for one in measured(tmp_path / "one") if one["name"] == "FLOPs")
    assert flops["values"]["teacher"] > flops["values"]["recovered"] > 0

    content["search"] = {"class_path": "Keep", "init_args": {"blocks": decision["kept"]}}
    content["recover"] = None
    recipe.write_text(yaml.safe_dump(content))
    assert main(["run", str(recipe), "--run-dir", str(tmp_path / "alone")]) == 0
    log = tmp_path / "log"
    two = start(command("run", recipe, "--run-dir", tmp_path / "two"), log, processes=2)
    assert wait(two) == [0, 0], log.read_text()
    rates = [[one for one in measured(tmp_path / name) if one["unit"] == "%"] for name in ("alone", "two")]
    assert len(rates[0]) == 2 and rates[0] == rates[1]
    assert rates[0][0]["values"]["teacher"] == 50.0
