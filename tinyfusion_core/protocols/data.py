"""The interface of a data set."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, default_collate
from torch.utils.data.distributed import DistributedSampler
from torch.utils.data.sampler import RandomSampler, SequentialSampler

from ..errors import UserError
from ..parsing.settings import Settings

if TYPE_CHECKING:
    from .backbone import Backbone
    from .loss import LossAdapter


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
class Prefetched(Samples, Protocol):
    """Samples that can begin to read what will be asked for."""

    def prefetch(self, indices: Sequence[int]) -> None:
        """Begin to read these samples, as far as there is room for them. Nothing is raised."""
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


@runtime_checkable
class Varied(Samples, Protocol):
    """Samples with columns that the backbone's example lacks and the network takes, such as images."""

    def fullest(self, num_rows: int) -> dict[str, Tensor]:
        """Return a batch of one sample that has all of them, repeated: tensors by name, each (rows, ...).

        Blocks are called with it to find which of their arguments carry the batch.
        """
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
        deviations: smallest and largest standard deviation that the values of a column can have, by column. Latents
            that were scaled twice, or not at all, lie outside.
    """

    conditions = "y"
    deviations: ClassVar[Mapping[str, tuple[float, float]]] = {}

    @abstractmethod
    def train(self) -> Samples:
        """Return the training samples.

        Raises:
            UserError: files are missing or do not fit the recipe.
        """

    @abstractmethod
    def held_out(self) -> Samples:
        """Return samples that no stage trains on."""

    def check_fits(self, backbone: Backbone, loss: LossAdapter) -> None:
        """Check settings that have to agree with those of a network or an objective. By default none have to.

        Args:
            backbone: of the network that is pruned.
            loss: the objective.

        Raises:
            UserError: they do not.
        """
        return

    def feature_space(self) -> FeatureSpace | None:
        """Return the features in which generated and real examples are compared; None if there are none."""
        return None


@dataclass(frozen=True)
class Tensors:
    """Samples held in memory: named tensors with the same number of rows, each (rows, ...).

    Raises:
        UserError: there are none, or their numbers of rows differ.
    """

    columns: dict[str, Tensor]

    def __post_init__(self) -> None:
        rows = {name: len(column) if column.ndim else 0 for name, column in self.columns.items()}
        if len(set(rows.values())) != 1 or 0 in rows.values():
            has = ", ".join(f"'{name}' has {count} rows" for name, count in rows.items()) or "there is no tensor"
            raise UserError(f"data: {has}; give every tensor the same number, one row a sample")

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        return {name: column[indices] for name, column in self.columns.items()}


def as_samples(data: Any, key: str) -> Samples:
    """Return data as samples that are read by lists of indices.

    Args:
        data: samples; tensors or numpy arrays by name, each (samples, ...); or a map-style data set of torch, or a
            loader of one, whose data set is read and whose `collate_fn` is used: batches and their order are the
            trainer's. Items that are tuples become columns "0", "1", ...
        key: its name, for messages.

    Raises:
        UserError: it is something else.
    """
    if isinstance(data, Mapping):
        return Tensors({str(name): _tensor(str(name), column) for name, column in data.items()})
    if isinstance(data, DataLoader):
        _check_takes_all(data, key)
    if isinstance(data, TensorDataset):
        return Tensors({str(i): tensor for i, tensor in enumerate(data.tensors)})
    of = data.dataset if isinstance(data, DataLoader) else data
    if isinstance(of, IterableDataset):
        raise UserError(f"{key}: a stream of samples has no order to go back to on resume; give a map-style data set")
    if isinstance(of, Dataset):
        return Items(of, data.collate_fn if isinstance(data, DataLoader) else default_collate)
    if not (hasattr(data, "__getitems__") and hasattr(data, "__len__")):
        raise UserError(
            f"{key} is a {type(data).__name__}; expected tensors or arrays by name, a torch data set or loader, or "
            "samples with __len__ and __getitems__"
        )
    samples: Samples = data
    return samples


def _check_takes_all(loader: DataLoader[Any], key: str) -> None:
    """Raise UserError if a loader leaves samples out, or takes some more often: that may be what it is for."""
    every = (SequentialSampler, RandomSampler, DistributedSampler)
    if not isinstance(loader.dataset, IterableDataset) and not isinstance(loader.sampler, every):
        raise UserError(
            f"{key}: the loader has a {type(loader.sampler).__name__}, and the order of samples is the trainer's; give "
            "a torch.utils.data.Subset of the data set, or repeat in it what is to come more often"
        )


def _tensor(name: str, column: Any) -> Tensor:
    try:
        return torch.as_tensor(column)
    except (TypeError, ValueError, RuntimeError) as e:
        kind = type(column).__name__
        raise UserError(f"data: '{name}' is a {kind}; expected a tensor or an array of numbers ({e})") from None


@dataclass(frozen=True)
class Items:
    """The items of a map-style data set of torch, as samples.

    Args:
        dataset: the data set.
        collate: makes a batch of a list of its items.
    """

    dataset: Dataset[Any]
    collate: Callable[[list[Any]], Any]

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """Return the collated items by name, each (rows, ...).

        Raises:
            UserError: something in them is no tensor.
        """
        batch = self.collate([self.dataset[i] for i in indices])
        if not isinstance(batch, Mapping):
            batch = dict(enumerate(batch if isinstance(batch, list | tuple) else [batch]))
        for name, column in batch.items():
            if not isinstance(column, Tensor):
                raise UserError(
                    f"data: '{name}' of a sample is a {type(column).__name__}, not a tensor; leave it out in the data "
                    "set or in the loader's collate_fn"
                )
        return {str(name): column for name, column in batch.items()}
