"""Writes a network's own samples as training data, with any number of processes; it can be interrupted and resumed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

from ..dataloading.encoding import DTYPES, Encoding, Record, folder_kind
from ..dataloading.shards import FORMAT_VERSION
from ..errors import UserError, require
from ..parsing.settings import Settings
from ..parsing.weights import fingerprint
from ..protocols.backbone import Batch
from ..protocols.loss import LossAdapter
from ..protocols.task import Task
from ..protocols.undisturbed import evaluating
from ..runtime.files import digest, without_later
from ..runtime.seeding import Rng
from ..training.trainer import Trainer
from .generation import balanced_labels

LOOKED_AT = 64
"""How many samples tell what all are made for."""


@dataclass(frozen=True, kw_only=True)
class GenerateData(Settings):
    """Write samples that a task's teacher makes, in shards that the data source `Generated` reads.

    They are generated for balanced labels, where the network says how many classes it has, and else in the place of the
    training samples, for their conditions or with their beginnings. Sample i follows from the seed and i alone.

    With several processes each makes its share of the shards. Finished shards are verified, and not made again.

    Args:
        samples: how many.
        seed: of all that is random in them.
        dtype: of numbers with a point, in the files.
        shard_size: samples in a shard.
        batch_size: samples at once; affects results by rounding only.
    """

    samples: int
    seed: int = 0
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    shard_size: int = 512
    batch_size: int = 64

    def __post_init__(self) -> None:
        for name in ("samples", "shard_size", "batch_size"):
            require(getattr(self, name) >= 1, f"generate-data: {name}", getattr(self, name), "at least 1")

    def check(self, loss: LossAdapter) -> None:
        """Check that an objective can make training data.

        Raises:
            UserError: it cannot.
        """
        if not loss.makes_data:
            raise UserError(
                f"loss: {type(loss).__name__} cannot make training data: it has neither sample nor generated"
            )

    def __call__(self, task: Task, trainer: Trainer, out: Path | str) -> dict[str, Any]:
        """Make the samples that are not there yet.

        Args:
            task: the teacher and the objective; the data, if there are no labels to balance.
            trainer: device and precision.
            out: the folder.

        Returns:
            The content of `out/metadata.json`.

        Raises:
            UserError: the objective cannot generate, the folder is in use or holds other samples, or what is generated
                is not finite.
            Interrupted: a signal arrived; finished shards are kept.
        """
        self.check(task.loss)
        return _Making(Path(out), self.shard_size, self.batch_size, self, task, trainer).run()


@dataclass
class _Making(Encoding):
    """One call of `GenerateData`."""

    command = "generate-data"
    kind = folder_kind("generated data", "teacher_sha256")

    how: GenerateData
    task: Task
    trainer: Trainer

    @cached_property
    @override
    def settings(self) -> dict[str, Any]:
        how, loss, order = self.how, self.task.loss, self.order
        some = self._told(order[:: max(1, len(order) // LOOKED_AT)][:LOOKED_AT])
        own: dict[str, Any] = {f.name: getattr(loss, f.name) for f in fields(loss)} if is_dataclass(loss) else {}
        options = without_later(type(loss), own)
        return {
            "format_version": FORMAT_VERSION,
            "teacher_sha256": fingerprint(self.task.teacher),
            "loss": type(loss).__name__,
            **{f"loss.{name}": repr(value) for name, value in options.items()},
            "precision": self.trainer.accelerator.mixed_precision,
            "samples": how.samples,
            "seed": how.seed,
            "dtype": how.dtype,
            "shard_size": how.shard_size,
            "made_for_sha256": digest({name: t.tolist() for name, t in some.items()}),
        }

    @cached_property
    @override
    def order(self) -> list[int]:
        return list(range(self.how.samples))

    @override
    def bytes_per_example(self) -> int:
        size = DTYPES[self.how.dtype].itemsize
        columns = self.task.backbone.example(1).values()
        return sum(t.numel() * (size if t.is_floating_point() else t.itemsize) for t in columns)

    @override
    def encode(self, batches: Sequence[list[int]]) -> Iterator[tuple[dict[str, Tensor], list[str]]]:
        task, accelerator, dtype = self.task, self.trainer.accelerator, DTYPES[self.how.dtype]
        teacher = task.teacher.to(accelerator.device)
        for items in batches:
            asked = {**task.backbone.example(len(items)), **self._told(items)}
            asked = {name: t.to(accelerator.device) for name, t in asked.items()}
            rng = Rng(self.how.seed, "generated data", rows=tuple(items))
            with evaluating(teacher), torch.no_grad(), accelerator.autocast():
                made = task.loss.generated(teacher, asked, task.conditions, rng)
            yield {name: (t.to(dtype) if t.is_floating_point() else t).cpu() for name, t in made.items()}, []

    @override
    def fault(self, items: Sequence[int], skipped: Sequence[str], tensors: Mapping[str, Tensor]) -> str:
        rows = len(next(iter(tensors.values())))
        return "" if rows == len(items) else f"it has {rows} rows in the place of {len(items)}"

    @override
    def summary(self, records: Sequence[Record]) -> dict[str, Any]:
        return {"teacher": dict(self.task.source)}

    def _told(self, items: Sequence[int]) -> Batch:
        """What samples are made for: labels (n,), or the training samples in whose place they come, each (n, ...)."""
        task = self.task
        if task.backbone.num_labels(task.teacher) is None:
            return task.train.__getitems__([i % len(task.train) for i in items])
        return {task.conditions: balanced_labels(task, task.teacher, items)}
