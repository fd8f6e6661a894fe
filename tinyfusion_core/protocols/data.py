"""The interface of a data set."""

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
        """Return the named tensors of these samples, each (rows, ...), one row per index."""
        ...


@runtime_checkable
class Sharded(Samples, Protocol):
    """Samples stored in shards, each best read as a whole."""

    mix: int
    """How many shards a batch is drawn from."""

    @property
    def sizes(self) -> Sequence[int]:
        """Number of samples in each shard, in the order of their indices."""
        ...


class FeatureSpace(ABC):
    """A fixed network that maps examples to features and class logits."""

    #: What the features are, for the record.
    name: str

    @abstractmethod
    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Compute features and class logits.

        Args:
            x: (batch, ...) examples, as the data has them.

        Returns:
            Features (batch, features) and class logits (batch, classes).
        """


class DataSource(ABC):
    """A data set of a recipe. Subclasses are frozen dataclasses; their fields are the options of the recipe.

    A task passes its data source on, so metrics and commands of plugins may use further methods: to show examples, say.

    Attributes:
        conditions: name of the column with the conditions of generation.
    """

    conditions = "y"

    @abstractmethod
    def train(self) -> Samples:
        """Return the training samples.

        Raises:
            UserError: files are missing or do not fit the recipe.
        """

    @abstractmethod
    def held_out(self) -> Samples:
        """Return samples that no stage trains on."""

    def feature_space(self) -> FeatureSpace | None:
        """Return the features in which generated and real examples are compared; None if there are none."""
        return None


@dataclass(frozen=True)
class Tensors:
    """Samples held in memory: named tensors with the same number of rows, each (rows, ...)."""

    columns: dict[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        return {name: column[indices] for name, column in self.columns.items()}
