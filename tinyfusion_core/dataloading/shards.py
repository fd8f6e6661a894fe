"""Samples in sharded safetensors files, in a folder or behind any URL that fsspec knows, read one shard at a time."""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ..errors import MissingFileError, UserError
from ..parsing.records import check_inside, check_regular, parse_json, shaped
from ..runtime.files import write_atomic
from .read_ahead import ReadAhead

FORMAT_VERSION = 1
METADATA = "metadata.json"


@dataclass(frozen=True)
class Shard:
    """One file.

    Attributes:
        name: name of the file in its folder.
        count: number of rows of each of its tensors.
        sha256: SHA-256 of the file, as hex.
    """

    name: str
    count: int
    sha256: str


class _Metadata(TypedDict):
    """What is in a metadata.json; of arrays it may say no more than its version."""

    vae: NotRequired[str | None]
    scale: NotRequired[float | None]
    shift: NotRequired[float]
    kind: NotRequired[str]
    flips: NotRequired[bool]
    num_images: NotRequired[int]
    skipped: NotRequired[list[str]]
    shards: NotRequired[list[Any]]


class _Listing(TypedDict):
    shards: list[Shard]


@dataclass(frozen=True)
class ShardedSamples:
    """Consecutive rows in the shards of a folder; see `data.Sharded`.

    It keeps the shards of the last batch in memory, at most two for each of the `mix`, and what was read ahead.

    Args:
        url: the folder.
        shards: all files, in the order of their rows.
        first: the first row that belongs to these samples.
        end: one past the last row.
        mix: how many shards a batch is drawn from.
    """

    url: str
    shards: Sequence[Shard]
    first: int
    end: int
    mix: int
    _loaded: dict[int, dict[str, Tensor]] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return self.end - self.first

    @property
    def sizes(self) -> list[int]:
        """Number of these samples in each shard; 0 for shards outside [first, end)."""
        ends = self._ends
        return [
            max(0, min(end, self.end) - max(end - shard.count, self.first))
            for end, shard in zip(ends, self.shards, strict=True)
        ]

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """Return the tensors of these samples by name, each (rows, ...); floating-point ones as float32.

        Raises:
            UserError: a shard is missing, truncated or changed; names it.
            IndexError: an index is out of range.
        """
        if indices and not 0 <= min(indices) <= max(indices) < len(self):
            raise IndexError(f"sample index out of range, there are {len(self)}")
        wanted: dict[int, tuple[list[int], list[int]]] = {}
        for place, index in enumerate(indices):
            shard, row = self._place(index)
            places, rows = wanted.setdefault(shard, ([], []))
            places.append(place)
            rows.append(row)
        out: dict[str, Tensor] = {}
        kept: dict[int, dict[str, Tensor]] = {}
        for shard, (places, rows) in wanted.items():
            tensors = self._loaded.pop(shard, None) or self._ahead.take(shard)
            if len(kept) < 2 * self.mix:
                kept[shard] = tensors
            for name, tensor in tensors.items():
                found = tensor[rows]
                if name not in out:
                    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
                    out[name] = torch.empty(len(indices), *tensor.shape[1:], dtype=dtype)
                out[name][places] = found.to(out[name].dtype)
        self._loaded.clear()
        self._loaded.update(kept)
        return out

    def prefetch(self, indices: Sequence[int]) -> None:
        """Begin to read the shards of these samples; at most `mix` shards are on their way."""
        for shard in {self._place(index)[0]: None for index in indices}:
            if shard not in self._loaded:
                self._ahead.begin(shard)

    def extremes(self, name: str) -> Sequence[tuple[int, str]]:
        """Return nothing: a column is known when its shards have been read."""
        return []

    def where(self, name: str, index: int) -> str:
        """Return the shard of a sample, and the row in it."""
        shard, row = self._place(index)
        return f"{self.url}/{self.shards[shard].name} (row {row})"

    def _place(self, index: int) -> tuple[int, int]:
        """The shard of a sample, and its row in it."""
        row = self.first + index
        shard = bisect.bisect_right(self._ends, row)
        return shard, row - self._ends[shard] + self.shards[shard].count

    def _read(self, shard: int) -> dict[str, Tensor]:
        return read_shard(self.url, self.shards[shard])

    @cached_property
    def _ahead(self) -> ReadAhead[dict[str, Tensor]]:
        return ReadAhead(self._read, self.mix)

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(shard.count for shard in self.shards))


def read_shard(url: str, shard: Shard) -> dict[str, Tensor]:
    """Read the tensors of a shard, each (rows, ...), by name.

    Raises:
        UserError: it is missing, truncated, or was changed after it was written.
    """
    content = read_bytes(url, shard.name)
    if hashlib.sha256(content).hexdigest() != shard.sha256:
        raise UserError(
            f"{url}/{shard.name}: cut short, damaged or replaced (its sha256 is not the one in {METADATA}). Copy it "
            "again, or run the command that made it, which makes damaged shards anew"
        )
    try:
        tensors: dict[str, Tensor] = load(content)
    except SafetensorError as e:
        raise UserError(f"{url}/{shard.name}: not a safetensors file ({e})") from None
    if bad := [name for name, tensor in sorted(tensors.items()) if tensor.shape[:1] != (shard.count,)]:
        raise UserError(f"{url}/{shard.name}: '{bad[0]}' does not have the {shard.count} rows that {METADATA} says")
    return tensors


def write_shard(folder: Path, name: str, tensors: Mapping[str, Tensor]) -> Shard:
    """Write a shard atomically.

    Args:
        folder: where to.
        name: name of the file.
        tensors: by name, each (rows, ...).

    Raises:
        UserError: the file cannot be written.
    """
    content = save({key: tensor.contiguous() for key, tensor in tensors.items()})
    write_atomic(folder / name, lambda file: file.write(content))
    return Shard(name, len(next(iter(tensors.values()))), hashlib.sha256(content).hexdigest())


def shards_in(metadata: dict[str, Any], url: str) -> list[Shard]:
    """Return the shards that a metadata.json lists.

    Raises:
        UserError: it lists none, or their entries are incomplete.
    """
    if not metadata["shards"]:
        raise UserError(f"{url}/{METADATA}: lists no shards; let the command that makes them finish")
    found = shaped(metadata, _Listing, f"{url}/{METADATA}", "run the command that made it again")["shards"]
    check_inside([shard.name for shard in found], Path(url) / METADATA)
    if bad := [shard.name for shard in found if shard.count < 1]:
        raise UserError(f"{url}/{METADATA}: {bad[0]!r} has no rows; run the command that made it again")
    return found


def read_metadata(url: str) -> dict[str, Any]:
    """Read the metadata.json of a folder.

    Raises:
        UserError: there is none, or it has another format.
    """
    try:
        content = parse_json(read_bytes(url, METADATA))
    except ValueError as e:
        raise UserError(f"{url}/{METADATA}: not readable as JSON ({e})") from None
    if not isinstance(content, dict) or content.get("format_version") != FORMAT_VERSION:
        found = content.get("format_version") if isinstance(content, dict) else type(content).__name__
        raise UserError(f"{url}/{METADATA}: format_version is {found!r:.60}, expected {FORMAT_VERSION}")
    return dict(shaped(content, _Metadata, f"{url}/{METADATA}", "make the folder again, or mend the entry"))


def read_bytes(url: str, name: str) -> bytes:
    """Read a file of a folder, local or behind a URL.

    Raises:
        MissingFileError: there is no such file.
        UserError: it cannot be read, or no installed package supports the protocol of the URL.
    """
    from fsspec.core import url_to_fs
    from fsspec.implementations.local import LocalFileSystem

    path = f"{url.rstrip('/')}/{name}"
    try:
        # Looked up anew: connections do not survive the fork of a data loader's workers, and fsspec keeps them.
        files, inside = url_to_fs(path)
        if isinstance(files, LocalFileSystem):
            check_regular(Path(inside))
        content: bytes = files.cat_file(inside)
    except UserError:
        raise
    except FileNotFoundError:
        raise MissingFileError(f"{path}: no such file") from None
    except Exception as e:  # every protocol fails in a way of its own
        raise UserError(f"{path}: cannot be read ({type(e).__name__}: {e})") from None
    return content
