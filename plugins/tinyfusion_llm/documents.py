"""Files of text: found, and read without putting up with any damage."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tinyfusion_core.errors import MissingFileError, UserError, first_line, need, require

KINDS = (".txt", ".md", ".jsonl", ".parquet")


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


def find_files(names: Sequence[str], key: str = "data.files") -> list[Path]:
    """Return the files, searching folders.

    Args:
        names: files and folders.
        key: the setting that names them, to begin messages with.

    Raises:
        UserError: there are none, one is missing, or a folder holds no text.
    """
    found: list[Path] = []
    require(len(names) > 0, key, names, f"{', '.join(KINDS)} files, or folders of them")
    for name in names:
        path = Path(name)
        if not path.exists():
            raise MissingFileError(f"{key}: no {path}; give {', '.join(KINDS)} files or a folder of them")
        inside = sorted(p for p in path.rglob("*") if p.suffix in KINDS) if path.is_dir() else [path]
        if not inside:
            raise UserError(f"{key}: {path} holds no {', '.join(KINDS)} file")
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


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the numbers of the lines of a JSONL file, from 1, and their values; blank lines are left out.

    Raises:
        UserError: it is not UTF-8, or a line is no JSON.
    """
    for number, line in enumerate(lines(path), 1):
        try:
            if line.strip():
                yield number, json.loads(line)
        except (ValueError, RecursionError) as e:
            raise UserError(f"{path}: line {number} is no JSON ({e})") from None


def json_rows(names: Sequence[str], holding: str, key: str) -> Iterator[Row]:
    """Yield the rows of JSONL files.

    Args:
        names: the files, and folders that are searched for them.
        holding: what rows should hold, for messages.
        key: the setting that names them, to begin messages with.

    Raises:
        UserError: there is no row, or `json_lines` refuses a file.
    """
    empty = True
    for path in (path for path in find_files(names, key) if path.suffix == ".jsonl"):
        for number, values in json_lines(path):
            empty = False
            yield Row(values if isinstance(values, dict) else {}, path, f"{path}: row {number}")
    if empty:
        raise UserError(f"{key}: no row of a .jsonl file in {', '.join(names)}; give rows with {holding}")


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


def text_of(row: Any, name: str, where: str, settings: str, empty: bool = True) -> str:
    """Return a text of a row.

    Args:
        row: what the row holds.
        name: its key or column.
        where: the row, to begin messages with.
        settings: those that say where a row has its texts, for the message.
        empty: whether it may be.

    Raises:
        UserError: there is none of this name, it is no text, or empty though it may not be.
    """
    if not isinstance(row, Mapping) or name not in row:
        found = (", ".join(row) or "nothing") if isinstance(row, Mapping) else type(row).__name__
        raise UserError(f"{where} has no '{name}' (found: {found}); set {settings}")
    text = row[name]
    if not isinstance(text, str):
        raise UserError(f"{where}: '{name}' is {text!r:.60}; expected a text, or set {settings}")
    check_text(text, f"{where}: '{name}'")
    if not empty and not text.strip():
        raise UserError(f"{where}: '{name}' is empty, so nothing would be learned; leave the row out")
    return text


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
