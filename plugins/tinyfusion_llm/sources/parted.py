"""Data sources some of whose texts are held out: what all have in common, and those whose rows name other files."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from typing_extensions import override

from tinyfusion_core.errors import MissingFileError, UserError, require
from tinyfusion_core.parsing.records import check_regular
from tinyfusion_core.protocols.data import DataSource, Samples
from tinyfusion_core.runtime.seeding import generator
from tinyfusion_llm.documents import Row, json_rows
from tinyfusion_llm.pretrained.readers import load_processor


@dataclass(frozen=True, kw_only=True)
class PartedSource(DataSource):
    """Texts as samples of so many tokens, some of which are held out.

    Args:
        context: tokens per sample.
        held_out_fraction: fraction of the rows that no stage trains on.
        held_out_files: rows to hold out, instead of a fraction of `files`.
        max_held_out: largest number of samples to evaluate on, the first in the held-out rows' order; null takes all.
        seed: seed of the choice and the order of the rows.
    """

    context: int = 512
    held_out_fraction: float = 0.1
    held_out_files: list[str] | None = None
    max_held_out: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        fraction, most = self.held_out_fraction, self.max_held_out
        require(self.context >= 2, "data.context", self.context, "at least 2 tokens")
        require(0 < fraction < 1, "data.held_out_fraction", fraction, "a number between 0 and 1")
        require(most is None or most >= 1, "data.max_held_out", most, "at least 1 row, or null")

    @override
    def train(self) -> Samples:
        return self._parts[0]

    @override
    def held_out(self) -> Samples:
        return self._parts[1]

    @cached_property
    @abstractmethod
    def _parts(self) -> tuple[Samples, Samples]:
        """What to train on, and what to hold out."""

    def _apart(self, num: int, order: str, named: str) -> tuple[list[int], list[int]]:
        """Indices of all rows of `files`, in an order of this name, and of those among them to hold out."""
        mixed: list[int] = torch.randperm(num, generator=generator(self.seed, order)).tolist()
        if self.held_out_files is not None:
            return mixed, []
        if num < 2:
            raise UserError(f"{named}; give more of them, or held_out_files")
        most = min(num - 1, max(1, round(self.held_out_fraction * num)))
        return mixed[most:], mixed[:most]


@dataclass(frozen=True, kw_only=True)
class RowSource(PartedSource):
    """Rows of JSONL files that name other files beside a text, read by the processor of a model.

    Args:
        processor: folder or hub id of a model that has one.
        files: `.jsonl` files, and folders that are searched for them.
        text_field: key of the text.
    """

    #: What the processor reads beside texts, what rows should hold, and the name of their order, which is a seed.
    reads: ClassVar[Literal["images", "audio"]]
    holding: ClassVar[str]
    order: ClassVar[str]

    processor: str
    files: list[str]
    text_field: str = "text"

    @cached_property
    @override
    def _parts(self) -> tuple[Samples, Samples]:
        processor, held_out = self._processor(), self.held_out_files
        rows = self._examples(processor, json_rows(self.files, self.holding, "data.files"))
        train, kept = self._apart(len(rows), self.order, "data.files: they hold one row")
        others = [rows[i] for i in kept]
        if held_out is not None:
            others = self._examples(processor, json_rows(held_out, self.holding, "data.held_out_files"))
        parts = [rows[i] for i in train], others[: self.max_held_out]
        first, second = (self._samples(processor, part) for part in parts)
        return first, second

    def _processor(self) -> Any:
        return load_processor(self.processor, None, reads=self.reads)

    @abstractmethod
    def _examples(self, processor: Any, rows: Iterable[Row]) -> list[Any]:
        """What rows hold, checked."""

    @abstractmethod
    def _samples(self, processor: Any, examples: Sequence[Any]) -> Samples:
        """The samples of some of them."""


def file_beside(row: Row, name: str, what: str) -> Path:
    """Return a file that a row names.

    Args:
        row: the row.
        name: the file, relative to the row's.
        what: what it should be, for the message.

    Raises:
        UserError: it is missing, or no file.
    """
    path = row.file.parent / name
    try:
        check_regular(path)
    except MissingFileError:
        raise MissingFileError(f"{row.where}: no {what} {path}; files are looked for beside the JSONL file") from None
    except UserError as e:
        raise UserError(f"{row.where}: {e}") from None
    return path
