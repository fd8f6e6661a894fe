"""What `tinyfusion generate-data` has made, as training samples."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from typing_extensions import override

from ..errors import MissingFileError, UserError, require
from ..protocols.data import DataSource
from .shards import Shard, ShardedSamples, read_metadata, shards_in


@dataclass(frozen=True, kw_only=True)
class Generated(DataSource):
    """Samples that a network has made, in the shards of `tinyfusion generate-data`, with the columns of its data.

    Args:
        folder: the folder, or any URL that fsspec supports.
        num_held_out: samples that are not trained on, the first ones; 0 where other data in a `Mixture` judge.
        mix: how many shards a batch is drawn from; memory grows with it.
    """

    folder: str
    num_held_out: int = 256
    mix: int = 8

    def __post_init__(self) -> None:
        require(self.num_held_out >= 0, "data.num_held_out", self.num_held_out, "0 or more")
        require(self.mix >= 1, "data.mix", self.mix, "at least 1")

    @override
    def train(self) -> ShardedSamples:
        return self._rows(self.num_held_out, None)

    @override
    def held_out(self) -> ShardedSamples:
        return self._rows(0, self.num_held_out)

    def _rows(self, first: int, end: int | None) -> ShardedSamples:
        num = sum(shard.count for shard in self._shards)
        require(self.num_held_out < num, "data.num_held_out", self.num_held_out, f"below the {num} samples there are")
        return ShardedSamples(self.folder, self._shards, first, num if end is None else end, self.mix)

    @cached_property
    def _shards(self) -> list[Shard]:
        try:
            metadata = read_metadata(self.folder)
        except MissingFileError:
            raise MissingFileError(
                f"data.folder: there are no generated data in '{self.folder}'; "
                f"`tinyfusion generate-data RECIPE --samples 10000 --out {self.folder}` makes them"
            ) from None
        if "shards" not in metadata:
            raise UserError(f"data.folder: '{self.folder}' holds latents in arrays; read them with data: Latents")
        return shards_in(metadata, self.folder)
