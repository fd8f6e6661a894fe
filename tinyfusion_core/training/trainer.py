"""Settings of the training loop, shared by all stages."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from ..errors import UserError, require
from ..parsing.settings import PYTHON, Settings
from ..runtime.distributed import is_alone, rank_and_world_size
from ..runtime.progress import Tracker, track
from .block_transforms import block_transforms
from .steps.callbacks import Callback

if TYPE_CHECKING:
    from accelerate import Accelerator

NUMERICALLY_NEUTRAL = (
    "num_workers",
    "log_every",
    "checkpoint_every",
    "checkpoint_minutes",
    "keep_checkpoints",
    "keep_state",
    "max_skipped",
    "max_bad_samples",
    "micro_batch_size",
    "sharding",
    "activation_checkpointing",
    "compile",
    "timeout",
    "trackers",
    "project",
    "progress",
    "callbacks",
    "elsewhere",
)
"""Settings of the trainer that change no result, except for rounding and the draws of dropout."""


@dataclass(frozen=True, kw_only=True)
class Trainer(Settings):
    """How every stage of a run trains.

    Args:
        batch_size: samples per optimizer update, over all processes.
        precision: `auto` is that of the `Accelerator` that a script has made before, else bf16 on GPUs that support it
            and fp32 elsewhere.
        seed: seed of the whole run: masks, noise, time steps, data order and initial weights follow from it.
        num_workers: processes that read data; 0 reads in the training process.
        log_every: steps between two lines of `metrics.jsonl`.
        checkpoint_every: steps between two checkpoints.
        checkpoint_minutes: a checkpoint is also saved after this many minutes.
        keep_checkpoints: how many checkpoints of a stage are kept; if the newest is damaged, the one before it is used.
        keep_state: keep the last checkpoint of a recovery that has ended, so that `tinyfusion run --extend` can go on.
            With every weight in motion it is four times as large as the student.
        max_skipped: stop after this many steps in a row with a loss or gradient that is not finite.
        max_bad_samples: unreadable training samples that are tolerated, counted over a stage each time one is met; each
            is substituted by another, the same for any number of processes. One more stops the run.
        micro_batch_size: largest number of samples per forward pass and process (a score function runs each sample
            under all of its masks); a process with a larger share of the batch accumulates the gradients of several
            passes. By default its share is one pass.
        sharding: how several processes share a network: `ddp` gives each a copy, `fsdp` each a part of the weights,
            their gradients and optimizer state, block by block (FSDP2).
        activation_checkpointing: discard the activations inside blocks and recompute them in the backward pass.
        compile: run every block through `torch.compile`.
        timeout: seconds that a process waits for the others within a training step before the run ends with an error.
        trackers: where to log besides `metrics.jsonl`: `tensorboard`, `wandb`, `trackio` and others that accelerate
            supports; see docs/watching.md.
        project: project name, for trackers that have projects.
        progress: whether bars or lines on the screen say how far the work is; TINYFUSION_PROGRESS=0 turns them off too.
        callbacks: who is told of every step, logged line and checkpoint.
        elsewhere: does pieces of a search in other processes, which leave what they find in the search's folder, and
            yields each piece when it is done; see `selection.judging.recoveries.Entrant`. By default this process does
            them.
    """

    batch_size: int = 128
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    seed: int = 0
    num_workers: int = 0
    log_every: int = 10
    checkpoint_every: int = 500
    checkpoint_minutes: float = 15.0
    keep_checkpoints: int = 2
    keep_state: bool = True
    max_skipped: int = 10
    max_bad_samples: int = 0
    micro_batch_size: int | None = None
    sharding: Literal["ddp", "fsdp"] = "ddp"
    activation_checkpointing: bool = False
    compile: bool = False
    timeout: int = 1800
    trackers: tuple[str, ...] = ()
    project: str = "tinyfusion"
    progress: bool = True
    callbacks: tuple[Callback, ...] = field(default=(), metadata={PYTHON: True})
    elsewhere: Callable[[Sequence[Any]], Iterator[Any]] | None = field(default=None, metadata={PYTHON: True})

    def __post_init__(self) -> None:
        for name in ("batch_size", "log_every", "checkpoint_every", "keep_checkpoints", "max_skipped", "timeout"):
            require(getattr(self, name) >= 1, f"trainer.{name}", getattr(self, name), "at least 1")
        for name in ("num_workers", "max_bad_samples"):
            require(getattr(self, name) >= 0, f"trainer.{name}", getattr(self, name), "0 or more")
        require(self.checkpoint_minutes > 0, "trainer.checkpoint_minutes", self.checkpoint_minutes, "above 0")
        size = self.micro_batch_size
        require(size is None or size >= 1, "trainer.micro_batch_size", size, "at least 1")

    @cached_property
    def accelerator(self) -> Accelerator:
        """The processes, device and precision, by accelerate; made on first use.

        Processes, device and precision belong to the program: those of an `Accelerator` that a script has made before
        are these. What it has prepared, and its steps of accumulation, are left to it.

        Raises:
            UserError: precision and device or sharding do not go together, or the processes cannot train as one.
        """
        from accelerate import Accelerator, InitProcessGroupKwargs
        from accelerate.state import AcceleratorState, GradientState, is_initialized

        precision: str = self.precision
        if precision == "auto" and is_initialized():
            precision = AcceleratorState().mixed_precision
        elif precision == "auto":
            precision = "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "fp32"
        accumulation = GradientState().plugin_kwargs
        patience = InitProcessGroupKwargs(timeout=timedelta(seconds=self.timeout))
        try:
            accelerator = Accelerator(
                mixed_precision="no" if precision == "fp32" else precision,
                cpu=not torch.accelerator.is_available(),  # else torchrun's processes there stay alone
                kwargs_handlers=[patience],
            )
        except ValueError as e:  # accelerate keeps one precision for each process
            raise UserError(f"trainer.precision: {precision} cannot be had in this process: {e}") from e
        GradientState().plugin_kwargs = accumulation  # a new accelerator sets them for all
        started = int(os.environ.get("WORLD_SIZE", 1))
        if started != accelerator.num_processes and not is_alone():
            raise UserError(
                f"started as one of {started} processes (WORLD_SIZE), but accelerate sees {accelerator.num_processes}: "
                f"it cannot train with several on {accelerator.device.type}; start one"
            )
        if (kind := accelerator.distributed_type.value) in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
            raise UserError(
                f"accelerate is set to {kind} in this process, which shards whatever a script trains; start it "
                "without, and give the trainer sharding: fsdp"
            )
        if self.shards(accelerator) and precision == "fp16":
            raise UserError("trainer.precision: fp16 and its loss scaling do not go with sharding fsdp; use bf16")
        return accelerator

    def shards(self, accelerator: Accelerator | None = None) -> bool:
        """Return whether networks are sharded: FSDP is chosen, and there are several processes."""
        return self.sharding == "fsdp" and (accelerator or self.accelerator).num_processes > 1

    def to_device(self, model: nn.Module) -> nn.Module:
        """Move a network to the device, unless its blocks will be sharded there one by one. Returns it."""
        return model if self.shards() else model.to(self.accelerator.device)

    def transformed(self, blocks: Iterable[nn.Module]) -> AbstractContextManager[None]:
        """Recompute and compile blocks as the settings say, while the context is open. It must enclose gating."""
        return block_transforms(blocks, recompute=self.activation_checkpointing, compiled=self.compile)

    def split(self, processes: int) -> tuple[int, int]:
        """Return the rows of the batch per process, and the rows of one of its forward passes.

        Raises:
            UserError: the batch cannot be split evenly.
        """
        rows, left = divmod(self.batch_size, processes)
        if left or not rows:
            raise UserError(
                f"trainer.batch_size: {self.batch_size} cannot be split over {processes} processes; use a multiple"
            )
        micro = min(rows, self.micro_batch_size or rows)
        if rows % micro:
            raise UserError(
                f"trainer.batch_size: {self.batch_size} over {processes} process(es) is {rows} samples for each, which "
                f"cannot be split into passes of trainer.micro_batch_size {micro}; use a multiple of "
                f"{processes * micro}"
            )
        return rows, micro

    def parts(self, most: int, processes: int) -> int:
        """Return into how many equal parts, at most so many, the batch can be cut that can be `split` as it is."""

        def fits(num: int) -> bool:
            with suppress(UserError):
                return bool(replace(self, batch_size=self.batch_size // num).split(processes))
            return False

        return next((num for num in range(most, 1, -1) if self.batch_size % num == 0 and fits(num)), 1)

    def each_alone(self, num: int) -> Trainer | None:
        """Return the trainer with which each process does pieces of work alone; None if they do each piece together.

        Its passes have the size of a process's share of the batch, and so does what they need of memory.

        Args:
            num: how many pieces there are; if they are fewer than processes, some would wait.

        Raises:
            UserError: the batch cannot be split evenly.
        """
        processes = rank_and_world_size()[1]
        if not 1 < processes <= num or self.shards():
            return None
        return replace(self, micro_batch_size=self.split(processes)[1])

    def quiet(self) -> Trainer:
        """Return the trainer for one of many short trainings, which would be a run of its own to those who follow."""
        return replace(self, trackers=(), callbacks=())

    def track(self, name: str, total: int, done: int = 0) -> AbstractContextManager[Tracker]:
        """Show the progress of `total` units of work, on the main process; see `progress.track`."""
        return track(name, total, done, self.accelerator.is_main_process, self.progress)

    def with_batch_size(self, batch_size: int | None) -> Trainer:
        """Return this trainer with another batch size, or itself for None."""
        return self if batch_size is None else replace(self, batch_size=batch_size)
