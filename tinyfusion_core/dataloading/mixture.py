"""Several data sets as one, in given shares."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor
from typing_extensions import override

from ..errors import UserError, require
from ..protocols.backbone import Backbone
from ..protocols.data import DataSource, FeatureSpace, Samples, Traceable
from ..protocols.loss import LossAdapter
from ..runtime.seeding import generator

MOST = 10_000_000
"""Samples of an epoch, unless the parts have more: their order is held in memory."""


@dataclass(frozen=True, kw_only=True)
class Mixture(DataSource):
    """Samples of several data sets, so many of each.

    An epoch is as long as it takes to see every sample of every part at least once, in a random order in which the
    shares hold; samples of the others repeat. Held-out samples are those of all parts, each once.

    Args:
        parts: data sets by name; their samples have the same columns.
        weights: share of each part, in any unit; by default the parts' sizes. 0 leaves only the held-out samples of
            a part.
        seed: seed of the choice, where an epoch of ten million samples does not reach all of a part.
    """

    parts: dict[str, DataSource]
    weights: dict[str, float] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        require(len(self.parts) > 0, "data.parts", self.parts, "at least one data set")
        if self.weights is None:
            return
        if odd := sorted(self.parts.keys() ^ self.weights.keys()):
            raise UserError(f"data.weights: {odd[0]} is not in both parts and weights; give every part a weight")
        for name, weight in self.weights.items():
            require(weight >= 0, f"data.weights.{name}", weight, "0 or more")
        require(any(self.weights.values()), "data.weights", self.weights, "at least one above 0")

    @property
    def conditions(self) -> str:  # type: ignore[override]  # that of its parts
        """Name of the column with the conditions of generation."""
        return next(iter(self.parts.values())).conditions

    @property
    def deviations(self) -> Mapping[str, tuple[float, float]]:  # type: ignore[override]  # those of its parts
        """Smallest and largest standard deviation that the values of a column can have, by column."""
        return next(iter(self.parts.values())).deviations

    @override
    def train(self) -> Samples:
        samples = {name: p.train() for name, p in self.parts.items() if self.weights is None or self.weights[name]}
        sizes = {name: len(of) for name, of in samples.items()}
        if empty := [name for name, size in sizes.items() if not size]:
            raise UserError(f"data.parts.{empty[0]}: holds no training sample; leave it out")
        if len(samples) == 1:
            return next(iter(samples.values()))  # which may have shards, and an order of them
        weights = self.weights or sizes
        total = sum(weights.values())
        shares = {name: weights[name] / total for name in samples}
        epoch = min(max(sizes[name] / share for name, share in shares.items()), max(MOST, sum(sizes.values())))
        return Mixed(samples, [max(1, round(epoch * shares[name])) for name in samples], self.seed)

    @override
    def held_out(self) -> Samples:
        found = {name: part.held_out() for name, part in self.parts.items()}
        samples = {name: of for name, of in found.items() if len(of)}
        if not samples:
            raise UserError("data.parts: none of them holds a sample out; set num_held_out of one, or add real data")
        return Mixed(samples, [len(of) for of in samples.values()], self.seed)

    @override
    def check_fits(self, backbone: Backbone, loss: LossAdapter) -> None:
        for part in self.parts.values():
            part.check_fits(backbone, loss)

    @override
    def feature_space(self) -> FeatureSpace | None:
        """Return the first part's."""
        return next(iter(self.parts.values())).feature_space()


class Mixed:
    """Samples of several data sets, one after the other.

    Args:
        parts: the data sets by name.
        counts: how many samples of each; if there are fewer they repeat, if more, some are chosen.
        seed: seed of that choice.
    """

    def __init__(self, parts: Mapping[str, Samples], counts: Sequence[int], seed: int) -> None:
        self.parts, self.counts, self.seed = parts, counts, seed
        self._names, self._ends = list(parts), list(accumulate(counts))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """Return the named tensors of these samples, each (rows, ...).

        Raises:
            UserError: the columns of two parts differ.
        """
        places = [self._place(i) for i in indices]
        found: dict[str, dict[str, Tensor]] = {}
        for part in dict.fromkeys(name for name, _ in places):
            found[part] = self.parts[part].__getitems__([i for name, i in places if name == part])
        (first, batch), *others = found.items()
        for name, other in others:
            if _columns(other) != _columns(batch):
                raise UserError(
                    f"data.parts: samples of '{first}' hold {_columns(batch)}, those of '{name}' {_columns(other)}; "
                    "a mixture needs the same columns, types and shapes"
                )
        order = torch.tensor([row for part in found for row, (name, _) in enumerate(places) if name == part])
        return {name: torch.cat([of[name] for of in found.values()])[order.argsort()] for name in batch}

    def extremes(self, name: str) -> Sequence[tuple[int, str]]:
        """Return the smallest and largest values of a column in the parts that know theirs, and where each is."""
        return [end for of in self.parts.values() if isinstance(of, Traceable) for end in of.extremes(name)]

    def where(self, name: str, index: int) -> str:
        """Return where a sample lies: its part, and what that says."""
        part, i = self._place(index)
        of = self.parts[part]
        return f"{part}: {of.where(name, i)}" if isinstance(of, Traceable) else part

    def _place(self, index: int) -> tuple[str, int]:
        """The part of a sample, and its index there."""
        part = bisect_right(self._ends, index)
        name, i = self._names[part], index - (self._ends[part] - self.counts[part])
        size = len(self.parts[name])
        return name, i % size if self.counts[part] >= size else int(self._chosen[name][i])

    @cached_property
    def _chosen(self) -> dict[str, Tensor]:
        """Samples of the parts that are not seen whole."""
        sizes = {name: len(of) for name, of in self.parts.items()}
        few = {name: num for name, num in zip(self._names, self.counts, strict=True) if num < sizes[name]}
        return {
            name: torch.randperm(sizes[name], generator=generator(self.seed, "mixture", name))[:num]
            for name, num in few.items()
        }


def _columns(batch: Mapping[str, Tensor]) -> str:
    """The columns of a batch, in words."""
    told = (f"{name} {tuple(column.shape[1:])} {column.dtype}" for name, column in sorted(batch.items()))
    return ", ".join(told).replace("torch.", "")
