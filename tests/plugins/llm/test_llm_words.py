"""Words that a model gets wrong: one that has learned what tones are called, and texts that say otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import WhisperForConditionalGeneration

import tinyfusion_core as tiny
from speech_toys import folder, recordings
from tinyfusion_images import Digits
from tinyfusion_llm import CausalLM, NextToken, SpeechText, WordErrorRate
from tinyfusion_llm.speech.words import normaliser

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers
HEARD = [("red", "Red light"), ("green", "grey colour"), ("blue", "20 blue")]
SAID = [("red", "red, LIGHT!"), ("green", "green color"), ("blue", "I say twenty blue birds"), ("red", "light")]
"""Beside what is learned: the same, one word wrong, three missing, one too many."""


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A model that has learned by heart what is heard; its folder has the processor."""
    path = folder(tmp_path_factory.mktemp("learned") / "model")
    batch = speech(path, recordings(path.parent / "heard", HEARD)).train().__getitems__([0, 1, 2])
    model: Any = WhisperForConditionalGeneration.from_pretrained(path)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(300):
        logits = model(batch["features"], decoder_input_ids=batch["tokens"]).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.05
    return path, model.eval()


def speech(model: Path, rows: Path, **options: Any) -> SpeechText:
    return SpeechText(processor=str(model), files=[str(rows)], held_out_files=[str(rows)], context=32, **options)


def task_of(data: SpeechText) -> tiny.Task:
    backbone, loss = CausalLM.tiny(), NextToken()
    return tiny.Task(backbone=backbone, loss=loss, train=data.train(), held_out=data.held_out(), data=data)


def test_errors_are_counted_after_normalising(learned: tuple[Path, Any], tmp_path: Path) -> None:
    path, model = learned
    task = task_of(speech(path, recordings(tmp_path, SAID)))
    silent: Any = WhisperForConditionalGeneration.from_pretrained(folder(tmp_path / "silent"))
    torch.nn.init.zeros_(silent.model.decoder.layer_norm.weight)
    end = silent.model.decoder.embed_tokens.weight[silent.config.eos_token_id]
    silent.model.decoder.layer_norm.bias.data.copy_(100 * end)  # the end is all that it writes
    models = {"teacher": model, "student": silent.eval()}
    said, against = WordErrorRate(batch_size=3)(task, models, tiny.Trainer(precision="fp32"))
    assert (said.name, said.unit, said.better) == ("word error rate", "%", "lower")
    assert said.note == "4 held-out recordings, greedy"
    assert said.values == {"teacher": 50.0, "student": 100.0}  # 5 of 10 words, and all of them
    assert against.values == {"teacher": 0.0, "student": 100.0}
    first, _ = WordErrorRate(num_samples=2)(task, {"teacher": model}, tiny.Trainer(precision="fp32"))
    assert first.values == {"teacher": 25.0}


def test_nothing_said_has_no_rate(learned: tuple[Path, Any], tmp_path: Path) -> None:
    path, model = learned
    task = task_of(speech(path, recordings(tmp_path, [("red", "(laughs)")])))
    said, against = WordErrorRate()(task, {"teacher": model}, tiny.Trainer(precision="fp32"))
    assert said.values == {"teacher": None}
    assert against.values == {"teacher": 0.0}


def test_words_are_normalised_by_their_language(learned: tuple[Path, Any], tmp_path: Path) -> None:
    rows = recordings(tmp_path, SAID)

    def normalised(language: str | None) -> str:
        tokenizer = speech(learned[0], rows, language=language).held_out().processor.tokenizer
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
