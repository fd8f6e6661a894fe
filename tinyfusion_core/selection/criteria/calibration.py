"""Calibration: run a network on training samples, with the same inputs for every criterion of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from ...dataloading.order import order_of
from ...errors import UserError, require
from ...protocols.blocks.batch import BatchDim
from ...protocols.blocks.branches import Removed
from ...protocols.blocks.call import positional_names
from ...protocols.blocks.paths import block_of
from ...protocols.blocks.streams import streams_of
from ...protocols.task import Task
from ...protocols.undisturbed import evaluating
from ...pruning.gating import Gates
from ...pruning.prefixes import Prefixes
from ...runtime.distributed import batches, local_share, map_sharded, rank_and_world_size
from ...runtime.progress import Tracker
from ...runtime.seeding import Rng
from ...training.trainer import Trainer
from ..base import Decisive
from .base import Criterion
from .watching import Measure, watch_branch, watch_span

Span = tuple[int, int]
"""First and last of some consecutive blocks."""


@dataclass(frozen=True, kw_only=True)
class Calibrated(Criterion):
    """A criterion that looks at training samples.

    Args:
        samples: how many; the whole data set if it has fewer.
        batch_size: samples per batch; affects only speed, memory, and what an objective draws once per batch (the mask
            rate of MAR).
    """

    samples: int = 256
    batch_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("samples", "batch_size"):
            require(getattr(self, name) >= 1, f"{type(self).__name__}.{name}", getattr(self, name), "at least 1")

    @override
    def decisive(self, trainer: Trainer) -> Decisive:
        return Decisive(trainer, but=("batch_size",), but_of_trainer=("batch_size",))  # it does not train

    def calibration(self, task: Task, trainer: Trainer) -> Calibration:
        """Return the calibration of a task's network with these settings."""
        return Calibration(task, trainer, self.samples, self.batch_size, name=type(self).__name__)


class Calibration:
    """A task's network and the samples it is judged on. Every method leaves the network as it was.

    Processes share the batches: all must call a method, and get the same result.

    Args:
        task: the network, its objective and data.
        trainer: device, precision and seed.
        samples: how many training samples to use, at most.
        batch_size: samples per batch.
        name: label of the progress bar.

    Attributes:
        evaluations: sample forward passes so far, over all processes, each counted as a whole one.
    """

    def __init__(self, task: Task, trainer: Trainer, samples: int, batch_size: int, name: str = "calibration") -> None:
        self.task, self.trainer, self.batch_size, self.name = task, trainer, batch_size, name
        self.num_samples = min(samples, len(task.train))
        self.evaluations = 0
        self.device = trainer.accelerator.device
        self._order = order_of(task.train, trainer.seed, "calibration", self.num_samples)

    def losses(self, masks: Tensor, note: str = "") -> list[float]:
        """Return the calibration loss under each mask; infinite where it is not finite.

        Args:
            masks: (masks, num_blocks) zeros and ones.
            note: appended to the label of the progress bar.
        """
        means: list[float] = self.sample_losses(masks, note).mean(1).tolist()
        return means

    def sample_losses(self, masks: Tensor, note: str = "") -> Tensor:
        """Return the loss of every sample under each mask, (masks, samples); infinite where it is not finite.

        Args:
            masks: (masks, num_blocks) zeros and ones.
            note: appended to the label of the progress bar.
        """
        with self._open(len(masks), note) as progress, torch.no_grad(), self._gates:

            def work(rows: range) -> Tensor:
                inputs, found = self._inputs(rows), torch.empty(len(masks), len(rows), dtype=torch.float64)
                for i, losses in self._prefixes.evaluate(
                    masks.to(self.device), len(rows), lambda: self._losses(inputs).cpu().double()
                ):
                    found[i] = losses
                    progress.advance(len(rows))
                return found

            found = torch.cat(map_sharded(self._parts, work), dim=1)
        return found.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=torch.inf)

    def gradients(self) -> list[float]:
        """Return for every block the mean over samples of |dL/dm|, m being the block's mask, at m = 1.

        Raises:
            UserError: a value is not finite.
        """
        num_blocks = len(self.task.blocks)
        with self._open(1) as progress, torch.enable_grad(), self._gates as gates:
            self.task.teacher.requires_grad_(False)

            def work(rows: range) -> Tensor:
                inputs = self._inputs(rows)
                gates.mask = mask = torch.ones(len(rows), num_blocks, device=self.device, requires_grad=True)
                (gradient,) = torch.autograd.grad(self._losses(inputs).sum(), mask)
                progress.advance(len(rows))
                return gradient.abs().sum(0).cpu()

            total = torch.stack(map_sharded(self._parts, work)).sum(0)
        return self.finite((total / self.num_samples).tolist())

    def compare(self, spans: Sequence[Span], measure: Callable[[], Measure], clean: bool = False) -> list[float]:
        """Compare the residual stream before and after each span, averaged over the streams.

        Of a branch it is the stream after its block, without the branch and with it.

        Args:
            spans: first and last block of each; they may overlap.
            measure: makes the measure of one span and stream.
            clean: use inputs without noise, as the reference code of block influence does.

        Raises:
            UserError: a value is not finite, or a span holds several branches.
        """
        model, paths, backbone = self.task.teacher, self.task.blocks, self.task.backbone
        if backbone.units and any(first != last for first, last in spans):
            raise UserError(f"{self.name}: compares runs of whole blocks; leave backbone.units out, or take another")
        # No span reaches over two lists.
        streams = {span: streams_of(backbone.streams, block_of(paths[span[0]])) for span in spans}
        measures = {span: [measure() for _ in streams[span]] for span in spans}
        with self._open(1) as progress, torch.no_grad(), ExitStack() as hooks:
            for span in spans:
                first, last = (model.get_submodule(block_of(paths[i])) for i in span)
                if backbone.units:
                    branch = model.get_submodule(paths[span[0]])
                    again = watch_branch(measures[span], streams[span], branch, self._skipped(paths[span[0]]))
                    hooks.callback(first.register_forward_hook(again, with_kwargs=True).remove)
                    continue
                before, after = watch_span(measures[span], streams[span], first, paths[span[0]])
                hooks.callback(first.register_forward_pre_hook(before, with_kwargs=True).remove)
                hooks.callback(last.register_forward_hook(after).remove)
            for rows in local_share(self._parts):
                inputs = self._inputs(rows, clean)
                with self.trainer.accelerator.autocast():
                    self.task.loss.predict(model, inputs)
                progress.advance(len(rows))
        gathered = {span: [_together(own, measure()) for own in measures[span]] for span in spans}
        return self.finite([sum(m.value() for m in gathered[span]) / len(streams[span]) for span in spans])

    def _skipped(self, path: str) -> Callable[..., Any]:
        """What a branch does when it is skipped."""
        model = self.task.teacher
        branch = self.task.backbone.branches_in(model, block_of(path))[path]
        return Removed(branch, positional_names(model.get_submodule(path).forward)).forward

    def finite(self, values: list[float]) -> list[float]:
        """Return the values.

        Raises:
            UserError: one is not finite.
        """
        if not all(map(math.isfinite, values)):
            raise UserError(
                f"{self.name}: what the calibration samples give is not finite; check the checkpoint and the data, "
                "or use precision bf16 or fp32"
            )
        return values

    @property
    def _parts(self) -> list[range]:
        """The samples in batches, which the processes share."""
        return batches(self.num_samples, self.batch_size)

    def _inputs(self, rows: range, clean: bool = False) -> dict[str, Tensor]:
        """Prepared inputs of some samples. What a sample draws does not depend on the batch."""
        task, seed = self.task, self.trainer.seed
        prepare = task.loss.prepare_clean if clean else task.loss.prepare
        batch = task.train.__getitems__([self._order[i] for i in rows])
        on_device = {name: t.to(self.device) for name, t in batch.items()}
        return prepare(on_device, Rng(seed, "calibration", first=rows.start, strata=self.num_samples))

    def _losses(self, inputs: dict[str, Tensor]) -> Tensor:
        with self.trainer.accelerator.autocast():
            return self.task.loss.losses(self.task.teacher, inputs)

    @cached_property
    def _gates(self) -> Gates:
        return Gates(
            self.task.teacher,
            self.task.blocks,
            self._batch_dim,
            self.task.streams,
            self.task.backbone.unneeded,
        )

    @cached_property
    def _prefixes(self) -> Prefixes:
        return Prefixes(self._gates)

    @cached_property
    def _batch_dim(self) -> BatchDim:
        return self.task.batch_dim(self.task.teacher)

    @contextmanager
    def _open(self, passes: int, note: str = "") -> Iterator[Tracker]:
        """The network in eval mode on the device, and the progress of this process's share of some passes."""
        model = self.task.teacher.to(self.device)
        own = sum(map(len, local_share(self._parts)))
        with evaluating(model), self.trainer.track(self.name + note, passes * own) as progress:
            yield progress
        self.evaluations += passes * self.num_samples


def _together(own: Measure, empty: Measure) -> Measure:
    """Merge the measures of all processes: the result is the same on each of them."""
    if rank_and_world_size()[1] == 1:
        return own
    for state in map_sharded(range(rank_and_world_size()[1]), lambda process: own.state()):
        empty.merge(state)
    return empty
