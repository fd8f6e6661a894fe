"""Tokenized documents, and samples cut from them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from tinyfusion_core.errors import UserError
from tinyfusion_llm.hidden import IGNORED


@dataclass(frozen=True)
class Corpus:
    """Tokenized documents, concatenated and memory-mapped.

    Attributes:
        tokens: (n,) token ids.
        counted: (n,) ones where a loss counts the token; None if it counts all.
        bounds: (documents + 1,) where each document begins, and the end.
        filler: token id for padding.
        largest: the largest token id in it.
        name: what the text is and whose tokens these are, for messages.
        folder: where they lie; its name is a hash of all that they were made of.
    """

    tokens: Any
    counted: Any
    bounds: Any
    filler: int
    largest: int
    name: str
    folder: Path


def write_corpus(documents: Iterable[tuple[Sequence[int], Sequence[int]]], folder: Path) -> None:
    """Write documents to a folder, which appears when it is complete.

    Args:
        documents: the tokens of each, and ones for those that count.
        folder: where to.

    Raises:
        UserError: it cannot be written.
    """
    bounds, largest = [0], 0
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".making"))
    try:
        with (made / "tokens").open("wb") as tokens, (made / "counted").open("wb") as counted:
            for ids, ones in documents:
                _write(tokens, ids, np.uint32)
                _write(counted, ones, np.uint8)
                largest = max([largest, *ids])
                bounds.append(bounds[-1] + len(ids))
        with (made / "bounds").open("wb") as file:
            _write(file, bounds, np.int64)
        with (made / "largest").open("wb") as file:
            _write(file, [largest], np.int64)
        made.chmod(0o755)
        if not folder.is_dir():  # another process may have been faster
            made.rename(folder)
    except OSError as e:
        if not folder.is_dir():
            raise UserError(f"data.cache: {folder.parent} cannot be written ({e}); free space or name another") from e
    finally:
        shutil.rmtree(made, ignore_errors=True)


def read_corpus(folder: Path, filler: int, name: str, all_count: bool) -> Corpus:
    """Return what `write_corpus` wrote.

    Args:
        folder: where it lies.
        filler: token id for padding.
        name: what the text is, for messages.
        all_count: whether all tokens count.

    Raises:
        UserError: it holds no text.
    """
    bounds = np.fromfile(folder / "bounds", dtype=np.int64)
    if len(bounds) < 2:
        raise UserError(f"data: {name} holds no text")
    counted = None if all_count else np.memmap(folder / "counted", dtype=np.uint8, mode="r")
    tokens = np.memmap(folder / "tokens", dtype=np.uint32, mode="r")
    largest = int(np.fromfile(folder / "largest", dtype=np.int64)[0])
    return Corpus(tokens, counted, bounds, filler, largest, name, folder)


def _write(file: BinaryIO, numbers: Sequence[int], kind: Any) -> None:
    file.write(np.asarray(numbers, dtype=kind).tobytes())


@dataclass(frozen=True)
class Rows:
    """Documents of a corpus as samples of T tokens; see `TextTokens`.

    Attributes:
        corpus: all documents.
        starts: where the pieces of the samples begin in it, in order.
        lengths: lengths of the pieces.
        context: T.
        pack: whether samples continue across pieces; otherwise each piece is a sample, padded.
        most: largest number of samples; None: no limit.
        separate: whether samples say where documents begin; see `TextTokens`.
    """

    corpus: Corpus
    starts: Any
    lengths: Any
    context: int
    pack: bool
    most: int | None = None
    separate: bool = False

    def __len__(self) -> int:
        num = int(self.lengths.sum()) // self.context if self.pack else len(self.lengths)
        return num if self.most is None else min(num, self.most)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """Return `tokens`, `labels` and, of separate documents, `positions` of these samples, each (rows, context)."""
        rows = [self._row(i) for i in indices]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def extremes(self, name: str) -> Sequence[tuple[int, str]]:
        """Return the largest token id of the corpus, or position in a document, and which text it is in."""
        if name == "positions" and self.separate:
            return [(min(int(self.lengths.max()), self.context) - 1, self.corpus.name)]
        largest = max(self.corpus.largest, 0 if self.pack else self.corpus.filler)
        return [(largest, self.corpus.name)] if name == "tokens" else []

    def where(self, name: str, index: int) -> str:
        """Return which text a sample is from, and which of its samples it is."""
        return f"{self.corpus.name} (sample {index})"

    def span(self, first: int, last: int) -> dict[str, Tensor]:
        """Return what is at [first, last) of the packed text, each (last - first,).

        Returns:
            `tokens`, `labels` and, of separate documents, `positions`: from 0 in each, also in the first one's part.
        """
        where = np.arange(first, last)
        piece = np.searchsorted(self._ends, where, side="right")
        begins = self._ends[piece] - self.lengths[piece]
        at = self.starts[piece] + where - begins
        tokens = torch.from_numpy(self.corpus.tokens[at].astype(np.int64))
        labels = tokens.clone()
        if self.corpus.counted is not None:
            labels[torch.from_numpy(self.corpus.counted[at] == 0)] = IGNORED
        if not self.separate:
            return {"tokens": tokens, "labels": labels}
        positions = torch.from_numpy(where - np.maximum(begins, first))
        labels[positions == 0] = IGNORED  # nothing before it can tell
        return {"tokens": tokens, "labels": labels, "positions": positions}

    @cached_property
    def _ends(self) -> Any:
        return np.cumsum(self.lengths)

    def _row(self, i: int) -> dict[str, Tensor]:
        if self.pack:
            return self.span(i * self.context, (i + 1) * self.context)
        first = int(self._ends[i] - self.lengths[i])
        row = self.span(first, int(self._ends[i]))
        short, padding = self.context - len(row["tokens"]), {"tokens": self.corpus.filler, "labels": IGNORED}
        return {name: torch.cat([t, t.new_full((short,), padding[name])]) for name, t in row.items()}
