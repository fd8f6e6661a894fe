"""What a plugin says of a data set."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor


class Samples(Protocol):
    """A map-style data set that is read by lists of indices: many samples in one call."""

    def __len__(self) -> int: ...

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """The named tensors of these samples, each with len(indices) rows."""
        ...


@runtime_checkable
class Sharded(Samples, Protocol):
    """Samples that lie in shards, each best read as a whole."""

    mix: int
    """How many shards a batch is drawn from."""

    @property
    def sizes(self) -> Sequence[int]:
        """Number of samples in each shard, in the order of their indices."""
        ...


class FeatureSpace(ABC):
    """A fixed network that turns examples into features and class logits."""

    #: What the features are, for the record.
    name: str

    @abstractmethod
    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, ...) examples as the data has them -> (B, F) features, (B, K) class logits."""


class DataSource(ABC):
    """Where examples come from. Implementations are frozen dataclasses: their fields are the recipe's options.

    Metrics and commands of plugins may ask for more than is here: how to show an example, say. A task hands its data
    source on to them.

    Attributes:
        conditions: the column that says what an example is of, which generation is given.
    """

    conditions = "y"

    @abstractmethod
    def train(self) -> Samples:
        """The examples to learn from. Raises UserError when files are missing or do not fit the recipe."""

    @abstractmethod
    def held_out(self) -> Samples:
        """Examples that no stage trains on."""

    def feature_space(self) -> FeatureSpace | None:
        """The features in which generated examples are compared with real ones, if there are any."""
        return None


@dataclass(frozen=True)
class Tensors:
    """Samples held in memory: named tensors with the same number of rows."""

    columns: dict[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        return {name: column[indices] for name, column in self.columns.items()}
