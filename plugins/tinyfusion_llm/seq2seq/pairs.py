"""Pairs of texts as samples: what the encoder reads, and what the decoder is to write."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from tinyfusion_core.errors import UserError, require
from tinyfusion_llm.hidden import IGNORED
from tinyfusion_llm.layers.edits import is_int
from tinyfusion_llm.pretrained.readers import encode, said_by
from tinyfusion_llm.rows import Corpus
from tinyfusion_llm.seq2seq.columns import MASK, SOURCE
from tinyfusion_llm.text import Document, TextSource


@dataclass(frozen=True)
class PairRows:
    """Pairs of a corpus as samples, padded at the end; see `TextPairs`.

    Attributes:
        corpus: all pairs, each a source, no token of which counts, and its target.
        pairs: indices of the samples' pairs in it, in order.
        sources: (pairs of the corpus,) lengths of all sources.
        source_context: S.
        context: T.
        start: the token that a decoder begins with.
    """

    corpus: Corpus
    pairs: Any
    sources: Any
    source_context: int
    context: int
    start: int

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """Return `source`, `source_mask` (rows, source_context), and `tokens`, `labels` (rows, context)."""
        rows = [self._row(int(self.pairs[i])) for i in indices]
        return {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}

    def extremes(self, name: str) -> Sequence[tuple[int, str]]:
        """Return the largest token id of all sources, or of all targets, and which text it is in."""
        if name not in (SOURCE, "tokens"):
            return []
        largest = np.max(self.corpus.tokens, where=self.corpus.counted[:] == (name == "tokens"), initial=0)
        further = self.start if name == "tokens" else 0
        return [(max(int(largest), self.corpus.filler, further), self.corpus.name)]

    def where(self, name: str, index: int) -> str:
        """Return which text a sample is from, and which of its pairs it is."""
        return f"{self.corpus.name} (pair {int(self.pairs[index]) + 1})"

    def _row(self, pair: int) -> dict[str, Any]:
        first, last = (int(self.corpus.bounds[i]) for i in (pair, pair + 1))
        middle = first + int(self.sources[pair])
        source, target = (self.corpus.tokens[a:b].astype(np.int64) for a, b in ((first, middle), (middle, last)))
        if len(source) > self.source_context:
            source = np.append(source[: self.source_context - 1], source[-1])  # which says that it ends
        read = np.full(self.source_context, self.corpus.filler)
        read[: len(source)] = source
        tokens, labels = np.full(self.context, self.corpus.filler), np.full(self.context, IGNORED)
        target = target[: self.context - 1]
        tokens[0], tokens[1 : len(target) + 1], labels[1 : len(target) + 1] = self.start, target, target
        mask = (np.arange(self.source_context) < len(source)).astype(np.int64)
        return {SOURCE: read, MASK: mask, "tokens": tokens, "labels": labels}


@dataclass(frozen=True, kw_only=True)
class TextPairs(TextSource):
    """Pairs of texts as samples: `source` and `source_mask` (S,), `tokens` and `labels` (T,).

    `tokens` are those that the decoder reads: its start, then the target; `labels` are -100 where no loss counts, at
    the start and in the padding. A pair is a row of a JSONL or Parquet file, or of a data set of the library
    `datasets`. Both texts are written by the model's tokenizer, with its special tokens. See `TextSource` for the rest.

    Args:
        source_field: key or column of the text that the encoder reads.
        text_field: key or column of the text that the decoder is to write.
        prefix: what precedes every source, as T5 is told its task: "translate English to German: ".
        source_context: S, tokens of a source.
        context: T, tokens of a target and the start.
        cut: cut texts that are longer; by default they are refused.
    """

    source_field: str = "source"
    text_field: str = "target"
    prefix: str = ""
    source_context: int = 512
    context: int = 128
    cut: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.source_context >= 2, "data.source_context", self.source_context, "at least 2 tokens")

    @override
    def _rows(self, corpus: Corpus, documents: Any, part: str) -> PairRows:
        most = self.max_held_out if part == "held out" else None
        targets = np.add.reduceat(corpus.counted, corpus.bounds[:-1], dtype=np.int64)
        sources = np.diff(corpus.bounds) - targets
        if not self.cut:
            longest = {"source_context": sources[documents], "context": targets[documents] + 1}
            for name, lengths in longest.items():
                if len(wrong := np.flatnonzero(lengths > (limit := getattr(self, name)))):
                    first = int(documents[wrong].min()) + 1
                    raise UserError(
                        f"data.{name}: {len(wrong)} of {len(lengths)} pairs to {part.replace('held out', 'hold out')} "
                        f"have more than {limit} tokens, up to {int(lengths.max())}, the first is pair {first} of "
                        f"{corpus.name}; set more, in backbone too, or data.cut: true"
                    )
        return PairRows(corpus, documents[:most], sources, self.source_context, self.context, self._start)

    @cached_property
    def _start(self) -> int:
        """The token that a decoder begins with, which is said beside the tokenizer."""
        for key in ("decoder_start_token_id", "bos_token_id"):  # as `generate` looks for it
            if is_int(said := said_by(self.tokenizer, key)):
                return int(said)
        raise UserError(
            f"data.tokenizer: no file in '{self.tokenizer}' says what a decoder begins with; expected "
            "decoder_start_token_id in generation_config.json or config.json: give the model's folder"
        )

    @property
    @override
    def _all_count(self) -> bool:
        return False

    @override
    def _encoding(self, tokenizer: Any) -> list[Any]:
        languages = [getattr(tokenizer, name, None) for name in ("src_lang", "tgt_lang")]
        return ["pairs", self.source_field, self.text_field, self.prefix, *languages]

    @override
    def _encoded(self, tokenizer: Any, some: Sequence[Document]) -> Iterator[tuple[list[int], list[int]]]:
        sources = encode(tokenizer, [self.prefix + document.prompt for document in some])
        targets = encode(tokenizer, [document.text for document in some], target=True)
        end = tokenizer.eos_token_id
        for source, target in zip(sources, targets, strict=True):
            target = target if end is None or end in target else [*target, end]
            yield [*source, *target], [0] * len(source) + [1] * len(target)

    @override
    def _plain(self, path: Path) -> Iterator[Document]:
        raise UserError(f"{path}: a text is no pair; give .jsonl or .parquet files, a pair in each row")

    @override
    def _fields(self, rows: Iterable[tuple[int, Any]], where: str) -> Iterator[Document]:
        for number, row in rows:
            place = f"{where}: row {number}"
            source, target = (
                self._text(row, name, place, empty=False) for name in (self.source_field, self.text_field)
            )
            yield Document(target, source)

    @override
    def _fields_for(self, row: Any) -> str:
        return "data.source_field and data.text_field"
