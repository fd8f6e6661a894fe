"""Encodes many examples to the shards of a folder, with any number of processes; it can be interrupted and resumed."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, TypedDict

import torch
from torch import Tensor

from ..errors import Interrupted, UserError
from ..parsing.records import read_as
from ..runtime.distributed import all_gather_object, batches, local_share, on_main_process, rank_and_world_size
from ..runtime.files import check_space, digest, write_json
from ..runtime.locking import FolderKind, check_free, owned
from ..runtime.progress import track
from ..runtime.signals import stop_requests
from .shards import METADATA, Shard, read_metadata, read_shard, shards_in, write_shard

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
"""In which shards may hold numbers, by name."""


def folder_kind(holds: str, mark: str, *others: str) -> FolderKind:
    """Return how the folders of an encoding are told from others.

    Args:
        holds: what is in them, for messages.
        mark: entry of metadata.json that no other such folder has.
        others: names of files that the encoding writes beside the shards.
    """

    def is_ours(out: Path) -> bool:
        return (out / METADATA).exists() and mark in read_metadata(str(out))

    def writes(out: Path, path: Path) -> bool:
        names = (METADATA, *others)
        return str(path) in names or re.fullmatch(r"\d+-of-\d+\.(safetensors|json)", str(path)) is not None

    return FolderKind(holds, "--out", is_ours, writes)


class _Entry(TypedDict):
    name: str
    count: int
    sha256: str
    skipped: list[str]


@dataclass(frozen=True)
class Record:
    """A finished shard, and the names of the examples that could not be read for it."""

    shard: Shard
    skipped: list[str]

    @staticmethod
    def read(path: Path) -> Record:
        """Read a record.

        Raises:
            UserError: it is damaged.
        """
        found = read_as(path, _Entry, "delete it to make that shard again")
        return Record(Shard(found["name"], found["count"], found["sha256"]), found["skipped"])


@dataclass(frozen=True)
class Part:
    """The examples of one shard, by index."""

    name: str
    items: list[int]


@dataclass
class Encoding(ABC):
    """Examples that are encoded to the shards of a folder.

    Each process makes its share of the shards. A shard is written beside and renamed, and its hash recorded; one that
    is finished is verified, and not made again. Only when all are verified does metadata.json list them.

    Args:
        out: the folder.
        shard_size: examples in a shard.
        batch_size: examples encoded at once.
    """

    command: ClassVar[str]
    """The command, for messages."""
    kind: ClassVar[FolderKind]
    """What the folder is."""

    out: Path
    shard_size: int
    batch_size: int

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Everything that the shards depend on, as in metadata.json; with `dtype`, a key of `DTYPES`."""

    @property
    @abstractmethod
    def order(self) -> list[int]:
        """The examples by index, in the order of their rows."""

    @abstractmethod
    def bytes_per_example(self) -> int:
        """Return about how many bytes an example takes in a shard."""

    @abstractmethod
    def encode(self, batches: Sequence[list[int]]) -> Iterator[tuple[dict[str, Tensor], list[str]]]:
        """Encode batches of examples, given by index.

        Yields:
            For each batch tensors by name, each (rows, ...), and the names of those that were left out; no tensors if
            all were.
        """

    @abstractmethod
    def fault(self, items: Sequence[int], skipped: Sequence[str], tensors: Mapping[str, Tensor]) -> str:
        """Return what is wrong with a shard; empty if nothing.

        Args:
            items: the examples that were given for it, by index.
            skipped: names of those that were left out.
            tensors: what it holds by name, each (rows, ...).
        """

    @abstractmethod
    def summary(self, records: Sequence[Record]) -> dict[str, Any]:
        """Return what metadata.json says of finished shards beside `settings` and `shards`."""

    def finish(self, records: Sequence[Record]) -> None:
        """Write what belongs to the finished shards, on the main process."""

    def run(self) -> dict[str, Any]:
        """Encode what is not encoded yet. A collective call.

        Returns:
            The content of metadata.json.

        Raises:
            UserError: the folder is in use or holds something else, the disk is too small, or a shard is damaged.
            Interrupted: a signal arrived; finished shards are kept.
        """
        if len(set(all_gather_object(digest(self.settings)))) > 1:
            raise UserError(
                f"{self.command}: the processes would make different {self.kind.holds}; compare their disks: the "
                "inputs, or the networks, differ"
            )
        with ExitStack() as stack:
            on_main_process(lambda: self._take(stack))
            return self._make()

    def _take(self, stack: ExitStack) -> None:
        """Reserve the folder, until the stack closes."""
        check_free(self.out, self.kind)
        if (self.out / METADATA).exists():
            before = read_metadata(str(self.out))
            if changed := [key for key, value in self.settings.items() if before.get(key) != value]:
                what = "; ".join(f"{key}: {before.get(key)!r}, now {self.settings[key]!r}"[:200] for key in changed)
                raise UserError(
                    f"{self.out}: holds {self.kind.holds} that were made otherwise ({what}); choose another folder"
                )
        stack.enter_context(owned(self.out, self.kind))
        num, each = len(self.order), self.bytes_per_example()
        what = f"{self.command}: takes {num * each / 1e9:,.3g} GB, {each:,} bytes for each of {num:,} examples"
        check_space(self.out, num * each, what, "take fewer, or a smaller --dtype, or choose another disk")
        if not (self.out / METADATA).exists():
            write_json(self.out / METADATA, {**self.settings, "shards": []})

    def _make(self) -> dict[str, Any]:
        """Make the missing shards of this process. Returns the metadata of all shards."""
        mine = local_share(self._parts)
        finished = {part.name: found for part in mine if isinstance(found := self._verified(part), Record)}
        missing = [part for part in mine if part.name not in finished]
        self._encode(missing)
        for part in missing:
            found = self._verified(part)
            if not isinstance(found, Record):
                raise UserError(
                    f"{self.out / part.name}: not what was written a moment ago: {found}. Is the disk sound?"
                )
            finished[part.name] = found
        # One that fails does not wait here for the others, whose shares may take hours: torchrun ends them.
        records = sorted(chain(*all_gather_object(list(finished.values()))), key=lambda record: record.shard.name)
        content = {**self.settings, **self.summary(records), "shards": [asdict(r.shard) for r in records]}
        on_main_process(lambda: self._finish(records, content))
        return content

    def _finish(self, records: Sequence[Record], content: dict[str, Any]) -> None:
        self.finish(records)
        write_json(self.out / METADATA, content)
        for part in self._parts:
            self._record_path(part).unlink(missing_ok=True)

    @cached_property
    def _parts(self) -> list[Part]:
        order = self.order
        ranges = batches(len(order), self.shard_size)
        names = (f"{i:05d}-of-{len(ranges):05d}.safetensors" for i in range(len(ranges)))
        return [Part(name, order[rows.start : rows.stop]) for name, rows in zip(names, ranges, strict=True)]

    def _encode(self, parts: Sequence[Part]) -> None:
        """Make these shards."""
        size, total = self.batch_size, sum(len(part.items) for part in parts)
        pieces = [[part.items[rows.start : rows.stop] for rows in batches(len(part.items), size)] for part in parts]
        made = self.encode(list(chain(*pieces)))
        with stop_requests() as stop, track(self.command, total, main=rank_and_world_size()[0] == 0) as progress:
            for number, part in enumerate(parts):
                rows: list[dict[str, Tensor]] = []
                left_out: list[str] = []
                for items in pieces[number]:
                    tensors, skipped = next(made)
                    left_out += skipped
                    if tensors:
                        rows.append(tensors)
                    progress.advance(len(items))
                    if stop:
                        raise Interrupted(f"stopped after {number} of {len(parts)} shards", stop[0])
                self._write(part, rows, left_out)

    def _write(self, part: Part, rows: Sequence[dict[str, Tensor]], left_out: list[str]) -> None:
        """Write a shard and its record."""
        if not rows:
            raise UserError(f"{self.command}: none of the {len(left_out)} examples of a shard can be read")
        shard = write_shard(self.out, part.name, {name: torch.cat([some[name] for some in rows]) for name in rows[0]})
        write_json(self._record_path(part), {**asdict(shard), "skipped": left_out})

    def _verified(self, part: Part) -> Record | str:
        """The record of a shard whose file is correct; else what is wrong."""
        record = self._known.get(part.name)
        if record is None and self._record_path(part).exists():
            record = Record.read(self._record_path(part))
        if record is None:
            return "nothing is known of it"
        try:
            tensors = read_shard(str(self.out), record.shard)
        except UserError as e:
            return str(e)
        if wrong := self.fault(part.items, record.skipped, tensors):
            return wrong
        if any(t.is_floating_point() and not torch.isfinite(t).all() for t in tensors.values()):
            return f"{self.kind.holds} that are not finite; does {self.settings['dtype']} hold them?"
        return record

    @cached_property
    def _known(self) -> dict[str, Record]:
        """The shards listed by a finished encoding."""
        found = read_metadata(str(self.out))
        shards = shards_in(found, str(self.out)) if found.get("shards") else []
        return {shard.name: Record(shard, found.get("skipped", [])) for shard in shards}

    def _record_path(self, part: Part) -> Path:
        """Where a finished shard's hash is kept until all are finished."""
        return (self.out / part.name).with_suffix(".json")
