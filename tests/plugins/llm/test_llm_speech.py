"""Recordings as data, and the words that a model gets wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

import tinyfusion_core as tiny
from speech_toys import RATE, TONES, folder, processor, recordings, speech, tone
from tinyfusion_llm import SpeechText
from vision_toys import folder as folder_of_images

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers
SAME = [(name, name) for name in TONES]


def test_a_sample_is_what_whispers_processor_makes(tmp_path: Path) -> None:
    rows = recordings(tmp_path / "rows", SAME)
    samples = speech(folder(tmp_path / "model"), rows, language="de").held_out()
    batch, own = samples.__getitems__([1, 0]), processor()
    own.tokenizer.set_prefix_tokens(language="german", task="transcribe")
    features = own([tone("green"), tone("red")], sampling_rate=RATE, return_tensors="pt").input_features
    assert batch["features"].dtype == torch.float32
    assert batch["features"].shape == (2, 8, 100)
    assert torch.allclose(batch["features"], features, atol=1e-2)  # 16 bits
    prompt = own.tokenizer.convert_tokens_to_ids(
        ["<|startoftranscript|>", "<|de|>", "<|transcribe|>", "<|notimestamps|>"]
    )
    end = own.tokenizer.eos_token_id
    text = own.tokenizer.convert_tokens_to_ids(["Ġ", *"green"])
    assert batch["tokens"][0].tolist() == [*prompt, *text, *[end] * 22]
    assert batch["labels"][0].tolist() == [*[-100] * 4, *text, end, *[-100] * 21]
    assert (batch["labels"] >= 0).sum(1).tolist() == [7, 5]
    assert samples.where("features", 2) == f"{rows}: row 3"
    assert samples.extremes("features") == []
    assert samples.extremes("tokens") == [(int(batch["tokens"].max()), f"{rows}: row 1")]


def test_prompts_and_beginnings_are_options(tmp_path: Path) -> None:
    model, rows = folder(tmp_path / "model"), recordings(tmp_path / "rows", SAME)
    names = processor().tokenizer.convert_ids_to_tokens

    def beginning(**options: Any) -> list[str]:
        return names(speech(model, rows, **options).held_out().__getitems__([0])["tokens"][0, :5].tolist())

    assert beginning(task="translate")[1:] == ["<|en|>", "<|translate|>", "<|notimestamps|>", "Ġ"]
    assert beginning(leading_space=False)[4] == "r"
    assert beginning(language=None) == ["<|startoftranscript|>", "<|notimestamps|>", "Ġ", "r", "e"]


def test_other_rates_channels_and_formats_are_the_same_recording(tmp_path: Path) -> None:
    rows = recordings(tmp_path / "rows", SAME)
    mono = tone("blue", 48000)
    soundfile.write(rows.parent / "00.wav", np.stack([1.5 * mono, 0.5 * mono], 1), 48000, subtype="FLOAT")
    soundfile.write(rows.parent / "01.flac", tone("blue"), RATE)
    rows.write_text(rows.read_text().replace("01.wav", "01.flac"))
    features = speech(folder(tmp_path / "model"), rows).held_out().__getitems__([0, 1, 2])["features"]
    assert (features[:2] - features[2]).abs().mean() < 0.02


def test_rows_are_held_out_as_asked(tmp_path: Path) -> None:
    model, rows = folder(tmp_path / "model"), recordings(tmp_path / "rows", [("red", str(i)) for i in range(10)])
    parts = speech(model, rows, held_out_files=None, held_out_fraction=0.3, max_held_out=2, seed=1)
    heard, kept = ({one.text for one in part.utterances} for part in (parts.train(), parts.held_out()))
    assert (len(heard), len(kept)) == (7, 2)
    assert not heard & kept
    again = speech(model, rows, held_out_files=None, held_out_fraction=0.3, max_held_out=2, seed=1)
    assert [one.text for one in again.train().utterances] == [one.text for one in parts.train().utterances]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"audio": "00.wav", "text": 3}, r"row 4: 'text' is 3; expected a text, or set audio_field, text_field"),
        ({"text": "red"}, r"row 4 has no 'audio' \(found: text\)"),
        ([], r"row 4 has no 'audio' \(found: nothing\)"),
        ({"audio": "00.wav", "text": " "}, "row 4: 'text' is empty, so nothing would be learned"),
        ({"audio": "", "text": "red"}, "row 4: 'audio' is empty"),
        ({"audio": "../rows", "text": "red"}, "row 4: .*rows: is a folder; expected a file"),
        ({"audio": "00.wav", "text": "\ud800"}, "row 4: 'text' holds half of a character"),
        ({"audio": "no.wav", "text": "red"}, "row 4: no recording .*no.wav; files are looked for beside the JSONL"),
        ({"audio": "heard.jsonl", "text": "red"}, "row 4: .*heard.jsonl is damaged or no recording"),
        ({"audio": "long.wav", "text": "red"}, "row 4: .*long.wav has 1.5 seconds, the model hears 1; cut it"),
        ({"audio": "cut.wav", "text": "red"}, "row 4: .*cut.wav ends before its header says, so words are missing"),
        (
            {"audio": "none.wav", "text": "red"},
            "row 4: .*none.wav: its length is 0.0; expected at least one sample; leave the",
        ),
        ({"audio": "00.wav", "text": "x" * 27}, "row 4: 'text' takes 33 tokens, 4 of them the prompt's; context is 32"),
    ],
)
def test_a_wrong_row_is_named_before_anything_is_read(row: Any, message: str, tmp_path: Path) -> None:
    rows = recordings(tmp_path / "rows", SAME)
    soundfile.write(rows.parent / "long.wav", tone("red", seconds=1.5), RATE)
    (rows.parent / "cut.wav").write_bytes((rows.parent / "long.wav").read_bytes()[:2000])
    soundfile.write(rows.parent / "none.wav", tone("red", seconds=0), RATE)
    rows.write_text(rows.read_text() + json.dumps(row) + "\n")
    with pytest.raises(tiny.UserError, match=message):
        speech(folder(tmp_path / "model"), rows).train()


def test_a_recording_that_is_damaged_later_is_named(tmp_path: Path) -> None:
    rows = recordings(tmp_path / "rows", SAME)
    samples = speech(folder(tmp_path / "model"), rows).train()
    place = next(i for i in range(3) if samples.utterances[i].audio.name == "01.wav")
    soundfile.write(rows.parent / "01.wav", np.full(100, np.nan), RATE, subtype="FLOAT")
    with pytest.raises(tiny.UserError, match="row 2: .*01.wav holds numbers that are not finite"):
        samples.__getitems__([place])
    (rows.parent / "01.wav").write_bytes(b"RIFF")
    with pytest.raises(tiny.UserError, match="row 2: .*01.wav is damaged"):
        samples.__getitems__([place])


def test_a_wrong_option_or_processor_is_named(tmp_path: Path) -> None:
    model, rows = folder(tmp_path / "model"), recordings(tmp_path / "rows", SAME)
    with pytest.raises(tiny.UserError, match="language: Unsupported language: klingon"):
        speech(model, rows, language="klingon").train()
    with pytest.raises(tiny.UserError, match="no processor of audio and text in .*LlavaProcessor takes no audio"):
        speech(folder_of_images(tmp_path / "llava", "llava"), rows).train()
    with pytest.raises(tiny.UserError, match="context is 1; expected at least 2"):
        speech(model, rows, context=1)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(tiny.UserError, match="no row of a .jsonl file in .*; give rows with recordings and text"):
        speech(model, tmp_path / "empty.jsonl").train()
    with pytest.raises(tiny.UserError, match=r"^files is \[\]; expected .txt"):
        SpeechText(processor=str(model), files=[]).train()


@pytest.mark.parametrize(
    ("several", "language", "message"),
    [
        (True, None, r"language is null, and the model in '.*model' knows several: name that of the texts"),
        (False, "en", r"language is 'en', and the model in '.*model' knows one alone; its prompt names none: set null"),
        (True, "en", ""),
        (False, None, ""),
    ],
)
def test_a_language_is_named_where_a_model_knows_several(
    several: bool, language: str | None, message: str, tmp_path: Path
) -> None:
    model, rows = folder(tmp_path / "model"), recordings(tmp_path / "rows", SAME)
    (model / "generation_config.json").write_text(json.dumps({"is_multilingual": several}))  # as Whisper's says
    data = speech(model, rows, language=language)
    if message:
        with pytest.raises(tiny.UserError, match=message.replace("null", "(null|None)")):
            data.train()
    else:
        assert len(data.train()) == 3
