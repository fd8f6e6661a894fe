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
    """A fixed network that maps images to features and class logits."""

    #: What the features are, for the record.
    name: str

    @abstractmethod
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Compute features and class logits.

        Args:
            images: (batch, channels, height, width), as the data has them.

        Returns:
            Features (batch, features) and class logits (batch, classes).
        """


class DataSource(ABC):
    """A data set of a recipe. Subclasses are frozen dataclasses; their fields are the options of the recipe."""

    @abstractmethod
    def train(self) -> Samples:
        """Return the training samples.

        Raises:
            UserError: files are missing or do not fit the recipe.
        """

    @abstractmethod
    def held_out(self) -> Samples:
        """Return samples that no stage trains on."""

    def pixels(self, x: Tensor) -> Tensor | None:
        """Convert examples to images that can be shown.

        Args:
            x: (batch, ...) examples.

        Returns:
            (batch, channels, height, width) values in [0, 1]; None if examples cannot be shown.
        """
        return None

    @property
    def has_pixels(self) -> bool:
        """Whether `pixels` returns images; known before any file is read."""
        return type(self).pixels is not DataSource.pixels

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
