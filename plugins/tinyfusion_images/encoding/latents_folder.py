"""How a folder of latents is told from other folders, and the records in it while it is made."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from tinyfusion_core.dataloading.shards import METADATA, Shard, read_metadata
from tinyfusion_core.parsing.records import read_as
from tinyfusion_core.runtime.locking import FolderKind


def _is_ours(out: Path) -> bool:
    """Whether a folder has the metadata of latents. Raises UserError if they are of another format."""
    return (out / METADATA).exists() and "vae_sha256" in read_metadata(str(out))


def _writes(out: Path, path: Path) -> bool:
    """Whether an encoding writes this file, given relative to its folder."""
    return str(path) == METADATA or re.fullmatch(r"\d+-of-\d+\.(safetensors|json)", str(path)) is not None


class _Entry(TypedDict):
    name: str
    count: int
    sha256: str
    skipped: list[str]


@dataclass(frozen=True)
class Record:
    """A finished shard, and the images that could not be read for it."""

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


LATENTS = FolderKind("latents", "--out", _is_ours, _writes)
