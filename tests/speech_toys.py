"""A small Whisper that hears one second, as a folder that users would have, and tones that it hears."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)
from transformers.models.whisper.tokenization_whisper import LANGUAGES

from tinyfusion_llm import SpeechText

RATE = 16000
TONES = {"red": 300, "green": 900, "blue": 2700}
"""Cycles per second of the tone that is called so."""
TASKS = ("translate", "transcribe", "startoflm", "startofprev", "nospeech", "notimestamps")


def processor() -> Any:
    """Whisper's, whose words are bytes, with British spellings of one word."""
    tokenizer = WhisperTokenizer(vocab={c: i for i, c in enumerate(sorted(ByteLevel.alphabet()))}, merges=[])
    special = ("startoftranscript", *LANGUAGES, *TASKS)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|endoftext|>", *(f"<|{name}|>" for name in special)]})
    return WhisperProcessor(WhisperFeatureExtractor(feature_size=8, chunk_length=1), tokenizer)


def learned(path: Path, heard: list[tuple[str, str]]) -> Path:
    """A folder with a model that has learned by heart what is said to be heard in tones."""
    data = speech(folder(path), recordings(path.parent / "heard", heard))
    batch = data.train().__getitems__(list(range(len(heard))))
    model: Any = WhisperForConditionalGeneration.from_pretrained(path)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3)
    for _ in range(300):
        logits = model(batch["features"], decoder_input_ids=batch["tokens"]).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss.detach() < 0.02:
            model.save_pretrained(path)
            return path
    raise AssertionError(f"the loss is {loss.detach():.3f} still")


def speech(model: Path, rows: Path, **options: Any) -> SpeechText:
    """Recordings to train on, all of them held out too."""
    options = {"context": 32, "held_out_files": [str(rows)], **options}
    return SpeechText(processor=str(model), files=[str(rows)], **options)


def folder(path: Path) -> Path:
    """A folder with a random model, no weight of which is zero."""
    made = processor()
    end, start = made.tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|startoftranscript|>"])
    config = WhisperConfig(
        vocab_size=len(made.tokenizer), num_mel_bins=8, d_model=32, encoder_layers=4, decoder_layers=4,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48,
        max_source_positions=50, max_target_positions=64, pad_token_id=end, bos_token_id=end, eos_token_id=end,
        decoder_start_token_id=start, begin_suppress_tokens=None,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config)
    rng = torch.Generator().manual_seed(0)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1, generator=rng)
    made.save_pretrained(path)
    (path / "normalizer.json").write_text(json.dumps({"colour": "color"}))
    model.save_pretrained(path)
    return path


def tone(name: str, rate: int = RATE, seconds: float = 0.5) -> np.ndarray:
    """(samples,) of a tone."""
    return 0.5 * np.sin(2 * np.pi * TONES[name] * np.arange(round(seconds * rate)) / rate)


def recordings(path: Path, rows: list[tuple[str, str]]) -> Path:
    """A JSONL file, and beside it the recording of each row: the name of its tone, and what is said to be heard."""
    path.mkdir(parents=True, exist_ok=True)
    for i, (name, _) in enumerate(rows):
        soundfile.write(path / f"{i:02}.wav", tone(name), RATE)
    found = [{"audio": f"{i:02}.wav", "text": text} for i, (_, text) in enumerate(rows)]
    (path / "heard.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return path / "heard.jsonl"
