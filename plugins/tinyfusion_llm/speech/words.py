"""Words that models get wrong when they write what they hear."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from tinyfusion_core.errors import UserError, need, require
from tinyfusion_core.evaluation.metrics import Measurement, Metric, Models
from tinyfusion_core.protocols.columns import unchecked
from tinyfusion_core.protocols.data import DataSource
from tinyfusion_core.protocols.task import Task
from tinyfusion_core.runtime.distributed import batches, local_share, map_sharded
from tinyfusion_core.training.trainer import Trainer
from tinyfusion_llm.speech.source import SpeechRows, SpeechText


@dataclass(frozen=True)
class WordErrorRate(Metric):
    """Words wrong, missing or too many in what a model writes of held-out recordings, in percent of the words said.

    Transcripts are greedy, of at most the data's `context` tokens. They and the texts are compared as Whisper's
    tokenizer normalises them: English ones by its rules for English, with its spellings if it has a list, others by
    its basic rules. A second row says how much the transcripts differ from those of the teacher.

    Args:
        num_samples: the first so many held-out samples; default all.
        batch_size: recordings per batch.
    """

    num_samples: int | None = None
    batch_size: int = 16
    together = True
    column = "word error rate"

    def __post_init__(self) -> None:
        num = self.num_samples
        require(num is None or num >= 1, "evaluate: WordErrorRate.num_samples", num, "at least 1, or null")
        require(self.batch_size >= 1, "evaluate: WordErrorRate.batch_size", self.batch_size, "at least 1")

    @override
    def check(self, data: DataSource) -> None:
        if not isinstance(data, SpeechText):
            raise UserError("evaluate: WordErrorRate needs recordings: data SpeechText; leave it out")
        need("jiwer", "tinyfusion[speech]", "evaluate: WordErrorRate")

    @override
    def __call__(self, task: Task, models: Models, trainer: Trainer) -> list[Measurement]:
        rows = unchecked(task.held_out)
        if not isinstance(rows, SpeechRows):
            raise UserError("evaluate: WordErrorRate goes with the data SpeechText")
        parts = batches(min(self.num_samples or len(rows), len(rows)), self.batch_size)
        normalise = normaliser(rows.processor.tokenizer)
        written: dict[str, list[str]] = {}
        with trainer.track("transcripts", len(models) * sum(map(len, local_share(parts)))) as progress:

            def write(model: nn.Module, numbers: range) -> list[str]:
                with trainer.accelerator.autocast():
                    found = transcripts(model, rows, numbers)
                progress.advance(len(numbers))
                return [normalise(text) for text in found]

            for name, model in models.items():
                written[name] = [text for part in map_sharded(parts, partial(write, model)) for text in part]
        said = [normalise(one.text) for one in rows.utterances[: parts[-1].stop]]
        teacher, note = next(iter(written.values())), f"{len(said)} held-out recordings, greedy"
        return [
            Measurement(name, {model: percent_wrong(of, texts) for model, texts in written.items()}, "%", "lower", note)
            for name, of in (("word error rate", said), ("word error rate against the teacher", teacher))
        ]


def transcripts(model: Any, rows: SpeechRows, numbers: Sequence[int]) -> list[str]:
    """Return what a model writes of some recordings.

    Args:
        model: an encoder-decoder of transformers, in eval mode.
        rows: the recordings.
        numbers: which of them.
    """
    from transformers import GenerationMixin

    batch = rows.__getitems__(list(numbers))
    like = next(model.parameters())
    features = batch["features"].to(like.device, like.dtype)
    # The library's loop, not Whisper's own one, which finds languages and cuts long recordings.
    made = GenerationMixin.generate(
        model,
        features,
        attention_mask=torch.ones_like(features[:, 0], dtype=torch.long),
        decoder_input_ids=batch["tokens"][:, : rows.num_prompt].to(like.device),
        max_length=rows.context,
        do_sample=False,
        num_beams=1,
    )
    found: list[str] = rows.processor.tokenizer.batch_decode(made, skip_special_tokens=True)
    return found


def normaliser(tokenizer: Any) -> Callable[[str], str]:
    """Return how words are written when they are compared.

    Args:
        tokenizer: Whisper's, which knows its language.
    """
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

    if tokenizer.language in (None, "en", "english"):
        return EnglishTextNormalizer(tokenizer.english_spelling_normalizer or {})  # type: ignore[no-untyped-call]
    return BasicTextNormalizer()


def percent_wrong(said: Sequence[str], written: Sequence[str]) -> float | None:
    """Return the words wrong, missing or too many in percent of those said; None if nothing is said.

    Args:
        said: normalised texts.
        written: a normalised transcript of each.
    """
    if not any(text.split() for text in said):
        return None
    found = need("jiwer", "tinyfusion[speech]", "evaluate: WordErrorRate").process_words(list(said), list(written))
    return 100 * float(found.wer)
