"""Files of text: found, and read without putting up with any damage."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tinyfusion_core.errors import MissingFileError, UserError, first_line, need

KINDS = (".txt", ".md", ".jsonl", ".parquet")


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
