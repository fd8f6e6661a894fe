"""Recordings and their texts as samples, made by the model's own processor while they are read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from tinyfusion_core.errors import UserError, first_line, need, require
from tinyfusion_llm.documents import Row, text_of
from tinyfusion_llm.hidden import IGNORED
from tinyfusion_llm.pretrained.readers import encode, said_by
from tinyfusion_llm.sources.parted import RowSource, file_beside


@dataclass(frozen=True)
class Utterance:
    """A recording, and what is said in it.

    Attributes:
        audio: its file.
        text: what is said.
        tokens: the text's tokens, between those of the prompt and the one that ends it.
        where: the row that it is from, for messages.
    """

    audio: Path
    text: str
    tokens: list[int]
    where: str


@dataclass(frozen=True)
class SpeechRows:
    """Recordings as samples; see `SpeechText`.

    Attributes:
        utterances: all of them, in order.
        processor: of transformers.
        context: T.
        num_prompt: how many of a text's first tokens are the prompt.
    """

    utterances: Sequence[Utterance]
    processor: Any
    context: int
    num_prompt: int

    def __len__(self) -> int:
        return len(self.utterances)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """Return `features` (rows, mels, frames), and `tokens` and `labels` (rows, T).

        Raises:
            UserError: a recording cannot be read.
        """
        some, extractor = [self.utterances[i] for i in indices], self.processor.feature_extractor
        audio = [_samples(one, extractor.sampling_rate) for one in some]
        features = extractor(audio, sampling_rate=extractor.sampling_rate, return_tensors="pt")["input_features"]
        # Behind its end a text has more of the token that ends it: not all tokenizers have one for padding.
        tokens = torch.tensor([[*one.tokens, *one.tokens[-1:] * (self.context - len(one.tokens))] for one in some])
        place, lengths = torch.arange(self.context), torch.tensor([len(one.tokens) for one in some])
        counted = (place >= self.num_prompt) & (place < lengths[:, None])
        return {"features": features, "tokens": tokens, "labels": tokens.where(counted, IGNORED)}

    def where(self, name: str, index: int) -> str:
        """Return the row that a sample is from."""
        return self.utterances[index].where

    def extremes(self, name: str) -> Sequence[tuple[int, str]]:
        """Return the largest of all tokens, and the row that has it."""
        if name not in ("tokens", "labels"):
            return []
        most = max(self.utterances, key=lambda one: max(one.tokens))
        return [(max(most.tokens), most.where)]


@dataclass(frozen=True, kw_only=True)
class SpeechText(RowSource):
    """Recordings and their texts, for models that write what they hear, such as Whisper.

    A sample has `features` (mels, frames), the log-mel spectrogram of the model's own feature extractor, padded to its
    length; `tokens` (T,) with T = `context`, the prompt of language and task, the text and its end; and `labels` (T,),
    the same with -100 where no loss counts, at the prompt and behind the end.

    A row of a JSONL file names a recording, in any format that libsndfile reads: WAV, FLAC, OGG, MP3. Several channels
    are averaged, and other rates than the extractor's are resampled. Recordings are read anew each time.

    Args:
        audio_field: key of the recording's file, relative to the JSONL file.
        language: language of the texts, a name or code; null for a model that knows one language alone.
        task: whether texts are what is said, or its English translation.
        leading_space: begin texts with a space, as the transcripts of Whisper begin in languages that have spaces.
        context: T; tokens per text, those of prompt and end among them.
    """

    reads: ClassVar[Literal["images", "audio"]] = "audio"
    holding: ClassVar[str] = "recordings and text"
    order: ClassVar[str] = "speech"

    audio_field: str = "audio"
    language: str | None = "en"
    task: Literal["transcribe", "translate"] = "transcribe"
    leading_space: bool = True
    context: int = 128

    @override
    def _processor(self) -> Any:
        """The processor, whose tokenizer writes the prompt of language and task before each text."""
        need("soundfile", "tinyfusion[speech]", "data: SpeechText")
        processor = super()._processor()
        tokenizer = processor.tokenizer
        try:
            tokenizer.language, tokenizer.task = self.language, None if self.language is None else self.task
            tokenizer.set_prefix_tokens(predict_timestamps=False)
        except AttributeError:
            raise UserError(
                f"data.processor: {type(tokenizer).__name__} in '{self.processor}' knows no prompt of language and "
                "task; give the processor of a Whisper"
            ) from None
        except ValueError as e:
            raise UserError(f"data.language: {first_line(e)}") from None
        self._check_language()
        return processor

    def _check_language(self) -> None:
        """Check that a language is named if the model knows several, and only then.

        Raises:
            UserError: it is otherwise, as the model's generation config says.
        """
        told = said_by(self.processor, "is_multilingual")
        if told is True and self.language is None:
            raise UserError(
                f"data.language is null, and the model in '{self.processor}' knows several: name that of the texts"
            )
        if told is False and self.language is not None:
            raise UserError(
                f"data.language is '{self.language}', and the model in '{self.processor}' knows one alone; its prompt "
                "names none: set null"
            )

    @override
    def _samples(self, processor: Any, examples: Sequence[Utterance]) -> SpeechRows:
        return SpeechRows(examples, processor, self.context, len(processor.tokenizer.prefix_tokens))

    @override
    def _examples(self, processor: Any, rows: Iterable[Row]) -> list[Utterance]:
        """What rows hold. Raises UserError if one is not as it should be, or longer than a sample."""
        known = [self._checked(row, processor.feature_extractor) for row in rows]
        before, num_prompt = " " if self.leading_space else "", len(processor.tokenizer.prefix_tokens)
        texts = [f"{before}{text.strip()}" for _, text, _ in known]
        found = []
        for (audio, text, where), tokens in zip(known, encode(processor.tokenizer, texts), strict=True):
            require(
                len(tokens) <= self.context,
                f"{where}: '{self.text_field}' takes {len(tokens)} tokens, {num_prompt} of them the prompt's; "
                "data.context", self.context, "as many at least (backbone.context must be the same), or shorter texts",
            )  # fmt: skip
            found.append(Utterance(audio, text, tokens, where))
        return found

    def _checked(self, row: Row, extractor: Any) -> tuple[Path, str, str]:
        """Recording, text and place of a row."""
        settings = "data.audio_field, data.text_field"
        name, text = (
            text_of(row.values, key, row.where, settings, empty=False) for key in (self.audio_field, self.text_field)
        )
        audio = file_beside(row, name, "recording")
        seconds, most = _seconds(audio, row.where), extractor.n_samples / extractor.sampling_rate
        require(seconds > 0, f"{row.where}: {audio}: its length", seconds, "at least one sample; leave the row out")
        if seconds > most:
            raise UserError(
                f"{row.where}: {audio} has {seconds:.1f} seconds, the model hears {most:.0f}; cut it in pieces, or "
                "leave the row out"
            )
        return audio, text, row.where


def _seconds(audio: Path, where: str) -> float:
    soundfile = need("soundfile", "tinyfusion[speech]", "data: SpeechText")
    try:
        seconds = float(soundfile.info(audio).duration)
    except soundfile.SoundFileError as e:
        raise _damaged(audio, where, e) from None
    with audio.open("rb") as file:
        form, size = file.read(4), int.from_bytes(file.read(4), "little")
    if form == b"RIFF" and audio.stat().st_size < size + 8 < 1 << 32:  # whoever writes to a pipe knows no size
        raise UserError(f"{where}: {audio} ends before its header says, so words are missing; copy it again")
    return seconds


def _samples(one: Utterance, rate: int) -> np.ndarray:
    """The recording at a rate, (samples,)."""
    soundfile = need("soundfile", "tinyfusion[speech]", "data: SpeechText")
    try:
        channels, found = soundfile.read(one.audio, dtype="float32", always_2d=True)
    except soundfile.SoundFileError as e:
        raise _damaged(one.audio, one.where, e) from None
    samples: np.ndarray = channels.mean(1)
    if not np.isfinite(samples).all():
        raise UserError(f"{one.where}: {one.audio} holds numbers that are not finite; leave the row out")
    if found == rate:
        return samples
    from scipy.signal import resample_poly  # takes as long to import as half of torch

    resampled: np.ndarray = resample_poly(samples, rate, found)
    return resampled


def _damaged(audio: Path, where: str, error: Exception) -> UserError:
    return UserError(f"{where}: {audio} is damaged or no recording ({first_line(error)}); copy it again")
