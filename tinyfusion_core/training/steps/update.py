"""One optimizer step: forward and backward passes over this process's rows, clipping, the update."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...protocols.backbone import Batch
from ...runtime.seeding import Rng, seed_forward, seed_of, to_device
from ..objective import Objective, Optimization
from ..trainer import Trainer
from .optimizers import Joined

if TYPE_CHECKING:
    from ..fsdp import ShardedNetworks

ADAMW = ["AdamW"]
"""What checkpoints were made with before they said it."""


@dataclass(frozen=True)
class Rows:
    """This process's part of every batch.

    Attributes:
        first: its first row.
        count: number of rows.
        micro: rows per forward pass.
    """

    first: int
    count: int
    micro: int

    @staticmethod
    def of(trainer: Trainer) -> Rows:
        """Return this process's rows.

        Raises:
            UserError: the batch cannot be split over the processes.
        """
        accelerator = trainer.accelerator
        count, micro = trainer.split(accelerator.num_processes)
        return Rows(accelerator.process_index * count, count, micro)


@contextmanager
def own_accumulation() -> Iterator[None]:
    """Accumulate as our loop says, whatever a script around it has told accelerate, which holds it for all."""
    from accelerate.state import GradientState

    state = GradientState()
    before = state.plugin_kwargs, state.sync_gradients
    state.plugin_kwargs, state.sync_gradients = {**state.plugin_kwargs, "num_steps": 1}, True
    try:
        yield
    finally:
        state.plugin_kwargs, state.sync_gradients = before


class Update:
    """Updates the parameters of an objective whose networks are on their device, or sharded.

    Args:
        trainer: how to train.
        stage: name of the stage; part of every random stream.
        objective: what to minimise.
        prepare: turns a batch into inputs, drawing all of its randomness.
        optimization: parameter groups, schedule, clipping and average.
        rows: this process's part of every batch.
        networks: the sharded networks; None if replicated.

    Attributes:
        scheduler: what sets the learning rates, if it is not the schedule.
        made_with: the names of the classes of the optimizers and the scheduler.
        rates: the learning rates of the step.
    """

    def __init__(
        self,
        trainer: Trainer,
        stage: str,
        objective: Objective,
        prepare: Callable[[Batch, Rng], dict[str, Tensor]],
        optimization: Optimization,
        rows: Rows,
        networks: ShardedNetworks | None,
    ) -> None:
        self.trainer, self.stage, self.objective, self.prepare = trainer, stage, objective, prepare
        self.optimization, self.networks, self.rows = optimization, networks, rows
        present = networks.parameters if networks else list
        groups = [{**group, "params": present(group["params"])} for group in optimization.groups if group["params"]]
        self.parameters = [p for group in groups for p in group["params"]]
        accelerator, (made, self.scheduler) = trainer.accelerator, optimization.make(groups)
        optimizers = made.parts if isinstance(made, Joined) else [made]
        self.made_with = [type(part).__name__ for part in (*optimizers, self.scheduler) if part is not None]
        self.optimizer = accelerator.prepare_optimizer(made, device_placement=False)
        # In accelerate's evaluation mode a module is not wrapped in DDP.
        self._module = accelerator.prepare_model(
            objective, device_placement=False, evaluation_mode=networks is not None
        )

    def load(self, optimizer: dict[str, Any], scheduler: dict[str, Any]) -> None:
        """Go on from the states of the optimizer and of its scheduler, if it has one."""
        self.optimizer.load_state_dict(optimizer)
        if self.scheduler is not None:
            self.scheduler.load_state_dict(scheduler)

    def begin(self, step: int) -> None:
        """Set all schedules to a step."""
        progress = self.optimization.progress(step)
        for group in self.optimizer.param_groups if self.scheduler is None else ():
            group["lr"] = group["base_lr"] * self.optimization.schedule(progress)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.objective.before_step(progress)

    def accumulate(self, step: int, batch: Batch) -> tuple[Tensor, Tensor]:
        """Run all forward and backward passes of a step.

        Args:
            step: the step.
            batch: this process's rows.

        Returns:
            Means of this process's losses and of their terms, (1 + terms,), and the norm of the gradient before
            clipping, a scalar.
        """
        accelerator, rows, clip = self.trainer.accelerator, self.rows, self.optimization.clip
        batch = {name: to_device(t, accelerator.device) for name, t in batch.items()}
        means = torch.stack([self._pass(step, batch, row) for row in range(0, rows.count, rows.micro)]).mean(0)
        if self.networks is None:
            return means, accelerator.clip_grad_norm_(self.parameters, clip)
        return means, self.networks.clip(self.parameters, clip)

    def apply(self, finite: bool) -> None:
        """Step the optimizer and the average, unless loss or gradient were not finite; then clear the gradient."""
        if not self.objective.learning:  # gradients of zero would use up Adam's bias correction: too large first steps
            for gate in self.objective.gates:
                gate.grad = None
        if finite or self.trainer.accelerator.scaler is not None:  # a loss scaler must see the overflow to adapt
            self.optimizer.step()
            if finite and self.scheduler is not None:
                self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        ema = self.optimization.ema
        if finite and ema is not None:
            ema.update()

    def _pass(self, step: int, batch: Batch, row: int) -> Tensor:
        """Forward and backward for some of this process's rows. Returns the means of the losses and of their terms."""
        trainer, rows, first = self.trainer, self.rows, self.rows.first + row
        # Dropout and its like draw from the global generator; a step's numbers must not depend on the past.
        seed_forward(seed_of(trainer.seed, self.stage, step, "forward", first), trainer.accelerator.device)
        rng = Rng(trainer.seed, self.stage, step, first)
        some = {name: t[row : row + rows.micro] for name, t in batch.items()}
        # FSDP averages after every pass: whole gradients would take the memory that it is there to save.
        synchronise = self.networks is not None or row + rows.micro == rows.count
        with nullcontext() if synchronise else trainer.accelerator.no_sync(self._module):
            loss, losses = self._module(self.prepare(some, rng), rng)
            trainer.accelerator.backward(loss * (rows.micro / rows.count))
        return torch.stack([values.mean().float() for values in (losses, *self.objective.terms.values())])
