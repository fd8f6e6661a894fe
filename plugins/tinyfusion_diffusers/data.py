"""Latents and prompts that were encoded beforehand, read from their files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from typing_extensions import override

from tinyfusion_core.dataloading.shards import METADATA, Shard, ShardedSamples, read_metadata, shards_in
from tinyfusion_core.errors import MissingFileError, UserError, require
from tinyfusion_core.protocols.data import DataSource, Samples
from tinyfusion_core.runtime.files import NEUTRAL
from tinyfusion_core.runtime.seeding import generator
from tinyfusion_diffusers.arrays import Column, EncodedSamples, columns_in

PROMPTS = ("text", "mask", "pooled", "text_2", "mask_2")
NAMES = ("x", "x_std", "condition", "control", "y", *PROMPTS, "image")


@dataclass(frozen=True, kw_only=True)
class EncodedPrompts(DataSource):
    """Latents with the embeddings of their prompts: in shards, or in one file per name or one for all.

    The folder holds `.npy` files or `.safetensors` files. The tensors are named `x` (N, ...), latents as the
    network takes them, scaled and shifted as its pipeline does; `text` (N, L, D), `mask` (N, L), `pooled` (N, D), `y`
    (N,), those that the network takes; `x_std` like `x`, if `x` are means. Networks that make videos of images, fill
    or edit take `condition` (N, ...), the channels that the pipeline puts beside the noisy latents; Wan 2.1 besides
    `image` (N, T, D), the embeddings of the image; Wan VACE `control` (N, ...), the latents that steer it. Where there
    is a second text encoder, `text_2` and `mask_2` are of it. A `.npy` file has the name of its tensor; a safetensors
    file may hold several. Only the rows of a batch are read.

    The folder may also be what `tinyfusion encode` has made, and `prompts` what `tinyfusion encode-prompts` has. Rows
    belong together in their order: the first prompt to the first image, and to its mirrored copy.

    Args:
        folder: the folder; with shards it may be any URL that fsspec supports.
        prompts: another folder, or URL, with the embeddings of the prompts.
        num_held_out: images that are not trained on, the same for every seed: a random choice; the first in shards.
        mix: how many shards a batch is drawn from; memory grows with it.
    """

    deviations = {"x": (0.4, 2.5)}  # pipelines scale and shift latents to make it 1

    folder: str
    prompts: str | None = field(default=None, metadata={NEUTRAL: None})
    num_held_out: int = 256
    mix: int = field(default=8, metadata={NEUTRAL: 8})

    def __post_init__(self) -> None:
        require(self.mix >= 1, "data.mix", self.mix, "at least 1")

    @override
    def train(self) -> Samples:
        return self._part(held_out=False)

    @override
    def held_out(self) -> Samples:
        return self._part(held_out=True)

    def _part(self, held_out: bool) -> Samples:
        images, prompts = self._stores
        rows = len(images)
        require(1 <= self.num_held_out < rows, "data.num_held_out", self.num_held_out, f"1 to {rows - 1}")
        if isinstance(images, _Arrays) and not isinstance(prompts, _Shards):
            order = torch.randperm(rows, generator=generator("held-out prompts", rows))
            some = order[: self.num_held_out] if held_out else order[self.num_held_out :]
            columns = {**images.columns, **(prompts.columns if prompts is not None else {})}
            return EncodedSamples(columns, some.sort().values)
        first, end = (0, self.num_held_out) if held_out else (self.num_held_out, rows)
        part = images.part(first, end)
        return part if prompts is None else PairedSamples(part, prompts.part(first, end), images.copies)

    @cached_property
    def _stores(self) -> tuple[_Arrays | _Shards, _Arrays | _Shards | None]:
        images = self._opened("folder", self.folder)
        if isinstance(images, _Arrays) and "x" not in images.columns:
            raise MissingFileError(
                f"data.folder: no x.npy, and no .safetensors file with an 'x', in {self.folder}; expected latents, and "
                f"beside them those of {', '.join(NAMES[1:])} that the network takes"
            )
        if self.prompts is None:
            return images, None
        prompts = self._opened("prompts", self.prompts)
        if isinstance(prompts, _Arrays) and not prompts.columns:
            raise MissingFileError(f"data.prompts: no {', '.join(PROMPTS)} in {self.prompts}")
        if len(prompts) != len(images):
            raise UserError(
                f"data.prompts: {self.prompts} has {len(prompts):,} rows, {self.folder} {len(images):,} images, which "
                "belong together row by row: encode the prompts in the order of the latents, which is that of "
                "captions.jsonl if `tinyfusion encode --captions` made them"
            )
        return images, prompts

    def _opened(self, key: str, folder: str) -> _Arrays | _Shards:
        if "://" in folder or ((Path(folder) / METADATA).is_file() and not any(Path(folder).glob("*.npy"))):
            metadata = read_metadata(folder)
            return _Shards(folder, shards_in(metadata, folder), 2 if metadata.get("flips") else 1, self.mix)
        columns: dict[str, Column] = {}
        names = NAMES if key == "folder" else PROMPTS
        for path in sorted([*Path(folder).glob("*.npy"), *Path(folder).glob("*.safetensors")]):
            for column in columns_in(path):
                if column.name not in names:
                    raise UserError(f"{path}: holds '{column.name}'; expected {', '.join(names)}")
                if column.name in columns:
                    raise UserError(f"{path}: '{column.name}' is in {columns[column.name].path.name} too; keep one")
                columns[column.name] = column
        first = columns.get("x") or next(iter(columns.values()), None)
        for column in columns.values():
            if first is not None and column.shape[:1] != first.shape[:1]:
                found = f"{column.path}: '{column.name}' has shape {list(column.shape)}"
                raise UserError(f"{found}, '{first.name}' has {len(first)} rows")
        return _Arrays(columns)


@dataclass(frozen=True)
class _Arrays:
    """A folder with a tensor for each name."""

    columns: Mapping[str, Column]
    copies = 1

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def part(self, first: int, end: int) -> EncodedSamples:
        return EncodedSamples(self.columns, torch.arange(first, end))


@dataclass(frozen=True)
class _Shards:
    """A folder of shards, in which the copies of an image are adjacent."""

    url: str
    shards: Sequence[Shard]
    copies: int
    mix: int

    def __len__(self) -> int:
        return sum(shard.count for shard in self.shards) // self.copies

    def part(self, first: int, end: int) -> ShardedSamples:
        return ShardedSamples(self.url, self.shards, first * self.copies, end * self.copies, self.mix)


@dataclass(frozen=True)
class PairedSamples:
    """Images and the prompts of the same rows, at least one of them in shards.

    Args:
        images: the latents.
        prompts: the embeddings, one row for all copies of an image.
        copies: rows of an image.
    """

    images: EncodedSamples | ShardedSamples
    prompts: EncodedSamples | ShardedSamples
    copies: int

    def __len__(self) -> int:
        return len(self.images)

    @property
    def mix(self) -> int:
        """How many shards a batch is drawn from."""
        return self._sharded.mix

    @property
    def sizes(self) -> Sequence[int]:
        """Number of samples in each shard: of the prompts if these are in shards, as they are far larger."""
        times = self.copies if self._sharded is self.prompts else 1
        return [times * size for size in self._sharded.sizes]

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """Return these samples by name, each (rows, ...).

        Raises:
            UserError: a file is missing or damaged, or both folders hold the same column.
        """
        found = self.images.__getitems__(indices)
        beside = self.prompts.__getitems__([i // self.copies for i in indices])
        if both := sorted(found.keys() & beside.keys()):
            where = [of.where(both[0], 0) for of in (self.prompts, self.images)]
            raise UserError(f"data.prompts: '{both[0]}' is in {where[0]} and in {where[1]}; keep one of them")
        return {**found, **beside}

    def extremes(self, name: str) -> Sequence[tuple[int, str]]:
        """Return the smallest and largest of these samples' labels, and where each is, if one file holds them."""
        return self.images.extremes(name)

    def where(self, name: str, index: int) -> str:
        """Return the file of a column, and a sample's row in it."""
        of, row = (self.prompts, index // self.copies) if name in PROMPTS else (self.images, index)
        return of.where(name, row)

    @property
    def _sharded(self) -> ShardedSamples:
        found = self.prompts if isinstance(self.prompts, ShardedSamples) else self.images
        assert isinstance(found, ShardedSamples)
        return found
