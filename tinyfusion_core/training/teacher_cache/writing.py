"""Writes a cache, with any number of processes; it can be interrupted and resumed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...dataloading.shards import METADATA, Shard, read_shard, write_shard
from ...errors import UserError, require
from ...parsing.records import read_as
from ...protocols.backbone import Batch
from ...protocols.blocks.outputs import captured
from ...protocols.task import Task
from ...protocols.undisturbed import evaluating
from ...runtime.distributed import batches, complete_sharded, on_main_process
from ...runtime.files import check_space, write_json
from ...runtime.locking import check_free, owned
from ..trainer import Trainer
from .samples import FORMAT_VERSION, Metadata, check_made_of, made_of, read_metadata
from .settings import CACHE, KIND, FixedDraws, TeacherCache

SHARD_BYTES = 64 * 2**20
"""Size of a shard, about."""
LARGEST_SHARD = 8192
"""Most rows of a shard."""


def write_cache(cache: TeacherCache, task: Task, trainer: Trainer) -> Metadata:
    """Write the shards of a cache that are still missing.

    Args:
        cache: what to keep, and where.
        task: the teacher, the objective and the training samples.
        trainer: device and precision of the teacher, and rows at once: its micro-batch, or its batch.

    Returns:
        The metadata of the finished cache.

    Raises:
        UserError: the folder holds something else, the objective or the dtype cannot keep the predictions.
        Interrupted: a signal arrived; the same call goes on.
    """
    depth = len(task.backbone.block_paths(task.teacher))
    bad = [i for i in cache.blocks if not 0 <= i < depth]
    require(not bad, "recover.kd.cache.blocks", list(cache.blocks), f"blocks of the teacher, 0 to {depth - 1}")
    writing = _Writing(cache, task, trainer)
    writing.check_draws()
    with ExitStack() as stack:
        on_main_process(lambda: writing.take(stack))
        complete_sharded(writing.parts, writing.is_done, writing.write, "teacher", trainer.progress)
        return on_main_process(writing.finish)


def kept_of(task: Task, teacher: nn.Module, inputs: Batch, blocks: Sequence[int]) -> dict[str, Tensor]:
    """Run a teacher and return what a cache keeps of it: tensors by name, each (batch, ...).

    Args:
        task: the objective, and where the teacher's blocks are.
        teacher: the network.
        inputs: prepared tensors by name, each (batch, ...).
        blocks: the blocks whose outputs are kept.
    """
    paths = task.backbone.block_paths(teacher)
    with captured(teacher, [paths[i] for i in blocks], task.backbone.streams) as outputs:
        prediction = task.loss.predict(teacher, inputs)
    kept = {f"prediction.{name}": t for name, t in task.loss.keep(prediction, inputs).items()}
    for i, streams in zip(blocks, outputs, strict=True):
        kept |= {f"block.{i}.{stream}": t for stream, t in enumerate(streams)}
    return kept


@dataclass(frozen=True)
class _Writing:
    """One call of `write_cache`."""

    cache: TeacherCache
    task: Task
    trainer: Trainer

    def check_draws(self) -> None:
        """Check that further draws of a sample differ; UserError if nothing is drawn."""
        if self.cache.draws == 1:
            return
        num = len(self.draws.samples)
        rows = range(min(16, num))
        first, other = (self.draws.prepare(self.draws.read([n + row for row in rows])) for n in (0, num))
        drawn = any(not torch.equal(first[name], other[name]) for name in first)
        require(drawn, "recover.kd.cache.draws", self.cache.draws, "1: the objective draws nothing at random")

    def take(self, stack: ExitStack) -> None:
        """Reserve the folder until the stack closes; UserError if it holds something else."""
        check_free(self.folder, CACHE)
        stack.enter_context(owned(self.folder, CACHE))
        size = len(self.draws) * self.bytes_per_row
        what = f"recover.kd.cache: takes {size / 1e9:,.3g} GB, {self.bytes_per_row:,} bytes for each of "
        what += f"{len(self.draws):,} rows"
        check_space(self.folder, size, what, "keep fewer samples or draws, or choose another disk")
        if (self.folder / METADATA).exists():
            check_made_of(read_metadata(self.folder)["made_of"], self.made_of, self.folder)
        else:
            write_json(self.folder / METADATA, self._metadata([]))

    def is_done(self, rows: range) -> bool:
        """Whether a shard is there and whole."""
        try:
            return bool(read_shard(str(self.folder), self._record(rows)))
        except UserError:
            return False

    def write(self, rows: range) -> None:
        """Run the teacher on these rows, and write their shard and its record."""
        made = [self._predictions(rows[some.start : some.stop]) for some in batches(len(rows), self._rows_at_once)]
        tensors = {name: torch.cat([part[name] for part in made]) for name in made[0]}
        bad = [name for name, t in tensors.items() if t.is_floating_point() and not torch.isfinite(t).all()]
        if bad:
            raise UserError(
                f"recover.kd.cache.dtype: {self.cache.dtype} does not hold '{bad[0]}' of the teacher, or the teacher's "
                "prediction is not finite; take bfloat16 or float32, or check the checkpoint"
            )
        shard = write_shard(self.folder, self._name(rows), tensors)
        write_json(self._record_path(rows), asdict(shard))

    def finish(self) -> Metadata:
        """Write the metadata of all shards."""
        content = self._metadata([self._record(rows) for rows in self.parts])
        write_json(self.folder / METADATA, content)
        for rows in self.parts:
            self._record_path(rows).unlink(missing_ok=True)
        return read_metadata(self.folder)

    @cached_property
    def folder(self) -> Path:
        return Path(self.cache.folder)

    @cached_property
    def draws(self) -> FixedDraws:
        return FixedDraws(self.cache, self.task)

    @cached_property
    def made_of(self) -> dict[str, Any]:
        precision = {"precision": self.trainer.accelerator.mixed_precision}  # of one cache, the same for all rows
        return {**made_of(self.cache, self.task), **precision}

    @cached_property
    def parts(self) -> list[range]:
        """The rows of each shard."""
        return batches(len(self.draws), self.rows_per_shard)

    @cached_property
    def rows_per_shard(self) -> int:
        """As many as fit into a shard, by what is kept of one."""
        return max(1, min(LARGEST_SHARD, SHARD_BYTES // max(1, self.bytes_per_row)))

    @cached_property
    def bytes_per_row(self) -> int:
        """What is kept of one row."""
        return sum(t.nbytes for t in self._predictions([0]).values())

    @cached_property
    def _rows_at_once(self) -> int:
        return self.trainer.micro_batch_size or self.trainer.batch_size

    @cached_property
    def _teacher(self) -> nn.Module:
        return self.trainer.to_device(self.task.teacher)

    def _predictions(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """What is kept of the teacher's predictions on these rows, each (rows, ...), on the CPU."""
        accelerator = self.trainer.accelerator
        batch = {name: t.to(accelerator.device) for name, t in self.draws.read(rows).items()}
        with evaluating(self._teacher), torch.no_grad(), accelerator.autocast():
            kept = kept_of(self.task, self._teacher, self.draws.prepare(batch), sorted({*self.cache.blocks}))
        dtype = getattr(torch, self.cache.dtype)
        return {name: (t.to(dtype) if t.is_floating_point() else t).cpu() for name, t in kept.items()}

    def _metadata(self, shards: Sequence[Shard]) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "kind": KIND,
            "made_of": self.made_of,
            "rows_per_shard": self.rows_per_shard,
            "shards": [asdict(shard) for shard in shards],
        }

    def _name(self, rows: range) -> str:
        return f"{rows.start // self.rows_per_shard:05d}-of-{len(self.parts):05d}.safetensors"

    def _record_path(self, rows: range) -> Path:
        """Where a finished shard's hash is kept until all are finished."""
        return (self.folder / self._name(rows)).with_suffix(".json")

    def _record(self, rows: range) -> Shard:
        """The record of a finished shard; UserError if there is none."""
        own, listed = self._record_path(rows), self._listed.get(self._name(rows))
        if listed is not None and not own.exists():
            return listed
        return read_as(own, Shard, "delete it to make that shard again")

    @cached_property
    def _listed(self) -> dict[str, Shard]:
        """The shards of a cache that was finished before."""
        return {shard.name: shard for shard in read_metadata(self.folder)["shards"]}
