"""What a cache of a teacher's predictions holds, and how its draws are fixed."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ...dataloading.shards import METADATA
from ...errors import require
from ...parsing.records import read_json
from ...parsing.settings import Settings
from ...protocols.backbone import Batch
from ...protocols.task import Task
from ...runtime.locking import FolderKind
from ...runtime.seeding import Rng, generator

PREFIX = "teacher."
"""Beginning of the names of what the teacher made, among the inputs of a distillation."""
ROW = "row of the cache"
"""Column with a sample's row in the cache, which its random draws depend on."""
KIND = "teacher predictions"
"""What the metadata of a cache says that its folder holds."""


@dataclass(frozen=True, kw_only=True)
class TeacherCache(Settings):
    """A teacher's predictions on training samples, in files that `tinyfusion cache-teacher` writes.

    A recovery with it runs no teacher. It sees these samples with these draws, in an order of its own.

    Args:
        folder: where the files are.
        draws: how often a sample is drawn anew: its time step, noise and so on. 1 where nothing is random.
        samples: how many training samples, chosen at random; default all.
        blocks: blocks of the teacher whose outputs are kept too, counted from 0; for the taps of `MaskedKD`.
        dtype: of the numbers in the files.
        seed: of the draws, and of the choice of samples.
    """

    folder: str
    draws: int = 1
    samples: int | None = None
    blocks: Sequence[int] = field(default_factory=tuple)
    dtype: Literal["float32", "float16", "bfloat16"] = "float16"
    seed: int = 0

    def __post_init__(self) -> None:
        require(bool(self.folder), "recover.kd.cache.folder", self.folder, "the name of a folder")
        require(self.draws >= 1, "recover.kd.cache.draws", self.draws, "at least 1")
        samples = self.samples
        require(samples is None or samples >= 1, "recover.kd.cache.samples", samples, "at least 1, or null for all")


@dataclass(frozen=True)
class FixedDraws:
    """Training samples, each drawn a fixed number of times. Row d * n + i is the d-th draw of the i-th of n samples.

    Args:
        cache: how many samples and draws.
        task: the samples and the objective.
    """

    cache: TeacherCache
    task: Task

    def __len__(self) -> int:
        return self.cache.draws * len(self.samples)

    @cached_property
    def samples(self) -> list[int]:
        """Indices of the training samples, ascending."""
        num = len(self.task.train)
        if self.cache.samples is None or self.cache.samples >= num:
            return list(range(num))
        chosen = torch.randperm(num, generator=generator(self.cache.seed, "teacher cache", "samples"))
        return chosen[: self.cache.samples].sort().values.tolist()

    def rows_of(self, samples: Collection[int]) -> list[int]:
        """Return the rows of some training samples, given by their indices."""
        num, some = len(self.samples), set(samples)
        return [row for row in range(len(self)) if self.samples[row % num] in some]

    def read(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Return the samples of these rows by name, each (rows, ...), and the rows themselves."""
        num = len(self.samples)
        return {**self.task.train.__getitems__([self.samples[row % num] for row in rows]), ROW: torch.tensor(rows)}

    def prepare(self, batch: Batch) -> dict[str, Tensor]:
        """Draw everything random about some rows, for each the same at every time.

        Args:
            batch: what `read` returned, on any device.

        Returns:
            Prepared tensors by name, each (rows, ...).

        Raises:
            UserError: the objective draws for a whole batch at once.
        """
        own = {name: value for name, value in batch.items() if name != ROW}
        rng = Rng(self.cache.seed, "teacher cache", rows=tuple(batch[ROW].tolist()))
        return self.task.loss.prepare(own, rng)


def _is_ours(folder: Path) -> bool:
    if not (folder / METADATA).exists():
        return False
    found: Any = read_json(folder / METADATA)
    return isinstance(found, dict) and found.get("kind") == KIND


def _writes(folder: Path, path: Path) -> bool:
    return str(path) == METADATA or re.fullmatch(r"\d+-of-\d+\.(safetensors|json)", str(path)) is not None


CACHE = FolderKind("a cache of teacher predictions", "recover.kd.cache.folder", _is_ours, _writes)
