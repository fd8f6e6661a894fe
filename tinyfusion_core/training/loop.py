"""The training loop, shared by teacher training, search and recovery."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..dataloading.loader import LoadedBatch, load_batches
from ..dataloading.order import order_of
from ..errors import Interrupted, UserError
from ..protocols.backbone import Batch
from ..protocols.data import Samples
from ..runtime.distributed import naming_the_dead, on_every_rank, on_main_process
from ..runtime.files import write_json
from ..runtime.progress import Tracker, logger
from ..runtime.run_folder import RunFolder
from ..runtime.seeding import Rng
from ..runtime.signals import stop_requests
from ..runtime.stages import FORECASTS
from ..runtime.trackers import tracked
from .forecasting.forecast import sentence
from .objective import Objective, Optimization
from .state import Meter, TrainingState
from .steps.agreement import check_ranks_agree
from .steps.callbacks import Listeners, Moment
from .steps.step_guard import StepGuard, StepReport
from .steps.update import ADAMW, Rows, Update, own_accumulation
from .trainer import Trainer

if TYPE_CHECKING:
    from .fsdp import ShardedNetworks
    from .validation import Validator

Track = Callable[[Mapping[str, Any], int], None]
"""Sends the values of a step to the trackers."""


class Fit:
    """One training run of a stage; resumes from the stage's checkpoint if there is one.

    Args:
        trainer: how to train.
        stage: name of the stage; part of every random stream.
        objective: what to minimise; its modules are trained in place.
        data: the samples to train on.
        prepare: turns a batch into inputs, drawing all of its randomness.
        optimization: parameter groups, schedule, clipping and average.
        folder: where to log and to keep checkpoints; without it nothing is written.
        validator: judges the network meanwhile.

    Raises:
        UserError: the batch cannot be split over the processes.
    """

    def __init__(
        self,
        trainer: Trainer,
        stage: str,
        objective: Objective,
        data: Samples,
        prepare: Callable[[Batch, Rng], dict[str, Tensor]],
        optimization: Optimization,
        folder: RunFolder | None,
        validator: Validator | None = None,
    ) -> None:
        self.validator = validator
        self.trainer, self.stage, self.objective, self.data = trainer, stage, objective, data
        self.prepare, self.optimization, self.folder = prepare, optimization, folder
        accelerator = trainer.accelerator
        guard = StepGuard(stage, accelerator, trainer.max_skipped, trainer.max_bad_samples)
        self._state = TrainingState(objective, optimization.ema, accelerator.scaler, Meter(), guard, validator)
        self._rows, self._listeners = Rows.of(trainer), Listeners(trainer.callbacks)
        self._saved = time.monotonic()

    @naming_the_dead()
    def run(self) -> None:
        """Train.

        Raises:
            Interrupted: SIGINT or SIGTERM arrived; the step was finished and a checkpoint saved.
            UserError: too many steps in a row were not finite, the data cannot be read, the disk is full, or another
                process has died.
        """
        trainer, steps = self.trainer, self.optimization.steps
        with ExitStack() as stack:
            stack.enter_context(own_accumulation())
            update, start = self._begin(stack)
            order = order_of(self.data, trainer.seed, self.stage, trainer.batch_size)
            indices = order.steps(start, steps, self._rows.first, self._rows.count)
            self._state.meter.start()
            stop = stack.enter_context(stop_requests())
            stack.enter_context(torch.random.fork_rng())
            progress = stack.enter_context(trainer.track(self.stage, steps, done=start))
            log_to = stack.enter_context(self._trackers(start))
            for step, loaded in enumerate(load_batches(self.data, indices, trainer.num_workers), start):
                report = self._step(update, step, loaded, stop)
                progress.advance(note=f"loss {report.loss:.4f}")
                done, finished = step + 1, self._finishes(step + 1, report)
                now = Moment(self.stage, done, steps, report.loss, trainer.accelerator.is_main_process)
                self._listeners.tell("on_step", now)
                last = finished or done == steps
                if last or done % trainer.log_every == 0 or (self.validator and self.validator.metrics()):
                    self._log(update, now, log_to)
                    self._foretell(now, progress)
                if last or report.signum or report.checkpoint_due or done % trainer.checkpoint_every == 0:
                    self._save(update, now, finished)
                if report.signum:
                    self._interrupt(done, report.signum)
                if last:
                    self._tell_why(now, progress)
                    break
        trainer.accelerator.free_memory()

    def _begin(self, stack: ExitStack) -> tuple[Update, int]:
        """Load the checkpoint, place or shard the networks, make the optimizer. Returns the update and first step."""
        objective, steps = self.objective, self.optimization.steps
        saved = self._load()
        self._check_ranks_agree()
        networks = self._place(stack)
        update = Update(self.trainer, self.stage, objective, self.prepare, self.optimization, self._rows, networks)
        if saved is None:
            return update, 0
        moments, step = saved["optimizer"], int(saved["step"])
        if (before := saved.get("made_with", ADAMW)) != update.made_with:
            raise UserError(
                f"{self.stage}: the checkpoint was made with {' and '.join(before)}, and now it is "
                f"{' and '.join(update.made_with)}; give the same, or another run folder"
            )
        update.load(
            networks.shard_moments(moments, update.parameters) if networks else moments, saved.get("scheduler") or {}
        )
        if saved["finished"] or step >= steps:
            objective.before_step(self.optimization.progress(step - 1))  # schedules stand where they stood
            return update, steps
        return update, step

    def _check_ranks_agree(self) -> None:
        accelerator = self.trainer.accelerator
        if accelerator.num_processes > 1:
            networks = [self.objective, *(network for network, _ in self.objective.frozen_modules())]
            tensors = (t for network in networks for t in network.state_dict().values())
            check_ranks_agree(accelerator, tensors, f"{self.stage}: the weights to begin with")

    def _place(self, stack: ExitStack) -> ShardedNetworks | None:
        """Move the networks to the device, or shard them while the stack is open."""
        accelerator, ema, networks = self.trainer.accelerator, self.optimization.ema, None
        if self.trainer.shards():
            from .fsdp import ShardedNetworks  # imports slowly

            networks = stack.enter_context(ShardedNetworks(accelerator, self.objective, ema))
        else:
            self.objective.to(accelerator.device)
        if ema is not None:
            ema.average.module.to(accelerator.device)
        return networks

    def _step(self, update: Update, step: int, loaded: LoadedBatch, stop: list[int]) -> StepReport:
        """One update, in which all processes agree."""
        update.begin(step)
        if loaded.batch is None:
            raise UserError(f"{loaded.problems[-1]}, and no sample to take in its place either")
        means, norm = update.accumulate(step, loaded.batch)
        guard = self._state.guard
        report = guard.reduce(
            step,
            means,
            norm,
            self.objective.gates,
            bad_samples=len(loaded.problems),
            checkpoint_due=time.monotonic() - self._saved >= 60 * self.trainer.checkpoint_minutes,
            stop=stop,
            asked=self._listeners.stop,
        )
        guard.check(step, report, loaded.problems, last=step + 1 == self.optimization.steps)
        update.apply(report.finite)
        self.objective.after_step(report.finite)
        self._state.meter.add(report, list(self.objective.terms))
        return report

    def _finishes(self, done: int, report: StepReport) -> bool:
        """Judge, if it is time to. Returns whether the stage ends here, before its last step or at it."""
        finished = report.asked or self.objective.finished()
        if self.validator is not None:
            finished |= self.validator.after(done, last=finished or done == self.optimization.steps)
        return finished

    def _log(self, update: Update, now: Moment, log_to: Track) -> None:
        meter, guard = self._state.meter, self._state.guard
        if self._listeners.callbacks or (self.folder is not None and now.main):
            values = {
                "loss": meter.loss(),
                "lr": update.rates,
                "skipped": guard.skipped,
                "bad_samples": guard.bad_samples,
                "seconds": round(meter.seconds(), 2),
                **{name: round(value, 6) for name, value in meter.terms.items()},
                **self.objective.metrics(),
                **(self.validator.metrics() if self.validator else {}),
            }
            if self.folder is not None and now.main:
                try:
                    self.folder.log(self.stage, now.step, values)
                except UserError as e:
                    guard.pending = e
                log_to(values, now.step)
            self._listeners.tell("on_log", now, values)
        meter.reset()

    def _tell_why(self, now: Moment, progress: Tracker) -> None:
        """Say what has ended the training early, if its judgements have."""
        if now.step < now.steps and self.validator is not None and (why := self.validator.ended_by):
            progress.announce(f"{self.stage}: ended at step {now.step:,} of {now.steps:,}: {why}")

    def _foretell(self, now: Moment, progress: Tracker) -> None:
        """Keep what a judged training is expected to come to, and say it once."""
        begin = math.ceil((self.optimization.horizon or now.steps) / 10)
        found = self.validator.forecasts(begin, now.steps) if self.validator is not None else None
        if found is None or not now.main:
            return
        if self.folder is not None:
            try:
                write_json(self.folder / FORECASTS, found)
            except UserError as e:
                self._state.guard.pending = e
        if found["first"]["step"] == now.step:
            progress.announce(f"{self.stage}: {sentence(found['first'], self._state.meter.seconds())}")

    def _trackers(self, start: int) -> AbstractContextManager[Track]:
        if self.folder is None or not self.trainer.accelerator.is_main_process:
            return nullcontext(lambda values, step: None)
        return tracked(self.trainer.trackers, self.trainer.project, self.folder.path, self.stage, start)

    def _interrupt(self, done: int, signum: int) -> None:
        """Raise Interrupted; all processes stop at this step."""
        if self.folder is None:
            raise Interrupted(f"stopped at step {done} of {self.stage}", signum, agreed=True)
        text = f"stopped at step {done} of {self.optimization.steps} of {self.stage}"
        raise Interrupted(f"{text}, all of it saved", signum, agreed=True)

    def _save(self, update: Update, now: Moment, finished: bool) -> None:
        if self.folder is None:
            return
        checkpoints, guard = self.folder.checkpoints(self.stage), self._state.guard
        state = self._state.state_dict(now.step, finished, update)

        def save() -> Path:
            guard.raise_pending()
            return checkpoints.save(now.step, state, self.trainer.keep_checkpoints)

        file = on_main_process(save)
        self._saved = time.monotonic()
        if now.main:
            logger.info("%s: step %d of %d saved as %s", self.stage, now.step, now.steps, file)
        self._listeners.tell("on_checkpoint", now, file)

    def _load(self) -> dict[str, Any] | None:
        """Load the last checkpoint, except for the optimizer's state; None if there is none."""
        if self.folder is None:
            return None
        checkpoints, folder = self.folder.checkpoints(self.stage), self.folder
        name = on_main_process(checkpoints.newest)
        state = None if name is None else on_every_rank(lambda: checkpoints.load(name))
        on_main_process(lambda: folder.rewind(self.stage, int(state["step"]) if state else 0))
        if state is not None:
            self._state.load_state_dict(state)
        return state
