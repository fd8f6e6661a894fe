"""Files of text: found, and read without putting up with any damage."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from tinyfusion_core.errors import MissingFileError, UserError, first_line, need, require
from tinyfusion_core.runtime.seeding import generator

KINDS = (".txt", ".md", ".jsonl", ".parquet")
T = TypeVar("T")


class Row(NamedTuple):
    """A row of a JSONL file.

    Attributes:
        values: what it holds; empty if it is no mapping.
        file: the file, beside which others that it names are looked for.
        where: the row, for messages.
    """

    values: Mapping[str, Any]
    file: Path
    where: str


def find_files(names: Sequence[str]) -> list[Path]:
    """Return the files, searching folders.

    Raises:
        UserError: one is missing, or a folder holds no text.
    """
    found: list[Path] = []
    for name in names:
        path = Path(name)
        if not path.exists():
            raise MissingFileError(f"data.files: no {path}; give {', '.join(KINDS)} files or a folder of them")
        inside = sorted(p for p in path.rglob("*") if p.suffix in KINDS) if path.is_dir() else [path]
        if not inside:
            raise UserError(f"data.files: {path} holds no {', '.join(KINDS)} file")
        found += inside
    return found


def lines(path: Path) -> Iterator[str]:
    """Yield the lines of a text file in UTF-8, each with its line feed. A byte order mark is left out.

    Raises:
        UserError: it is not UTF-8, or not text; names the first byte that shows it.
    """
    position = 0
    try:
        with path.open("rb") as file:
            for line in file:
                yield from io.StringIO(_decoded(path, line, position), newline=None)  # old line breaks too
                position += len(line)
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror or e})") from None


def json_lines(path: Path) -> Iterator[Any]:
    """Yield the values of a JSONL file.

    Raises:
        UserError: it is not UTF-8, or a line is no JSON.
    """
    for number, line in enumerate(lines(path), 1):
        try:
            yield json.loads(line)
        except (ValueError, RecursionError) as e:
            raise UserError(f"{path}: line {number} is no JSON ({e})") from None


def json_rows(names: Sequence[str], holding: str) -> Iterator[Row]:
    """Yield the rows of JSONL files.

    Args:
        names: the files, and folders that are searched for them.
        holding: what rows should hold, for messages.

    Raises:
        UserError: there is no row, or `json_lines` refuses a file.
    """
    empty = True
    for path in (path for path in find_files(names) if path.suffix == ".jsonl"):
        for number, values in enumerate(json_lines(path), 1):
            empty = False
            yield Row(values if isinstance(values, dict) else {}, path, f"{path}: row {number}")
    if empty:
        raise UserError(f"data.files: no row of a .jsonl file in {', '.join(names)}; give rows with {holding}")


def check_held_out(fraction: float, most: int | None) -> None:
    """Check what a data source is told of the rows to hold out.

    Args:
        fraction: its option `held_out_fraction`.
        most: its option `max_held_out`.

    Raises:
        UserError: one is out of its range.
    """
    require(0 < fraction < 1, "data.held_out_fraction", fraction, "a number between 0 and 1")
    require(most is None or most >= 1, "data.max_held_out", most, "at least 1 row, or null")


def held_apart(
    rows: Sequence[T], held_out: Sequence[T] | None, fraction: float, most: int | None, order: tuple[int, str]
) -> tuple[list[T], list[T]]:
    """Return rows to train on, mixed, and rows to hold out.

    Args:
        rows: all rows of `data.files`, at least one.
        held_out: further rows to hold out; None takes a fraction of the others instead.
        fraction: this fraction.
        most: the first so many are held out; None takes all.
        order: seed and name of the order.

    Raises:
        UserError: there is but one row to be both.
    """
    mixed = [rows[i] for i in torch.randperm(len(rows), generator=generator(*order)).tolist()]
    if held_out is None:
        if len(mixed) < 2:
            raise UserError("data.files: they hold one row; give more, or held_out_files")
        num = min(len(mixed) - 1, max(1, round(fraction * len(mixed))))
        held_out, mixed = mixed[:num], mixed[num:]
    return mixed, list(held_out[:most])


def parquet_rows(path: Path) -> Iterator[Any]:
    """Yield the rows of a Parquet file.

    Raises:
        UserError: it is damaged, or no Parquet file.
    """
    parquet, arrow = (need(name, "tinyfusion[text]", f"data.files: {path}") for name in ("pyarrow.parquet", "pyarrow"))
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except (OSError, ValueError, arrow.ArrowException) as e:
        raise UserError(f"{path}: damaged, cut short or not a Parquet file ({first_line(e)}); copy it again") from None


def check_text(text: str, where: str) -> None:
    """Check that a text can be written as UTF-8.

    Args:
        text: the text.
        where: where it stands, to begin the message with.

    Raises:
        UserError: it has half of a surrogate pair, which JSON can spell and no text can hold.
    """
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise UserError(
            f"{where} holds half of a character, {text[e.start]!r}, at character {e.start}; it was cut there when it "
            "was written: remove it"
        ) from None


def _decoded(path: Path, line: bytes, position: int) -> str:
    """A line that begins at this byte of a file, as text."""
    try:
        text = line.decode()
        wrong = line.find(0)
    except UnicodeDecodeError as e:
        text, wrong = "", e.start
    if wrong >= 0:
        kind = "UTF-16" if 0 in line or (position == 0 and line[:2] in (b"\xff\xfe", b"\xfe\xff")) else "LATIN1"
        raise UserError(
            f"{path}: not text in UTF-8: byte {position + wrong} is {line[wrong]:#04x}. Convert the file, for example "
            f"by `iconv -f {kind} -t UTF-8`, or leave it out of data.files"
        )
    return text.removeprefix("\ufeff") if position == 0 else text
