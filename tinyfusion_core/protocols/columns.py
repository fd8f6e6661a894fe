"""What a network reads of the data, column by column, and whether the data have it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..errors import UserError
from .backbone import Backbone, owner
from .data import Lookup, Prefetched, Samples, Sharded, Traceable

LARGEST_SAMPLE = 2**30
"""Bytes of one column of a sample; videos in latent space have some tens of MB."""
_INDICES = {torch.int32, torch.int64}


@dataclass(frozen=True)
class Columns:
    """The columns that a network reads.

    Attributes:
        shapes: shape of one sample in each, without the batch.
        dtypes: their dtypes.
        lookups: tables in which the values of some are looked up.
        whose: what messages call the network.
    """

    shapes: Mapping[str, Sequence[int]]
    dtypes: Mapping[str, torch.dtype]
    lookups: Mapping[str, Lookup]
    whose: str = "the network"

    def check(self, batch: Mapping[str, Tensor], where: Callable[[str, int], str]) -> None:
        """Check the samples of a batch. No device is waited for: values on one are not looked at.

        Args:
            batch: tensors by name, each (rows, ...).
            where: says where the value of a column in a row of the batch lies.

        Raises:
            UserError: a column is missing, or has a shape, dtype or value that the network does not take.
        """
        for name, shape in self.shapes.items():
            found = batch.get(name)
            if found is None or list(found.shape[1:]) != list(shape):
                has = "missing" if found is None else list(found.shape[1:])
                raise UserError(f"data: '{name}' of a sample is {has}, {self.whose} takes {list(shape)}")
            if not _goes_for(found.dtype, self.dtypes[name]):
                wanted = self.dtypes[name]
                raise UserError(f"data: '{name}' is {found.dtype} in {where(name, 0)}, {self.whose} takes {wanted}")
            if name in self.lookups and found.device.type == "cpu":
                wrong = ~self.lookups[name].holds(found)
                if wrong.any():
                    row = int(wrong.flatten(1).any(1).nonzero()[0]) if wrong.ndim > 1 else int(wrong.nonzero()[0])
                    self._refuse(name, int(found[row][wrong[row]].flatten()[0]), where(name, row))

    def check_extremes(self, samples: Samples) -> None:
        """Check the smallest and largest values of whole columns, as far as the samples know them.

        Raises:
            UserError: one is outside the network's table.
        """
        if isinstance(samples, Traceable):
            for name, lookup in self.lookups.items():
                for value, where in samples.extremes(name):
                    if not lookup.allows(value):
                        self._refuse(name, value, where)

    def check_deviations(self, samples: Samples, deviations: Mapping[str, tuple[float, float]]) -> None:
        """Check how much the values of the first samples vary. One that cannot be read is no matter of this check.

        Args:
            samples: the samples.
            deviations: smallest and largest standard deviation, by column.

        Raises:
            UserError: one is outside.
        """
        batch: Mapping[str, Tensor] = {}
        with suppress(UserError):
            batch = samples.__getitems__(list(range(min(64, len(samples))))) if deviations else {}
        for name in deviations.keys() & batch.keys():
            low, high = deviations[name]
            found = float(batch[name].double().std())
            if not low <= found <= high:
                raise UserError(
                    f"data: '{name}' has the standard deviation {found:.3g} in {len(batch[name])} samples; expected "
                    f"about 1, {low} to {high}: were the latents scaled twice, or not at all?"
                )

    def _refuse(self, name: str, value: int, where: str) -> None:
        lookup = self.lookups[name]
        raise UserError(
            f"data: '{name}' is {value} in {where}; the network has {lookup.size} {lookup.of}, 0 to "
            f"{lookup.size - 1}: {lookup.remedy}"
        )


def columns_of(backbone: Backbone, model: nn.Module, conditions: str) -> Columns:
    """Return what a network reads, by its backbone's `example`, `lookups` and `num_labels`.

    Args:
        backbone: the model family.
        model: the network, on any device.
        conditions: name of the column that holds the labels, if it is one of the network's.
    """
    example = backbone.example(1)
    lookups, num_labels = dict(backbone.lookups(model)), backbone.num_labels(model)
    if num_labels is not None and conditions in example and example[conditions].dtype in _INDICES:
        lookups.setdefault(conditions, Lookup(num_labels))
    shapes = {name: tuple(t.shape[1:]) for name, t in example.items()}
    whose = f"the network of {backbone.origin}" if backbone.origin else "the network"
    return Columns(shapes, {name: t.dtype for name, t in example.items()}, lookups, whose)


def check_sample_size(backbone: Backbone) -> None:
    """Check that a machine can hold what the network takes, without making it.

    Raises:
        UserError: a column of one sample is larger than `LARGEST_SAMPLE`.
    """
    with FakeTensorMode():  # of tensors that take no memory
        example = backbone.example(1)
    for name, column in example.items():
        if column.nbytes > LARGEST_SAMPLE:
            size = f"{list(column.shape[1:])}, {column.nbytes / 2**30:,.0f} GiB"
            raise UserError(f"{owner(backbone)}: '{name}' of one sample is {size}; correct the sizes")


def checked(samples: Samples, columns: Columns, part: str) -> Samples:
    """Return the same samples, each checked when it is read.

    Args:
        samples: the samples.
        columns: what the network reads of them.
        part: what they are, for messages: "training" or "held-out".
    """
    return (_CheckedShards if isinstance(samples, Sharded) else _Checked)(samples, columns, part)


def unchecked(samples: Samples) -> Samples:
    """Return the samples that `checked` was given, for whoever knows their class."""
    return samples.samples if isinstance(samples, _Checked) else samples


@dataclass(frozen=True)
class _Checked:
    samples: Samples
    columns: Columns
    part: str

    def __len__(self) -> int:
        return len(self.samples)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        batch = self.samples.__getitems__(indices)
        self.columns.check(batch, lambda name, row: self._where(name, indices[row]))
        return batch

    def _where(self, name: str, index: int) -> str:
        known = self.samples.where(name, index) if isinstance(self.samples, Traceable) else ""
        return known or f"{self.part} sample {index}"


class _CheckedShards(_Checked):
    samples: Sharded

    @property
    def mix(self) -> int:
        return self.samples.mix

    @property
    def sizes(self) -> Sequence[int]:
        return self.samples.sizes

    def prefetch(self, indices: Sequence[int]) -> None:
        if isinstance(self.samples, Prefetched):
            self.samples.prefetch(indices)


def _goes_for(found: torch.dtype, wanted: torch.dtype) -> bool:
    """Whether a network that takes one dtype can be given another: what autocast and a look-up convert."""
    if found.is_floating_point and wanted.is_floating_point:
        return found == wanted or found != torch.float64
    return found == wanted or {found, wanted} <= _INDICES
