"""Texts as padded samples with the special tokens of a tokenizer around them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinyfusion_core.errors import UserError
from tinyfusion_llm.encoders.teacher import Embeddings
from tinyfusion_llm.hidden import IGNORED
from tinyfusion_llm.pretrained.readers import encode
from tinyfusion_llm.rows import Corpus


@dataclass(frozen=True)
class Frame:
    """The special tokens around a text.

    Attributes:
        before: token ids.
        after: token ids.
    """

    before: Sequence[int]
    after: Sequence[int]

    @classmethod
    def of(cls, tokenizer: Any) -> Frame:
        """Return those of a tokenizer.

        Raises:
            UserError: it does not put them around a text.
        """
        (framed,), (plain,) = (encode(tokenizer, ["a a"], special) for special in (True, False))
        for first in range(len(framed) - len(plain) + 1):
            if framed[first : first + len(plain)] == plain:
                return cls(framed[:first], framed[first + len(plain) :])
        raise UserError("data.tokenizer: its special tokens do not stand around a text; take an encoder's")

    def room(self, context: int) -> int:
        """Return how many tokens of a text go into `context` with them.

        Raises:
            UserError: none.
        """
        room = context - len(self.before) - len(self.after)
        if room < 1:
            raise UserError(f"data.context is {context}; beside the special tokens there is no room for a text")
        return room


@dataclass(frozen=True)
class Pieces:
    """Pieces of documents as samples of T tokens.

    Attributes:
        corpus: the documents, without special tokens.
        starts: where the pieces begin in it, in order.
        lengths: their lengths, at most the room in T.
        context: T.
        frame: special tokens around each.
    """

    corpus: Corpus
    starts: Any
    lengths: Any
    context: int
    frame: Frame

    def __len__(self) -> int:
        return len(self.starts)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """Return `tokens`, `attention` and `labels` of these samples, each (rows, context).

        `attention` is 0 at padding; `labels` are the tokens of the text itself, and elsewhere -100.
        """
        tokens = torch.full((len(indices), self.context), self.corpus.filler)
        attention, labels = torch.zeros_like(tokens), torch.full_like(tokens, IGNORED)
        before = len(self.frame.before)
        for row, i in enumerate(indices):
            start, length = int(self.starts[i]), int(self.lengths[i])
            text = torch.from_numpy(self.corpus.tokens[start : start + length].astype(np.int64))
            whole = torch.cat([torch.tensor(self.frame.before), text, torch.tensor(self.frame.after)]).long()
            tokens[row, : len(whole)] = whole
            attention[row, : len(whole)] = 1
            labels[row, before : before + length] = text
        return {"tokens": tokens, "attention": attention, "labels": labels}

    def extremes(self, name: str) -> Sequence[tuple[int, str]]:
        """Return the largest token id, and which text it is in."""
        largest = max(self.corpus.largest, self.corpus.filler, *self.frame.before, *self.frame.after)
        return [(largest, self.corpus.name)] if name == "tokens" else []

    def where(self, name: str, index: int) -> str:
        """Return which text a sample is from, and which of its samples it is."""
        return f"{self.corpus.name} (sample {index})"


@dataclass(frozen=True)
class Maskable(Pieces):
    """Pieces whose tokens can be masked; see `PaddedText`.

    Attributes:
        mask_token: id of the mask token.
        last_token: the largest token id.
    """

    mask_token: int
    last_token: int

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """Return what `Pieces` do, each (rows, context), and `mask_token` and `last_token`, (rows,)."""
        constants = {"mask_token": self.mask_token, "last_token": self.last_token}
        told = {name: torch.full((len(indices),), value) for name, value in constants.items()}
        return {**super().__getitems__(indices), **told}

    def extremes(self, name: str) -> Sequence[tuple[int, str]]:
        """Return the largest value of a column, and where it is from."""
        told = {"mask_token": self.mask_token, "last_token": self.last_token}
        return [(told[name], self.corpus.name)] if name in told else super().extremes(name)


@dataclass(frozen=True)
class Embedded(Pieces):
    """The beginnings of documents, with embeddings by a teacher; see `EmbeddedText`.

    Attributes:
        documents: the number of each in the corpus, (rows,).
        embeddings: those of all documents of the corpus.
    """

    documents: Any
    embeddings: Embeddings

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """Return `tokens` and `attention`, (rows, context), and `embedding`, (rows, channels)."""
        batch = super().__getitems__(indices)
        embedding = self.embeddings([int(self.documents[i]) for i in indices])
        return {"tokens": batch["tokens"], "attention": batch["attention"], "embedding": embedding}
