"""Text as samples of tokens: tokenized once, cached in memory-mapped files, in a seeded order."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from typing_extensions import override

from tinyfusion_core.errors import UserError, require
from tinyfusion_core.protocols.data import DataSource
from tinyfusion_core.runtime.files import digest, sha256
from tinyfusion_core.runtime.seeding import generator
from tinyfusion_llm.documents import check_text, find_files, json_lines, lines, parquet_rows
from tinyfusion_llm.optional import need
from tinyfusion_llm.pretrained import load_tokenizer
from tinyfusion_llm.rows import Corpus, Rows

READING = 2
"""Version of how files become documents; caches of another are made anew."""


@dataclass(frozen=True, kw_only=True)
class TextTokens(DataSource):
    """Documents as samples of T = `context` tokens: `tokens` (T,), and `labels` (T,) with -100 where no loss counts.

    A document is a text file, a line of a JSONL file (both in UTF-8), or a row of a Parquet file or of a data set of
    the library `datasets`. Each ends with the tokenizer's end-of-text token. Documents are held out whole.

    Args:
        tokenizer: folder or hub id of a model that has one.
        gguf_file: name of a GGUF file in it that holds the tokenizer.
        files: `.txt`, `.md`, `.jsonl` and `.parquet` files, and folders that are searched for them.
        dataset: instead of files: an argument of `datasets.load_dataset`, a name or `name:configuration`.
        split: split of the data set.
        text_field: key or column of the text.
        prompt_field: key or column of a prompt, which precedes the text and is not counted in any loss.
        context: tokens per sample.
        pack: cut samples from all documents in a seeded order, one after the other: nothing is padded, and a sample may
            contain the end of the previous document. false gives every document samples of its own, padded at the end.
        held_out_fraction: fraction of the documents that no stage trains on.
        held_out_files: documents to hold out, instead of a fraction of `files`.
        max_held_out: largest number of samples to evaluate on, the first in the held-out documents' order; null takes
            all.
        seed: seed of the choice and the order of the documents.
        cache: folder of the token cache; by default `tinyfusion/tokens` in the user's cache.
    """

    tokenizer: str
    gguf_file: str | None = None
    files: list[str] | None = None
    dataset: str | None = None
    split: str = "train"
    text_field: str = "text"
    prompt_field: str | None = None
    context: int = 512
    pack: bool = True
    held_out_fraction: float = 0.1
    held_out_files: list[str] | None = None
    max_held_out: int | None = None
    seed: int = 0
    cache: str | None = None

    def __post_init__(self) -> None:
        if (self.files is None) == (self.dataset is None):
            raise UserError("data: give files or dataset, one of the two")
        require(self.context >= 2, "data.context", self.context, "at least 2 tokens")
        fraction, most = self.held_out_fraction, self.max_held_out
        require(0 < fraction < 1, "data.held_out_fraction", fraction, "a number between 0 and 1")
        require(most is None or most >= 1, "data.max_held_out", most, "at least 1 row, or null")

    @override
    def train(self) -> Rows:
        return self._parts[0]

    @override
    def held_out(self) -> Rows:
        return self._parts[1]

    @cached_property
    def _parts(self) -> tuple[Rows, Rows]:
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

    def _rows(self, corpus: Corpus, documents: Any, part: str) -> Rows:
        starts, ends = corpus.bounds[documents], corpus.bounds[documents + 1]
        if not self.pack:
            size = self.context
            cuts = [(a, min(a + size, e)) for s, e in zip(starts, ends, strict=True) for a in range(s, e, size)]
            # One token alone predicts nothing.
            starts, ends = np.array([c for c in cuts if c[1] - c[0] > 1], dtype=np.int64).reshape(-1, 2).T
        most = self.max_held_out if part == "held out" else None
        rows = Rows(corpus, starts, ends - starts, self.context, self.pack, most)
        if not len(rows):
            raise UserError(
                f"data: the {len(documents)} documents to {part.replace('held out', 'hold out')} have "
                f"{int((ends - starts).sum())} tokens, fewer than a row of data.context {self.context}; "
                "give more text, or a shorter context (backbone.context must be the same)"
            )
        return rows

    def _corpus(self, files: Sequence[str] | None) -> Corpus:
        """The tokens of some files or of the data set, from the cache if possible."""
        found = None if files is None else find_files(files)
        tokenizer = load_tokenizer(self.tokenizer, None, self.gguf_file)
        if found is None:
            of: Any = [self.dataset, self.split]
        else:
            of = {str(path): sha256(path) for path in found}
        key = digest([of, self.text_field, self.prompt_field, _identity(tokenizer), READING])[:32]
        base = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "tinyfusion", "tokens")
        folder = Path(self.cache or base).expanduser() / key
        if not folder.is_dir():
            self._tokenise(tokenizer, self._documents(found), folder)
        bounds = np.fromfile(folder / "bounds", dtype=np.int64)
        if len(bounds) < 2:
            raise UserError(f"data: {self._named} holds no text")
        counted = None if self.prompt_field is None else np.memmap(folder / "counted", dtype=np.uint8, mode="r")
        tokens = np.memmap(folder / "tokens", dtype=np.uint32, mode="r")
        largest = int(np.fromfile(folder / "largest", dtype=np.int64)[0])
        name = f"{self.dataset or ', '.join(files or [])} with the data.tokenizer {self.tokenizer}"
        return Corpus(tokens, counted, bounds, _filler(tokenizer), largest, name)

    def _tokenise(self, tokenizer: Any, documents: Iterator[tuple[str, str]], folder: Path) -> None:
        """Write tokens, which of them count, and where documents begin; the folder appears when it is complete."""
        end, bounds, largest = tokenizer.eos_token_id, [0], 0
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".making"))
        try:
            with (made / "tokens").open("wb") as tokens, (made / "counted").open("wb") as counted:
                while some := list(islice(documents, 64)):
                    prompts = _encode(tokenizer, [prompt for prompt, _ in some], special=True)
                    texts = _encode(tokenizer, [text for _, text in some], special=self.prompt_field is None)
                    for prompt, text in zip(prompts if self.prompt_field else [[]] * len(some), texts, strict=True):
                        text = [*text, *([end] if end is not None and text[-1:] != [end] else [])]
                        _write(tokens, [*prompt, *text], np.uint32)
                        _write(counted, [0] * len(prompt) + [1] * len(text), np.uint8)
                        largest = max(largest, *prompt, *text)
                        bounds.append(bounds[-1] + len(prompt) + len(text))
            with (made / "bounds").open("wb") as file:
                _write(file, bounds, np.int64)
            with (made / "largest").open("wb") as file:
                _write(file, [largest], np.int64)
            made.chmod(0o755)
            if not folder.is_dir():  # another process may have been faster
                made.rename(folder)
        except OSError as e:
            if not folder.is_dir():
                raise UserError(
                    f"data.cache: {folder.parent} cannot be written ({e}); free space or name another"
                ) from e
        finally:
            shutil.rmtree(made, ignore_errors=True)

    def _documents(self, files: Sequence[Path] | None) -> Iterator[tuple[str, str]]:
        """Prompt and text of every non-empty document."""
        if files is None:
            datasets = need("datasets", "datasets", "data.dataset")
            name, _, configuration = (self.dataset or "").partition(":")
            rows = datasets.load_dataset(name, configuration or None, split=self.split)
            yield from self._fields(rows, f"data.dataset {self.dataset}")
        for path in files or []:
            if path.suffix == ".parquet":
                yield from self._fields(parquet_rows(path), str(path))
            elif path.suffix == ".jsonl":
                yield from self._fields(json_lines(path), str(path))
            elif text := "".join(lines(path)).strip():
                yield "", text

    def _fields(self, rows: Any, where: str) -> Iterator[tuple[str, str]]:
        for number, row in enumerate(rows, 1):
            for field in filter(None, (self.text_field, self.prompt_field)):
                if not isinstance(row, dict) or not isinstance(row.get(field), str):
                    found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
                    advice = "set data.text_field or data.prompt_field"
                    if isinstance(row, dict) and isinstance(row.get("messages"), list):
                        advice = "a chat is no text yet: write what the tokenizer's apply_chat_template makes of it"
                    raise UserError(f"{where}: row {number} has no text '{field}' (found: {found}); {advice}")
                check_text(row[field], f"{where}: row {number}: '{field}'")
            if row[self.text_field].strip():
                yield row[self.prompt_field] if self.prompt_field else "", row[self.text_field]


def _encode(tokenizer: Any, texts: Sequence[str], special: bool) -> list[list[int]]:
    encoded: list[list[int]] = tokenizer(list(texts), add_special_tokens=special, verbose=False)["input_ids"]
    return encoded


def _identity(tokenizer: Any) -> str:
    fast = getattr(tokenizer, "backend_tokenizer", None)
    return digest([fast.to_str() if fast is not None else tokenizer.get_vocab(), tokenizer.eos_token_id])


def _filler(tokenizer: Any) -> int:
    numbers = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(number for number in numbers if number is not None)


def _write(file: BinaryIO, numbers: Sequence[int], kind: Any) -> None:
    file.write(np.asarray(numbers, dtype=kind).tobytes())
