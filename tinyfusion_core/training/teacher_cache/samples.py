"""Reads a cache: training samples together with what the teacher makes of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from ...dataloading.shards import METADATA, Shard, ShardedSamples
from ...errors import MissingFileError, UserError
from ...parsing.records import check_inside, read_as
from ...protocols.backbone import Batch, config_of
from ...protocols.loss import LossAdapter
from ...protocols.task import Task
from ...runtime.files import digest, without_later
from ...runtime.seeding import Rng
from .settings import KIND, PREFIX, FixedDraws, TeacherCache

FORMAT_VERSION = 1
MIX = 8
"""How many shards a batch is drawn from."""
LOOKED_AT = 64
"""How many samples tell one data set from another."""
_WRITE = "`tinyfusion cache-teacher RECIPE` writes it"
_OTHER = {
    "teacher": "of another teacher",
    "data": "on other data, or tokens of another tokenizer",
    "objective": "for another objective",
    "draws": "with other draws",
    "seed": "with other draws",
    "samples": "on other samples",
    "blocks": "without the outputs of these blocks",
    "dtype": "in another dtype",
    "precision": "in another trainer.precision",
}
"""What differs, by the part of the metadata that does."""


class Metadata(TypedDict):
    """What is in the `metadata.json` of a cache."""

    format_version: int
    kind: str
    made_of: dict[str, Any]
    rows_per_shard: int
    shards: list[Shard]


def made_of(cache: TeacherCache, task: Task) -> dict[str, Any]:
    """Return everything that the content of a cache depends on. Of the data, a few samples stand for all."""
    draws = FixedDraws(cache, task)
    step = max(1, len(draws.samples) // LOOKED_AT)
    some = task.train.__getitems__(draws.samples[::step][:LOOKED_AT])
    network = {"class": type(task.backbone).__name__, "config": digest(config_of(task.backbone, task.teacher))[:24]}
    return {
        **settings_made_of(cache, task.loss),
        "teacher": {**network, "weights": _hash(task.teacher.state_dict())},
        "samples": [len(draws.samples), len(task.train)],
        "data": _hash(some),
    }


def _hash(tensors: Mapping[str, Tensor]) -> str:
    """A hash of named tensors of any shape, dtype and device: of all their bits."""
    found = hashlib.sha256()
    for name, t in sorted(tensors.items()):
        found.update(f"{name} {t.dtype} {list(t.shape)}".encode())
        found.update(t.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:24]


def settings_made_of(cache: TeacherCache, loss: LossAdapter) -> dict[str, Any]:
    """Return the part of it that settings say."""
    of = {"draws": cache.draws, "seed": cache.seed, "blocks": sorted({*cache.blocks}), "dtype": cache.dtype}
    return {"objective": _settings(loss), **of}


def _settings(loss: LossAdapter) -> dict[str, str]:
    """The class and options of an objective that can change a training."""
    names: set[str] = {f.name for f in fields(loss)} if is_dataclass(loss) else set()
    options = without_later(type(loss), {name: getattr(loss, name) for name in sorted(names - loss.sampling_options())})
    return {"class": type(loss).__name__, **{name: repr(value) for name, value in options.items()}}


def read_metadata(folder: Path) -> Metadata:
    """Read the metadata of a cache.

    Raises:
        MissingFileError: there is none.
        UserError: it is damaged, or of something else.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"recover.kd.cache.folder: {folder} is no folder; choose another name")
    try:
        found = read_as(folder / METADATA, Metadata, _anew(folder))
    except MissingFileError:
        raise MissingFileError(f"recover.kd.cache.folder: there is no cache in {folder.absolute()}; {_WRITE}") from None
    except UserError as e:
        raise UserError(f"{str(e).removesuffix(f'; {_anew(folder)}')}; {_anew(folder)}") from None
    if found["kind"] != KIND or found["format_version"] != FORMAT_VERSION:
        what = f"{found['kind']!r:.60}, version {found['format_version']}"
        raise UserError(f"{folder / METADATA}: is of {what}; {_anew(folder)}")
    check_inside([shard.name for shard in found["shards"]], folder / METADATA)
    return found


def check_whole(found: Metadata, folder: Path) -> int:
    """Check that a cache is finished and its files are there. Returns the number of its rows.

    Raises:
        MissingFileError: it is not finished, or a file is missing.
        UserError: its files are not in their order.
    """
    samples, draws = found["made_of"].get("samples"), found["made_of"].get("draws")
    rows = samples[0] * draws if isinstance(samples, list) and isinstance(draws, int) else -1
    names = [shard.name for shard in found["shards"]]
    if sum(shard.count for shard in found["shards"]) != rows:
        raise MissingFileError(f"recover.kd.cache.folder: the cache in {folder.absolute()} is not finished; {_WRITE}")
    if names != sorted(set(names)):
        raise UserError(f"{folder / METADATA}: the shards are not in their order; {_anew(folder)}")
    for name in names:
        if not (folder / name).is_file():
            raise MissingFileError(f"{folder / name}: no such file; `tinyfusion cache-teacher RECIPE` makes it anew")
    return rows


def _anew(folder: Path) -> str:
    return f"delete the folder {folder}, and `tinyfusion cache-teacher RECIPE` writes it anew"


def size_of(found: Metadata, folder: Path) -> str:
    """Return how many predictions there are, and how large, in words."""
    rows = sum(shard.count for shard in found["shards"])
    size = sum((folder / shard.name).stat().st_size for shard in found["shards"] if (folder / shard.name).exists())
    return f"{rows:,} predictions of {size / max(1, rows):,.0f} bytes, {size / 1e6:,.3g} MB in all"


def check_made_of(found: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> None:
    """Check that a cache holds what is wanted.

    Args:
        found: what it was made of, as its metadata says.
        wanted: what it should be made of; parts that are not known or do not matter are left out.
        folder: where it is.

    Raises:
        UserError: it does not; names what differs.
    """
    for part, value in wanted.items():
        if found.get(part) != value:
            raise UserError(
                f"recover.kd.cache: {folder} holds predictions {_OTHER[part]} ({_difference(found.get(part), value)}); "
                f"name another folder, or {_anew(folder)}"
            )


def check_of_recovery(found: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> None:
    """Check that a recovery can learn from a cache; it may keep the outputs of more blocks. See `check_made_of`."""
    blocks = found.get("blocks")
    if isinstance(blocks, list) and set(wanted["blocks"]) <= set(blocks):
        wanted = {name: value for name, value in wanted.items() if name != "blocks"}
    check_made_of(found, wanted, folder)


def _difference(before: Any, now: Any) -> str:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        return "; ".join(f"{name}: {before.get(name)!r}, now {now.get(name)!r}" for name in names)[:300]
    return f"{before!r}, now {now!r}"[:300]


def open_cache(cache: TeacherCache, task: Task) -> CachedSamples:
    """Open a cache for a recovery.

    Raises:
        MissingFileError: it has not been written.
        UserError: it is not finished, or of another teacher, other data or another objective.
    """
    folder = Path(cache.folder)
    found = read_metadata(folder)
    check_of_recovery(found["made_of"], made_of(cache, task), folder)
    rows = check_whole(found, folder)
    return CachedSamples(FixedDraws(cache, task), ShardedSamples(str(folder), found["shards"], 0, rows, MIX))


@dataclass(frozen=True)
class CachedSamples:
    """Training samples with the teacher's predictions on them, in shards.

    Args:
        draws: the samples and their draws.
        stored: what the teacher made of them.
    """

    draws: FixedDraws
    stored: ShardedSamples

    mix = MIX

    def __len__(self) -> int:
        return len(self.draws)

    @cached_property
    def sizes(self) -> Sequence[int]:
        """Number of rows in each shard."""
        return self.stored.sizes

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """Return the samples of these rows by name, each (rows, ...), with what the teacher made of them."""
        found = {PREFIX + name: value for name, value in self.stored.__getitems__(indices).items()}
        return {**self.draws.read(indices), **found}

    def prefetch(self, indices: Sequence[int]) -> None:
        """Begin to read what the teacher made of these rows."""
        self.stored.prefetch(indices)

    def prepare(self, batch: Batch, rng: Rng) -> dict[str, Tensor]:
        """Return the inputs that the teacher had, and what it made of them: tensors by name, each (batch, ...).

        Args:
            batch: as `__getitems__` returns it, on any device.
            rng: not drawn from: the draws are those of the cache.
        """
        theirs = {name: value for name, value in batch.items() if name.startswith(PREFIX)}
        own = {name: value for name, value in batch.items() if name not in theirs}
        return {**self.draws.prepare(own), **theirs}
