"""Text for encoders: padded, with special tokens, and embedded by a teacher."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import override

from tinyfusion_core.errors import UserError
from tinyfusion_core.protocols.backbone import Backbone
from tinyfusion_core.protocols.data import Samples
from tinyfusion_core.protocols.loss import LossAdapter
from tinyfusion_core.runtime.files import digest
from tinyfusion_llm.encoders.backbone import TextEncoder
from tinyfusion_llm.encoders.folder import check_pooling, normalises
from tinyfusion_llm.encoders.losses import Pooling, SentenceEmbedding
from tinyfusion_llm.encoders.rows import Embedded, Frame, Maskable, Pieces
from tinyfusion_llm.encoders.teacher import Embeddings, about_teacher
from tinyfusion_llm.pretrained.readers import encode
from tinyfusion_llm.rows import Corpus
from tinyfusion_llm.text import Document, TextSource


class _Framed(TextSource):
    """Documents that are tokenized without special tokens, which are put around each sample."""

    @override
    def _encoding(self, tokenizer: Any) -> list[Any]:
        return [self.text_field, "no special tokens"]

    @override
    def _encoded(self, tokenizer: Any, some: Sequence[Document]) -> Iterator[tuple[list[int], list[int]]]:
        for ids in encode(tokenizer, [document.text for document in some], special=False):
            yield ids, [1] * len(ids)

    def _some(self, found: Any, part: str) -> Any:
        """As many samples of a part as there may be, at least one."""
        if not len(found):
            raise UserError(f"data: the documents {'to train on' if part == 'train' else 'held out'} have no tokens")
        return found[: self.max_held_out] if part == "held out" else found


@dataclass(frozen=True, kw_only=True)
class PaddedText(_Framed):
    """Documents as samples of T = `context` tokens with special tokens around them, padded, for masked models.

    A sample has `tokens`, `attention`, 0 at padding, and `labels`, -100 at padding and special tokens, each (T,); and
    for whoever masks some `mask_token`, its id, and `last_token`, the largest id. A longer document is several
    samples. See `TextSource` for the options.
    """

    @override
    def _rows(self, corpus: Corpus, documents: Any, part: str) -> Samples:
        tokenizer = self._tokenizer()
        if (mask := tokenizer.mask_token_id) is None:
            raise UserError(f"data.tokenizer: '{self.tokenizer}' has no mask token; take a masked language model's")
        frame = Frame.of(tokenizer)
        room = frame.room(self.context)
        bounds = zip(corpus.bounds[documents].tolist(), corpus.bounds[documents + 1].tolist(), strict=True)
        cuts = [(first, min(room, end - first)) for start, end in bounds for first in range(start, end, room)]
        starts, lengths = np.array(self._some(cuts, part), dtype=np.int64).T
        return Maskable(corpus, starts, lengths, self.context, frame, mask, len(tokenizer) - 1)


@dataclass(frozen=True, kw_only=True)
class EmbeddedText(_Framed):
    """Documents as samples of T = `context` tokens with special tokens around them, padded, embedded by a teacher.

    A sample has `tokens` and `attention`, 0 at padding, each (T,), and `embedding` (D,), the teacher's. Each document
    is one, cut off where it is longer. The embeddings are made when they are first read, 256 documents at a time, and
    kept in the cache. See `TextSource` for the other options.

    Args:
        teacher: folder or hub id of the encoder whose embeddings are the targets; by default `tokenizer`. It reads the
            same documents with its own tokenizer.
        pooling: how they are pooled from its final hidden states; see `SentenceEmbedding`.
    """

    teacher: str | None = None
    pooling: Pooling = "mean"

    @override
    def check_fits(self, backbone: Backbone, loss: LossAdapter) -> None:
        """Check that embeddings are made alike by loss, data, and the folders of teacher and network."""
        if not isinstance(loss, SentenceEmbedding):
            return
        if loss.pooling != self.pooling:
            raise UserError(f"loss.pooling is '{loss.pooling}' and data.pooling '{self.pooling}'; the two must agree")
        for folder in map(Path, filter(None, (self.teacher or self.tokenizer, backbone.origin))):
            check_pooling(folder, loss.pooling, "loss.pooling")
            if normalises(folder) and not loss.normalised:
                raise UserError(f"loss.normalised is False, and the model in {folder} normalises; set it to true")

    @override
    def _rows(self, corpus: Corpus, documents: Any, part: str) -> Samples:
        lengths = corpus.bounds[documents + 1] - corpus.bounds[documents]
        some = self._some(documents[lengths > 0], part)
        files = self.held_out_files if part == "held out" and self.held_out_files is not None else self.files
        return Embedded(**vars(self._beginnings(corpus, some)), documents=some, embeddings=self._embeddings(files))

    def _beginnings(self, corpus: Corpus, documents: Any) -> Pieces:
        frame = Frame.of(self._tokenizer())
        starts = corpus.bounds[documents]
        lengths = (corpus.bounds[documents + 1] - starts).clip(max=frame.room(self.context))
        return Pieces(corpus, starts, lengths, self.context, frame)

    def _embeddings(self, files: Sequence[str] | None) -> Embeddings:
        name = self.teacher or self.tokenizer
        check_pooling(Path(name), self.pooling, "data.pooling")
        teacher, reader = TextEncoder(model=name, dtype="float32", context=self.context), replace(self, tokenizer=name)
        with about_teacher():
            corpus = reader._corpus(files)
            key = digest([corpus.folder.name, teacher.source(), self.pooling, self.context])[:32]
            samples = reader._beginnings(corpus, np.arange(len(corpus.bounds) - 1))
        return Embeddings(teacher, samples, self.pooling, corpus.folder.with_name(key))
