"""Text as samples of tokens: tokenized once, cached in memory-mapped files, in a seeded order."""

from __future__ import annotations

import os
import warnings
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from typing_extensions import override

from tinyfusion_core.errors import UserError, first_line, need, require
from tinyfusion_core.protocols.data import Samples
from tinyfusion_core.runtime.files import NEUTRAL, digest, sha256
from tinyfusion_llm.chat import Message, check_messages, check_template, encode_chat
from tinyfusion_llm.documents import find_files, json_lines, lines, parquet_rows, text_of
from tinyfusion_llm.pretrained.readers import encode, filler_of, identity_of, load_tokenizer, special_of
from tinyfusion_llm.rows import Corpus, Rows, read_corpus, write_corpus
from tinyfusion_llm.sources.parted import PartedSource

READING = 3
"""Version of how files become documents; caches of another are made anew."""


class Document(NamedTuple):
    """A text, what precedes it uncounted, or a conversation and where it stands."""

    text: str = ""
    prompt: str = ""
    messages: Sequence[Message] = ()
    where: str = ""


@dataclass(frozen=True, kw_only=True)
class TextSource(PartedSource):
    """Documents as tokens: tokenized once, some of the documents held out.

    A document is a text file, a line of a JSONL file (both in UTF-8), or a row of a Parquet file or of a data set of
    the library `datasets`. Documents are held out whole; empty ones are left out. What is spelled like a special token
    in a text is text as any other. See `PartedSource` for the other options.

    Args:
        tokenizer: folder or hub id of a model that has one.
        files: `.txt`, `.md`, `.jsonl` and `.parquet` files, and folders that are searched for them.
        dataset: instead of files: an argument of `datasets.load_dataset`, a name or `name:configuration`.
        split: split of the data set.
        rows: take so many rows from the beginning of the data set, streamed: nothing behind them is fetched, and on the
            disk there are their tokens alone. Default: all, after the library has stored the whole split.
        text_field: key or column of the text.
        cache: folder of the token cache; by default `tinyfusion/tokens` in the user's cache.
    """

    tokenizer: str
    files: list[str] | None = None
    dataset: str | None = None
    split: str = "train"
    rows: int | None = field(default=None, metadata={NEUTRAL: None})
    text_field: str = "text"
    cache: str | None = None

    def __post_init__(self) -> None:
        if (self.files is None) == (self.dataset is None):
            raise UserError("data: give files or dataset, one of the two")
        require(self.rows is None or self.rows >= 2, "data.rows", self.rows, "at least 2, or null")
        if self.rows is not None and self.dataset is None:
            raise UserError("data.rows: of a dataset, which is streamed; files are read whole, so leave it out")
        super().__post_init__()

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

    @cached_property
    @override
    def _parts(self) -> tuple[Samples, Samples]:
        corpus = self._corpus(self.files)
        named = f"data: {self.dataset or ', '.join(self.files or [])} holds one document, and they are held out whole"
        train, kept = self._apart(len(corpus.bounds) - 1, "documents", named)
        other = corpus
        if self.held_out_files is not None:
            other = self._corpus(self.held_out_files, "data.held_out_files")
            kept = list(range(len(other.bounds) - 1))
        return self._rows(corpus, np.array(train), "train"), self._rows(other, np.array(kept), "held out")

    def _corpus(self, files: Sequence[str] | None, key: str = "data.files") -> Corpus:
        """The tokens of some files or of the data set, from the cache if possible."""
        found = None if files is None else find_files(files, key)
        tokenizer = self._tokenizer()
        streamed = [] if self.rows is None else [self.rows]
        of: Any = [self.dataset, self.split, *streamed]
        if found is not None:
            of = {str(path): sha256(path) for path in found}
        key = digest([of, *self._encoding(tokenizer), identity_of(tokenizer), READING])[:32]
        base = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "tinyfusion", "tokens")
        folder = Path(self.cache or base).expanduser() / key
        if not folder.is_dir():
            write_corpus(self._all_encoded(tokenizer, _told(self._documents(found), tokenizer)), folder)
        name = f"{self.dataset or ', '.join(files or [])} with the data.tokenizer {self.tokenizer}"
        return read_corpus(folder, filler_of(tokenizer), name, self._all_count)

    def _all_encoded(self, tokenizer: Any, documents: Iterator[Document]) -> Iterator[tuple[list[int], list[int]]]:
        while some := list(islice(documents, 64)):
            yield from self._encoded(tokenizer, some)

    def _documents(self, files: Sequence[Path] | None) -> Iterator[Document]:
        """Every document."""
        if files is None:
            yield from self._fields(enumerate(self._dataset_rows(), 1), f"data.dataset {self.dataset}")
        for path in files or []:
            if path.suffix == ".parquet":
                yield from self._fields(enumerate(parquet_rows(path), 1), str(path))
            elif path.suffix == ".jsonl":
                yield from self._fields(json_lines(path), str(path))
            else:
                yield from self._plain(path)

    def _dataset_rows(self) -> Iterator[Any]:
        """The rows of the data set that are asked for, no more of which are read."""
        datasets = need("datasets", "tinyfusion[text]", "data.dataset")
        name, _, configuration = (self.dataset or "").partition(":")
        number, streamed = 0, {"streaming": self.rows is not None}
        try:
            rows = datasets.load_dataset(name, configuration or None, split=self.split, **streamed)
            for row in islice(rows, self.rows):
                number += 1
                yield row
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as e:
            at = f" after row {number}" if number else ""
            raise UserError(f"data.dataset {self.dataset}: cannot be read{at} ({first_line(e)})") from None
        if self.rows is not None and number < self.rows:
            named = f"the {self.split} split of {self.dataset}"
            raise UserError(f"data.rows is {self.rows}: {named} has {number}; give fewer")

    def _plain(self, path: Path) -> Iterator[Document]:
        """The document of a file of text."""
        yield Document("".join(lines(path)).strip())

    def _fields(self, rows: Iterable[tuple[int, Any]], where: str) -> Iterator[Document]:
        """The documents of rows with fields, which are numbered."""
        for number, row in rows:
            yield Document(self._text(row, self.text_field, f"{where}: row {number}"))

    def _text(self, row: Any, name: str, where: str, empty: bool = True) -> str:
        """A text of a row."""
        return text_of(row, name, where, self._fields_for(row), empty)

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
    def _fields(self, rows: Iterable[tuple[int, Any]], where: str) -> Iterator[Document]:
        for number, row in rows:
            place = f"{where}: row {number}"
            if self.chat_field is not None:
                turns = row.get(self.chat_field) if isinstance(row, dict) else None
                yield Document(messages=check_messages(turns, f"{place}: '{self.chat_field}'"), where=place)
            else:
                text = self._text(row, self.text_field, place)
                prompt = self._text(row, self.prompt_field, place) if self.prompt_field and text.strip() else ""
                yield Document(text, prompt)

    @override
    def _fields_for(self, row: Any) -> str:
        chat = isinstance(row, dict) and isinstance(row.get("messages"), list)
        return "data.chat_field: messages" if chat else "data.text_field or data.prompt_field"


def _told(documents: Iterator[Document], tokenizer: Any) -> Iterator[Document]:
    """The documents that are not empty; warns in the end how many are, and how many spell special tokens."""
    special, num_empty, spelled = special_of(tokenizer), 0, list[str]()
    for document in documents:
        if not document.messages and not document.text.strip():
            num_empty += 1
            continue
        found = special.search(document.text) or special.search(document.prompt)
        spelled += [found[0]] if found else []
        yield document
    if num_empty:
        warnings.warn(f"data: {num_empty} documents are empty and left out", stacklevel=2)
    if spelled:
        warnings.warn(
            f"data: {len(spelled)} documents hold what is spelled like a special token, such as '{spelled[0]}'; it is "
            "read as text. Conversations, which a chat template writes, are data.chat_field",
            stacklevel=2,
        )
