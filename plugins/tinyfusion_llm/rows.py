"""Tokenised documents, and rows of tokens cut out of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinyfusion_llm.loss import IGNORED


@dataclass(frozen=True)
class Corpus:
    """Tokenised documents, one after the other, mapped into memory.

    Attributes:
        tokens: (n,) token numbers.
        counted: (n,) ones where a loss counts the token; None when it counts all.
        bounds: (documents + 1,) where each document begins, and the end.
        filler: token number to pad with.
    """

    tokens: Any
    counted: Any
    bounds: Any
    filler: int


@dataclass(frozen=True)
class Rows:
    """Documents of a corpus as samples of T tokens; see `TextTokens`.

    Attributes:
        corpus: all documents.
        starts: where the pieces that the rows are made of begin in it, in order.
        lengths: of the pieces.
        context: T.
        pack: rows run on over the ends of pieces; otherwise each piece is a row, padded.
        most: rows there are at most.
    """

    corpus: Corpus
    starts: Any
    lengths: Any
    context: int
    pack: bool
    most: int | None = None

    def __len__(self) -> int:
        num = int(self.lengths.sum()) // self.context if self.pack else len(self.lengths)
        return num if self.most is None else min(num, self.most)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        rows = [self._row(i) for i in indices]
        return {"tokens": torch.stack([t for t, _ in rows]), "labels": torch.stack([labels for _, labels in rows])}

    def span(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Tokens and labels at these positions of the packed text."""
        where = np.arange(first, last)
        piece = np.searchsorted(self._ends, where, side="right")
        at = self.starts[piece] + where - (self._ends[piece] - self.lengths[piece])
        tokens = torch.from_numpy(self.corpus.tokens[at].astype(np.int64))
        labels = tokens.clone()
        if self.corpus.counted is not None:
            labels[torch.from_numpy(self.corpus.counted[at] == 0)] = IGNORED
        return tokens, labels

    @cached_property
    def _ends(self) -> Any:
        return np.cumsum(self.lengths)

    def _row(self, i: int) -> tuple[Tensor, Tensor]:
        if self.pack:
            return self.span(i * self.context, (i + 1) * self.context)
        first = int(self._ends[i] - self.lengths[i])
        tokens, labels = self.span(first, int(self._ends[i]))
        short = self.context - len(tokens)
        return (
            torch.cat([tokens, tokens.new_full((short,), self.corpus.filler)]),
            torch.cat([labels, labels.new_full((short,), IGNORED)]),
        )
