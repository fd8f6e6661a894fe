"""The interface of a data set."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from ..settings import Settings


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


@runtime_checkable
class Traceable(Samples, Protocol):
    """Samples that know what a column holds before it is read, and where it lies."""

    def extremes(self, name: str) -> Sequence[tuple[int, str]]:
        """Return the smallest and largest value of a column of integers, and where each is.

        Either may be left out; empty if they cannot be had without reading all samples.
        """
        ...

    def where(self, name: str, index: int) -> str:
        """Return where the value of a column of a sample lies: its file, and place in it; empty if unknown."""
        ...


@dataclass(frozen=True)
class Lookup:
    """A table of a network in which the values of a column are looked up.

    Args:
        size: number of its rows: values run from 0 to one below it.
        of: what the rows stand for, in the plural.
        remedy: what to do about other values.
        ignored: a further value, that is never looked up.
    """

    size: int
    of: str = "classes"
    remedy: str = "number the labels from 0, or take a network with more classes"
    ignored: int | None = None

    def allows(self, value: int) -> bool:
        """Return whether a value can be looked up, or is ignored."""
        return 0 <= value < self.size or value == self.ignored

    def holds(self, values: Tensor) -> Tensor:
        """Return which values are allowed: booleans of the same shape, (rows, ...)."""
        allowed = (values >= 0) & (values < self.size)
        return allowed if self.ignored is None else allowed | (values == self.ignored)


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


class DataSource(Settings, ABC):
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
