"""The one training loop: teacher training, search and recovery all run here."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..dataloading.loader import Read, read_batches
from ..dataloading.order import order_of
from ..errors import Interrupted, UserError
from ..protocols.backbone import Batch
from ..protocols.data import Samples
from ..runtime.distributed import check_ranks_agree, on_every_rank, on_main_process
from ..runtime.progress import track
from ..runtime.run_folder import RunFolder
from ..runtime.seeding import Rng, seed_of
from ..runtime.signals import stop_requests
from ..runtime.trackers import tracked
from .objective import Objective, Optimization
from .step_guard import Agreed, Mishaps
from .trainer import Trainer

if TYPE_CHECKING:
    from .fsdp import Shards


class Fit:
    """A training, for one `run`: minimises an objective, from the run folder's checkpoint of its stage if there is one.

    Args:
        trainer: how to train.
        stage: name of the stage; part of every random stream.
        objective: what to minimise; its modules are trained in place.
        data: the samples to train on.
        prepare: turns a batch into inputs, drawing all of its randomness.
        optimization: how the parameters move.
        folder: where to log and to keep checkpoints; without it nothing is written.

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
    ) -> None:
        self.trainer, self.stage, self.objective = trainer, stage, objective
        self.data, self.prepare, self.how, self.folder = data, prepare, optimization, folder
        self.accelerator = trainer.accelerator
        self.main = self.accelerator.is_main_process
        self.rows, self.micro = trainer.split(self.accelerator.num_processes)
        self.first = self.accelerator.process_index * self.rows
        self.shards: Shards | None = None
        # Sum of the losses of the finite steps since the last logged one, and their number; seconds that earlier
        # processes spent; means of the last step's terms.
        self.window, self.count, self.before = 0.0, 0, 0.0
        self.terms: dict[str, float] = {}
        self.mishaps = Mishaps(
            stage, self.accelerator, trainer.max_skipped, trainer.max_bad_samples, trainer.checkpoint_minutes
        )

    def run(self) -> None:
        """Train.

        Raises:
            Interrupted: SIGINT or SIGTERM came; the step was finished and a checkpoint saved.
            UserError: too many steps in a row were not finite, the data cannot be read, or the disk is full.
        """
        with ExitStack() as stack:
            start = self._begin(stack)
            order = order_of(self.data, self.trainer.seed, self.stage, self.trainer.batch_size)
            indices = order.steps(start, self.how.steps, self.first, self.rows)
            self.started = time.monotonic()
            stop = stack.enter_context(stop_requests())
            stack.enter_context(torch.random.fork_rng())
            progress = stack.enter_context(track(self.stage, self.how.steps, done=start, show=self.main))
            self.track = stack.enter_context(self._tracked(start))
            for step, read in enumerate(read_batches(self.data, indices, self.trainer.num_workers), start):
                agreed = self._step(step, read, stop)
                progress.advance(note=f"loss {agreed.loss:.4f}")
                done, finished = step + 1, self.objective.finished()
                last = finished or done == self.how.steps
                if last or done % self.trainer.log_every == 0:
                    self._log(done)
                if last or agreed.signum or agreed.save or done % self.trainer.checkpoint_every == 0:
                    self._save(done, finished)
                if agreed.signum and self.folder is not None:
                    text = f"stopped at step {done} of {self.how.steps} of {self.stage}"
                    raise Interrupted(f"{text}, all of it saved", agreed.signum, agreed=True)
                if agreed.signum:
                    raise Interrupted(f"stopped at step {done} of {self.stage}", agreed.signum, agreed=True)
                if last:
                    break
        self.accelerator.free_memory()

    def _begin(self, stack: ExitStack) -> int:
        """Load what has been saved, place or shard the networks, make the optimizer. Returns the first step to do."""
        objective, accelerator = self.objective, self.accelerator
        average = self.how.ema.average if self.how.ema else None
        state = self._load()
        if accelerator.num_processes > 1:
            networks = [objective, *(network for network, _ in objective.beside())]
            tensors = (t for network in networks for t in network.state_dict().values())
            check_ranks_agree(accelerator, tensors, f"{self.stage}: the weights to begin with")
        if self.trainer.shards():
            from .fsdp import Shards  # imports slowly

            self.shards = stack.enter_context(Shards(accelerator, objective, self.how.ema))
        else:
            objective.to(accelerator.device)
        if average is not None:
            average.to(accelerator.device)
        placed = self.shards.parameters if self.shards else list
        groups = [
            {**group, "params": placed(group["params"]), "base_lr": group["lr"]}
            for group in self.how.groups
            if len(group["params"])
        ]
        self.parameters = [p for group in groups for p in group["params"]]
        self.raw = torch.optim.AdamW(groups, weight_decay=0.0)
        if state is not None:
            moments = state["optimizer"]
            self.raw.load_state_dict(self.shards.spread(moments, self.parameters) if self.shards else moments)
        self.optimizer = accelerator.prepare_optimizer(self.raw, device_placement=False)
        # Its evaluation mode is without DDP.
        sharded = self.shards is not None
        self.module = accelerator.prepare_model(objective, device_placement=False, evaluation_mode=sharded)
        if state is None:
            return 0
        step = int(state["step"])
        if state["finished"] or step >= self.how.steps:
            objective.before_step(self._progress(step - 1))  # schedules stand where they stood
            return self.how.steps
        return step

    def _step(self, step: int, read: Read, stop: list[int]) -> Agreed:
        """One update."""
        accelerator = self.accelerator
        progress = self._progress(step)
        for group in self.raw.param_groups:
            group["lr"] = group["base_lr"] * self.how.schedule(progress)
        self.objective.before_step(progress)
        if read.batch is None:
            raise UserError(f"{read.bad[-1]}, and no sample to take in its place either")
        batch = {name: t.to(accelerator.device, non_blocking=True) for name, t in read.batch.items()}
        found = torch.stack([self._pass(step, batch, row) for row in range(0, self.rows, self.micro)]).mean(0)
        if self.shards is None:
            norm = accelerator.clip_grad_norm_(self.parameters, self.how.clip)
        else:
            norm = self.shards.clip(self.parameters, self.how.clip)
        agreed = self.mishaps.agree(step, found, norm, self.objective.gates, len(read.bad), stop)
        self.mishaps.bear(step, agreed, read.bad)
        self.terms = dict(zip(self.objective.terms, agreed.terms, strict=True))
        if not self.objective.learning:  # gradients of zero would use up Adam's bias correction: too large first steps
            for gate in self.objective.gates:
                gate.grad = None
        if agreed.finite or accelerator.scaler is not None:  # a loss scaler must see the overflow to adapt
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if agreed.finite:
            self.window, self.count = self.window + agreed.loss, self.count + 1
        if agreed.finite and self.how.ema is not None:
            self.how.ema.average.update_parameters(self.how.ema.source)
        return agreed

    def _progress(self, step: int) -> float:
        return step / max(1, self.how.steps - 1)

    def _pass(self, step: int, batch: Batch, row: int) -> Tensor:
        """Forward and backward for some of this process's rows. Returns the mean of the losses and of their terms."""
        trainer, first = self.trainer, self.first + row
        # Dropout and its like draw from the global generator; a step's numbers must not depend on the past.
        torch.manual_seed(seed_of(trainer.seed, self.stage, step, "forward", first))
        rng = Rng(trainer.seed, self.stage, step, first)
        some = {name: t[row : row + self.micro] for name, t in batch.items()}
        # FSDP averages after every pass: whole gradients would take the memory that it is there to save.
        last = row + self.micro == self.rows
        with nullcontext() if last or self.shards else self.accelerator.no_sync(self.module):
            loss, losses = self.module(self.prepare(some, rng), rng)
            self.accelerator.backward(loss * (self.micro / self.rows))
        return torch.stack([values.mean().float() for values in (losses, *self.objective.terms.values())])

    def _log(self, step: int) -> None:
        if self.folder is not None and self.main:
            values = {
                "loss": self.window / self.count if self.count else None,
                "lr": [group["lr"] for group in self.raw.param_groups],
                "skipped": self.mishaps.skipped,
                "bad_samples": self.mishaps.bad,
                "seconds": round(self._seconds(), 2),
                **{name: round(value, 6) for name, value in self.terms.items()},
                **self.objective.metrics(),
            }
            try:
                self.folder.log(self.stage, step, values)
            except UserError as e:
                self.mishaps.trouble = e
            self.track(values, step)
        self.window, self.count = 0.0, 0

    def _tracked(self, start: int) -> AbstractContextManager[Callable[[Mapping[str, Any], int], None]]:
        if self.folder is None or not self.main:
            return nullcontext(lambda values, step: None)
        return tracked(self.trainer.trackers, self.trainer.project, self.folder.path, self.stage, start)

    def _seconds(self) -> float:
        return self.before + time.monotonic() - self.started

    def _save(self, step: int, finished: bool) -> None:
        if self.folder is None:
            return
        checkpoints, state = self.folder.checkpoints(self.stage), self._state(step, finished)

        def save() -> None:
            self.mishaps.settle()
            checkpoints.save(step, state, self.trainer.keep_checkpoints)

        on_main_process(save)
        self.mishaps.saved = time.monotonic()

    def _state(self, step: int, finished: bool) -> dict[str, Any]:
        """All that goes on from here; with sharded networks whole on the main process alone."""
        frozen = {name for name, p in self.objective.named_parameters() if not p.requires_grad}
        tensors = {
            "weights": {k: v for k, v in self.objective.state_dict().items() if k not in frozen},
            "optimizer": self.raw.state_dict(),
            "ema": self.how.ema.average.state_dict() if self.how.ema else None,
        }
        return {
            "step": step,
            "finished": finished,
            **(self.shards.gathered(tensors) if self.shards else tensors),
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
            "counters": [self.window, self.count, self._seconds()],
            "mishaps": [self.mishaps.skipped, self.mishaps.streak, self.mishaps.bad],
        }

    def _load(self) -> dict[str, Any] | None:
        """Take over the last checkpoint, all but the optimizer's state; None when there is none."""
        if self.folder is None:
            return None
        checkpoints, folder = self.folder.checkpoints(self.stage), self.folder
        name = on_main_process(checkpoints.newest)
        state = None if name is None else on_every_rank(lambda: checkpoints.load(name))
        on_main_process(lambda: folder.rewind(self.stage, int(state["step"]) if state else 0))
        if state is None:
            return None
        self.objective.load_state_dict(state["weights"], strict=False)
        if self.how.ema is not None:
            self.how.ema.average.load_state_dict(state["ema"])
        if state["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.window, self.count, self.before = state["counters"]
        self.mishaps.skipped, self.mishaps.streak, self.mishaps.bad = state["mishaps"]
        return state
