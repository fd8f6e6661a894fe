"""Text as samples of tokens: tokenized once, cached in memory-mapped files, in a seeded order."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from typing_extensions import override

from tinyfusion_core.errors import UserError, need, require
from tinyfusion_core.protocols.data import DataSource, Samples
from tinyfusion_core.runtime.files import NEUTRAL, digest, sha256
from tinyfusion_core.runtime.seeding import generator
from tinyfusion_llm.chat import Message, check_messages, check_template, encode_chat
from tinyfusion_llm.documents import check_held_out, check_text, find_files, json_lines, lines, parquet_rows
from tinyfusion_llm.pretrained.readers import load_tokenizer
from tinyfusion_llm.rows import Corpus, Rows, read_corpus, write_corpus

READING = 2
"""Version of how files become documents; caches of another are made anew."""


class Document(NamedTuple):
    """A text, what precedes it uncounted, or a conversation and where it stands."""

    text: str = ""
    prompt: str = ""
    messages: Sequence[Message] = ()
    where: str = ""


@dataclass(frozen=True, kw_only=True)
class TextSource(DataSource):
    """Documents as tokens: tokenized once, some of the documents held out.

    A document is a text file, a line of a JSONL file (both in UTF-8), or a row of a Parquet file or of a data set of
    the library `datasets`. Documents are held out whole.

    Args:
        tokenizer: folder or hub id of a model that has one.
        files: `.txt`, `.md`, `.jsonl` and `.parquet` files, and folders that are searched for them.
        dataset: instead of files: an argument of `datasets.load_dataset`, a name or `name:configuration`.
        split: split of the data set.
        text_field: key or column of the text.
        context: tokens per sample.
        held_out_fraction: fraction of the documents that no stage trains on.
        held_out_files: documents to hold out, instead of a fraction of `files`.
        max_held_out: largest number of samples to evaluate on, the first in the held-out documents' order; null takes
            all.
        seed: seed of the choice and the order of the documents.
        cache: folder of the token cache; by default `tinyfusion/tokens` in the user's cache.
    """

    tokenizer: str
    files: list[str] | None = None
    dataset: str | None = None
    split: str = "train"
    text_field: str = "text"
    context: int = 512
    held_out_fraction: float = 0.1
    held_out_files: list[str] | None = None
    max_held_out: int | None = None
    seed: int = 0
    cache: str | None = None

    def __post_init__(self) -> None:
        if (self.files is None) == (self.dataset is None):
            raise UserError("data: give files or dataset, one of the two")
        require(self.context >= 2, "data.context", self.context, "at least 2 tokens")
        check_held_out(self.held_out_fraction, self.max_held_out)

    @abstractmethod
    def _rows(self, corpus: Corpus, documents: Any, part: str) -> Samples:
        """Samples of some documents: of the part `train` or `held out`."""

    @abstractmethod
    def _encoded(self, tokenizer: Any, some: Sequence[Document]) -> Iterator[tuple[list[int], list[int]]]:
        """Tokens of documents, and ones for those that count."""

    @abstractmethod
    def _encoding(self, tokenizer: Any) -> list[Any]:
        """What the tokens depend on beside files and tokenizer."""

    @property
    def _all_count(self) -> bool:
        """Whether all tokens of all documents count."""
        return True

    def _tokenizer(self) -> Any:
        return load_tokenizer(self.tokenizer, None, None)

    @override
    def train(self) -> Samples:
        return self._parts[0]

    @override
    def held_out(self) -> Samples:
        return self._parts[1]

    @cached_property
    def _parts(self) -> tuple[Samples, Samples]:
        corpus = self._corpus(self.files)
        num = len(corpus.bounds) - 1
        order = torch.randperm(num, generator=generator(self.seed, "documents")).numpy()
        if self.held_out_files is not None:
            other = self._corpus(self.held_out_files)
            return self._rows(corpus, order, "train"), self._rows(other, np.arange(len(other.bounds) - 1), "held out")
        if num < 2:
            raise UserError(
                f"data: {self._named} holds one document, and documents are held out whole; give more of them, or "
                "held_out_files"
            )
        held_out = min(num - 1, max(1, round(self.held_out_fraction * num)))
        return self._rows(corpus, order[held_out:], "train"), self._rows(corpus, order[:held_out], "held out")

    @property
    def _named(self) -> str:
        return self.dataset or ", ".join(self.files or [])

    def _corpus(self, files: Sequence[str] | None) -> Corpus:
        """The tokens of some files or of the data set, from the cache if possible."""
        found = None if files is None else find_files(files)
        tokenizer = self._tokenizer()
        of: Any = [self.dataset, self.split] if found is None else {str(path): sha256(path) for path in found}
        key = digest([of, *self._encoding(tokenizer), _identity(tokenizer), READING])[:32]
        base = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "tinyfusion", "tokens")
        folder = Path(self.cache or base).expanduser() / key
        if not folder.is_dir():
            write_corpus(self._all_encoded(tokenizer, self._documents(found)), folder)
        name = f"{self.dataset or ', '.join(files or [])} with the data.tokenizer {self.tokenizer}"
        return read_corpus(folder, _filler(tokenizer), name, self._all_count)

    def _all_encoded(self, tokenizer: Any, documents: Iterator[Document]) -> Iterator[tuple[list[int], list[int]]]:
        while some := list(islice(documents, 64)):
            yield from self._encoded(tokenizer, some)

    def _documents(self, files: Sequence[Path] | None) -> Iterator[Document]:
        """Every non-empty document."""
        if files is None:
            datasets = need("datasets", "tinyfusion[text]", "data.dataset")
            name, _, configuration = (self.dataset or "").partition(":")
            rows = datasets.load_dataset(name, configuration or None, split=self.split)
            yield from self._fields(rows, f"data.dataset {self.dataset}")
        for path in files or []:
            if path.suffix == ".parquet":
                yield from self._fields(parquet_rows(path), str(path))
            elif path.suffix == ".jsonl":
                yield from self._fields(json_lines(path), str(path))
            else:
                yield from self._plain(path)

    def _plain(self, path: Path) -> Iterator[Document]:
        """The document of a file of text."""
        if text := "".join(lines(path)).strip():
            yield Document(text)

    def _fields(self, rows: Any, where: str) -> Iterator[Document]:
        """The documents of rows with fields."""
        for number, row in enumerate(rows, 1):
            if (text := self._text(row, self.text_field, f"{where}: row {number}")).strip():
                yield Document(text)

    def _text(self, row: Any, name: str, where: str) -> str:
        """A text of a row."""
        if not isinstance(row, dict) or not isinstance(row.get(name), str):
            found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise UserError(f"{where} has no text '{name}' (found: {found}); set {self._fields_for(row)}")
        text: str = row[name]
        check_text(text, f"{where}: '{name}'")
        return text

    def _fields_for(self, row: Any) -> str:
        """The settings that say where a row has its text."""
        return "data.text_field"


@dataclass(frozen=True, kw_only=True)
class TextTokens(TextSource):
    """Documents as samples of T = `context` tokens: `tokens` (T,), and `labels` (T,) with -100 where no loss counts.

    With `separate` there is `positions` (T,) too, the place of each token in its document. Each document ends with the
    tokenizer's end-of-text token, a chat as its template ends it. See `TextSource` for what a document is.

    Args:
        gguf_file: name of a GGUF file in `tokenizer` that holds it.
        prompt_field: key or column of a prompt, which precedes the text and is not counted in any loss.
        chat_field: instead of a text: key or column of a conversation, a list of turns with `role` and `content`. It is
            written by the tokenizer's chat template, and the losses count what the role `assistant` says.
        pack: cut samples from all documents in a seeded order, one after the other: nothing is padded, and a sample may
            contain the end of the previous document. false gives every document samples of its own, padded at the end.
        separate: tokens of a packed sample see their own document alone, and positions begin anew with each. Set
            `backbone.separate` too. No loss counts a document's first token.
    """

    gguf_file: str | None = None
    prompt_field: str | None = None
    chat_field: str | None = field(default=None, metadata={NEUTRAL: None})
    pack: bool = True
    separate: bool = field(default=False, metadata={NEUTRAL: False})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chat_field is not None and self.prompt_field is not None:
            raise UserError("data.prompt_field: a chat has turns instead of a prompt; give it or chat_field, not both")
        if self.separate and not self.pack:
            raise UserError("data.separate: without pack every document has samples of its own; leave one of them out")

    @override
    def _rows(self, corpus: Corpus, documents: Any, part: str) -> Rows:
        starts, ends = corpus.bounds[documents], corpus.bounds[documents + 1]
        if not self.pack:
            size = self.context
            cuts = [(a, min(a + size, e)) for s, e in zip(starts, ends, strict=True) for a in range(s, e, size)]
            # One token alone predicts nothing.
            starts, ends = np.array([c for c in cuts if c[1] - c[0] > 1], dtype=np.int64).reshape(-1, 2).T
        most = self.max_held_out if part == "held out" else None
        rows = Rows(corpus, starts, ends - starts, self.context, self.pack, most, self.separate)
        if not len(rows):
            raise UserError(
                f"data: the {len(documents)} documents to {part.replace('held out', 'hold out')} have "
                f"{int((ends - starts).sum())} tokens, fewer than a row of data.context {self.context}; "
                "give more text, or a shorter context (backbone.context must be the same)"
            )
        return rows

    @property
    @override
    def _all_count(self) -> bool:
        return self.prompt_field is None and self.chat_field is None

    @override
    def _tokenizer(self) -> Any:
        return load_tokenizer(self.tokenizer, None, self.gguf_file)

    @override
    def _encoding(self, tokenizer: Any) -> list[Any]:
        if self.chat_field is not None:
            return [self.chat_field, check_template(tokenizer, self.tokenizer)]
        return [self.text_field, self.prompt_field]

    @override
    def _encoded(self, tokenizer: Any, some: Sequence[Document]) -> Iterator[tuple[list[int], list[int]]]:
        if self.chat_field is not None:
            yield from (encode_chat(tokenizer, document.messages, document.where) for document in some)
            return
        end = tokenizer.eos_token_id
        prompts = encode(tokenizer, [document.prompt for document in some], special=True)
        texts = encode(tokenizer, [document.text for document in some], special=self.prompt_field is None)
        for prompt, text in zip(prompts if self.prompt_field else [[]] * len(some), texts, strict=True):
            text = [*text, *([end] if end is not None and text[-1:] != [end] else [])]
            yield [*prompt, *text], [0] * len(prompt) + [1] * len(text)

    @override
    def _plain(self, path: Path) -> Iterator[Document]:
        if self.chat_field is not None:
            raise UserError(f"{path}: text is no conversation; with data.chat_field give .jsonl or .parquet files")
        return super()._plain(path)

    @override
    def _fields(self, rows: Any, where: str) -> Iterator[Document]:
        for number, row in enumerate(rows, 1):
            place = f"{where}: row {number}"
            if self.chat_field is not None:
                turns = row.get(self.chat_field) if isinstance(row, dict) else None
                yield Document(messages=check_messages(turns, f"{place}: '{self.chat_field}'"), where=place)
            elif (text := self._text(row, self.text_field, place)).strip():
                yield Document(text, self._text(row, self.prompt_field, place) if self.prompt_field else "")

    @override
    def _fields_for(self, row: Any) -> str:
        chat = isinstance(row, dict) and isinstance(row.get("messages"), list)
        return "data.chat_field: messages" if chat else "data.text_field or data.prompt_field"


def encode(tokenizer: Any, texts: Sequence[str], special: bool) -> list[list[int]]:
    """Return the token ids of texts, with the tokenizer's special tokens or without."""
    encoded: list[list[int]] = tokenizer(list(texts), add_special_tokens=special, verbose=False)["input_ids"]
    return encoded


def _identity(tokenizer: Any) -> str:
    fast = getattr(tokenizer, "backend_tokenizer", None)
    return digest([fast.to_str() if fast is not None else tokenizer.get_vocab(), tokenizer.eos_token_id])


def _filler(tokenizer: Any) -> int:
    numbers = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(number for number in numbers if number is not None)
