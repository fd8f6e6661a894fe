"""The one training loop: teacher training, search and recovery all run here."""

from __future__ import annotations

import math
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from .backbone import Batch
from .data import Samples, order_of
from .errors import Diverged, Interrupted, UserError, require
from .progress import track
from .randomness import Rng, seed_of
from .run_folder import RunFolder
from .stopping import stop_requests

if TYPE_CHECKING:
    from accelerate import Accelerator

INDIFFERENT = ("num_workers", "log_every", "checkpoint_every", "max_skipped")
"""Settings of the trainer that change no number."""


class Objective(nn.Module, ABC):
    """What a stage minimises. Everything differentiable happens in `forward`, inside what DDP or FSDP wraps."""

    @abstractmethod
    def forward(self, inputs: Batch, rng: Rng) -> tuple[Tensor, Tensor]:
        """The scalar to minimise, and the (B,) losses it came from, detached."""

    def before_step(self, progress: float) -> None:
        """Move schedules to a point of the stage, 0 at the first step and 1 at the last."""

    def finished(self) -> bool:
        """Whether to stop before the last step; asked after every one, the same answer on every process."""
        return False

    def metrics(self) -> dict[str, Any]:
        """What to record at a logged step, besides the loss."""
        return {}


@dataclass(frozen=True)
class Ema:
    """An exponential moving average of a module that is being trained.

    Args:
        source: the module.
        decay: weight of the past at each step.
    """

    source: nn.Module
    decay: float

    @cached_property
    def average(self) -> AveragedModel:
        """Holds the averaged copy in `.module`. Made when first needed, which must be outside of gating."""
        return AveragedModel(self.source, multi_avg_fn=get_ema_multi_avg_fn(self.decay))  # type: ignore[no-untyped-call]


@dataclass(frozen=True, kw_only=True)
class Optimization:
    """How a stage's parameters move.

    Args:
        groups: AdamW parameter groups; each has its own `lr` and may have its own `weight_decay`.
        steps: optimizer updates.
        schedule: factor on every learning rate at a progress from 0 to 1.
        clip: largest norm of the gradient of all groups together.
        ema: average to keep.
    """

    groups: Sequence[Mapping[str, Any]]
    steps: int
    schedule: Callable[[float], float] = lambda progress: 1.0
    clip: float = 1.0
    ema: Ema | None = None


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """How every stage of a run trains.

    Args:
        batch_size: samples of one optimizer update, over all processes.
        precision: `auto` is bf16 on GPUs that have it and fp32 elsewhere.
        seed: of the whole run: masks, noise, time steps, data order and initial weights are functions of it.
        num_workers: processes that read data; 0 reads in the training process.
        log_every: steps between two lines of `metrics.jsonl`.
        checkpoint_every: steps between two checkpoints.
        max_skipped: stop after so many steps in a row with a loss or gradient that is not finite.
    """

    batch_size: int = 128
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    seed: int = 0
    num_workers: int = 0
    log_every: int = 10
    checkpoint_every: int = 500
    max_skipped: int = 10

    def __post_init__(self) -> None:
        for name in ("batch_size", "log_every", "checkpoint_every", "max_skipped"):
            require(getattr(self, name) >= 1, f"trainer.{name}", getattr(self, name), "at least 1")
        require(self.num_workers >= 0, "trainer.num_workers", self.num_workers, "0 or more")

    @cached_property
    def accelerator(self) -> Accelerator:
        from accelerate import Accelerator

        precision = self.precision
        if precision == "auto":
            precision = "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "fp32"
        try:
            return Accelerator(mixed_precision="no" if precision == "fp32" else precision)
        except ValueError as e:  # accelerate keeps one precision for each process
            raise UserError(f"trainer.precision: {precision} cannot be had in this process: {e}") from e

    def with_batch_size(self, batch_size: int | None) -> Trainer:
        """This trainer with another batch size, or itself when none is given."""
        return self if batch_size is None else replace(self, batch_size=batch_size)

    def fit(
        self,
        stage: str,
        objective: Objective,
        data: Samples,
        prepare: Callable[[Batch, Rng], dict[str, Tensor]],
        optimization: Optimization,
        run: RunFolder | None = None,
    ) -> None:
        """Minimise an objective; continue from the run folder's checkpoint of this stage if there is one.

        Args:
            stage: name of the stage; part of every random stream.
            objective: what to minimise; its modules are trained in place.
            data: the samples to train on.
            prepare: turns a batch into inputs, drawing all of its randomness.
            optimization: how the parameters move.
            run: where to log and to keep checkpoints; without it nothing is written.

        Raises:
            Interrupted: SIGINT or SIGTERM came; the step was finished and a checkpoint saved.
            UserError: too many steps in a row were not finite, or the batch cannot be split.
        """
        _Fit(self, stage, objective, data, prepare, optimization, run).run()


class _Fit:
    """The state of one call of `Trainer.fit`."""

    def __init__(
        self,
        trainer: Trainer,
        stage: str,
        objective: Objective,
        data: Samples,
        prepare: Callable[[Batch, Rng], dict[str, Tensor]],
        optimization: Optimization,
        folder: RunFolder | None,
    ) -> None:
        self.trainer, self.stage, self.objective = trainer, stage, objective
        self.data, self.prepare, self.how, self.folder = data, prepare, optimization, folder
        self.accelerator = trainer.accelerator
        self.main = self.accelerator.is_main_process
        self.rows, left = divmod(trainer.batch_size, self.accelerator.num_processes)
        if left or not self.rows:
            raise UserError(
                f"trainer.batch_size: {trainer.batch_size} cannot be split over "
                f"{self.accelerator.num_processes} processes; use a multiple"
            )
        # Sum of the losses of the finite steps since the last logged one, and their number; steps skipped in all
        # and in a row; seconds that earlier processes spent.
        self.window, self.count = 0.0, 0
        self.skipped, self.streak, self.before = 0, 0, 0.0

    def run(self) -> None:
        objective = self.objective.to(self.accelerator.device)
        parameters = [p for group in self.how.groups for p in group["params"]]
        if self.how.ema is not None:
            self.how.ema.average.to(self.accelerator.device)
        groups = [{**group, "base_lr": group["lr"]} for group in self.how.groups if len(group["params"])]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        start = self._resume()
        module, optimizer = self.accelerator.prepare(objective, self.optimizer)
        first = self.accelerator.process_index * self.rows
        order = order_of(self.data, self.trainer.seed, self.stage, self.trainer.batch_size)
        loader: DataLoader[Any] = DataLoader(
            self.data,  # type: ignore[arg-type]  # read by lists of indices, see Samples
            batch_sampler=order.steps(start, self.how.steps, first, self.rows),
            collate_fn=_as_is,
            num_workers=self.trainer.num_workers,
            generator=torch.Generator(),  # else the loader draws from the global generator
        )
        self.started = time.monotonic()
        with (
            stop_requests() as stop,
            torch.random.fork_rng(),
            track(self.stage, self.how.steps, done=start, show=self.main) as progress,
        ):
            for step, batch in enumerate(loader, start):
                loss, asked = self._step(step, batch, module, optimizer, parameters, first, stop)
                progress.advance(note=f"loss {loss:.4f}")
                done, finished = step + 1, self.objective.finished()
                if done % self.trainer.log_every == 0 or done == self.how.steps or finished:
                    self._log(done)
                if finished and asked and self.folder is not None:
                    self._save(self.how.steps)  # there is no step left to go on with
                    raise Interrupted(f"stopped at step {done} of {self.stage}, its last", _signal(stop))
                if finished:
                    break
                if asked and self.folder is not None:
                    self._save(done)
                    raise Interrupted(f"stopped at step {done} of {self.how.steps} of {self.stage}", _signal(stop))
                if asked:
                    raise KeyboardInterrupt
                if done % self.trainer.checkpoint_every == 0 and done < self.how.steps:
                    self._save(done)
        self.accelerator.free_memory()

    def _step(
        self,
        step: int,
        batch: Batch,
        module: nn.Module,
        optimizer: Any,
        parameters: list[nn.Parameter],
        first: int,
        stop: list[int],
    ) -> tuple[float, bool]:
        """One update. Returns the mean loss, and whether any process has been asked to stop."""
        accelerator, seed = self.accelerator, self.trainer.seed
        progress = step / max(1, self.how.steps - 1)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * self.how.schedule(progress)
        # Dropout and its like draw from the global generator; a step's numbers must not depend on the past.
        torch.manual_seed(seed_of(seed, self.stage, step, "forward", accelerator.process_index))
        self.objective.before_step(progress)
        rng = Rng(seed, self.stage, step, first)
        batch = {name: t.to(accelerator.device, non_blocking=True) for name, t in batch.items()}
        loss, losses = module(self.prepare(batch, rng), rng)
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(parameters, self.how.clip)
        mine = torch.stack([losses.mean().float(), losses.new_tensor(float(bool(stop)), dtype=torch.float32)])
        mean, asked = accelerator.reduce(mine, reduction="mean").tolist()
        # Both are the same on every process, so all of them skip or none.
        finite = math.isfinite(mean) and bool(torch.isfinite(torch.as_tensor(norm)))
        if finite or accelerator.scaler is not None:  # a loss scaler must see the overflow to adapt
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if finite and self.how.ema is not None:
            self.how.ema.average.update_parameters(self.how.ema.source)
        self._count(step, mean, finite)
        return mean, asked > 0

    def _count(self, step: int, loss: float, finite: bool) -> None:
        if finite:
            self.window, self.count, self.streak = self.window + loss, self.count + 1, 0
            return
        self.skipped, self.streak = self.skipped + 1, self.streak + 1
        if self.streak >= self.trainer.max_skipped:
            raise Diverged(
                f"{self.stage}: loss or gradient not finite in {self.streak} steps in a row (up to step {step + 1}). "
                "Lower the learning rate, use precision bf16 or fp32, or check the checkpoint and the data; "
                "trainer.max_skipped sets the patience"
            )

    def _log(self, step: int) -> None:
        if self.folder is not None and self.main:
            values = {
                "loss": self.window / self.count if self.count else None,
                "lr": [group["lr"] for group in self.optimizer.param_groups],
                "skipped": self.skipped,
                "seconds": round(self._seconds(), 2),
                **self.objective.metrics(),
            }
            self.folder.log(self.stage, step, values)
        self.window, self.count = 0.0, 0

    def _seconds(self) -> float:
        return self.before + time.monotonic() - self.started

    def _save(self, step: int) -> None:
        if self.folder is None or not self.main:
            return
        frozen = {name for name, p in self.objective.named_parameters() if not p.requires_grad}
        state = {
            "step": step,
            "weights": {k: v for k, v in self.objective.state_dict().items() if k not in frozen},
            "optimizer": self.optimizer.state_dict(),
            "ema": self.how.ema.average.state_dict() if self.how.ema else None,
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
            "counters": [self.window, self.count, self.skipped, self.streak, self._seconds()],
        }
        self.folder.save_checkpoint(self.stage, state)

    def _resume(self) -> int:
        if self.folder is None:
            return 0
        state = self.folder.load_checkpoint(self.stage)
        step = state["step"] if state else 0
        if self.main:
            self.folder.rewind(self.stage, step)
        if state is None:
            return 0
        self.objective.load_state_dict(state["weights"], strict=False)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.how.ema is not None:
            self.how.ema.average.load_state_dict(state["ema"])
        if state["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.window, self.count, self.skipped, self.streak, self.before = state["counters"]
        return int(step)


def cosine(final: float) -> Callable[[float], float]:
    """A schedule that falls from 1 to `final` along half a cosine."""
    return lambda progress: final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


def decay_for(steps: int) -> float:
    """The decay of an average that looks back over a tenth of the steps: 0.999 for 10,000, 0.9999 for 100,000."""
    return max(0.0, 1 - 10 / steps)


def _signal(stop: list[int]) -> int:
    """The signal that this process was sent; another process's is taken for an interrupt."""
    return stop[0] if stop else signal.SIGINT


def _as_is(batch: Any) -> Any:
    return batch
