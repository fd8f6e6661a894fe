"""The state that a training resumes from."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch.amp.grad_scaler import GradScaler

from .objective import Ema, Objective
from .steps.step_guard import StepGuard, StepReport

if TYPE_CHECKING:
    from .steps.update import Update
    from .validation import Validator


class Meter:
    """The mean loss of the finite steps since the last logged one, the last step's terms, and the time spent.

    Attributes:
        terms: means of the parts of the last step's loss, by name.
    """

    def __init__(self) -> None:
        self.terms: dict[str, float] = {}
        self._sum, self._count = 0.0, 0
        self._before, self._started = 0.0, time.monotonic()  # seconds that earlier processes spent

    def start(self) -> None:
        """Start counting the seconds."""
        self._started = time.monotonic()

    def add(self, report: StepReport, names: Sequence[str]) -> None:
        """Add a step, whose loss has parts of these names."""
        self.terms = dict(zip(names, report.terms, strict=True))
        if report.finite:
            self._sum, self._count = self._sum + report.loss, self._count + 1

    def loss(self) -> float | None:
        """Return the mean loss; None if no step was finite."""
        return self._sum / self._count if self._count else None

    def reset(self) -> None:
        """Start a new mean."""
        self._sum, self._count = 0.0, 0

    def seconds(self) -> float:
        """Return the seconds spent in the stage by this process and earlier ones."""
        return self._before + time.monotonic() - self._started

    def state_dict(self) -> list[float]:
        """Return its state, as checkpoints hold it."""
        return [self._sum, self._count, self.seconds()]

    def load_state_dict(self, state: Sequence[Any]) -> None:
        """Resume from a checkpoint."""
        self._sum, self._count, self._before = state


@dataclass(frozen=True)
class TrainingState:
    """The content of a checkpoint. Random streams, schedules and data order need no state: they follow from the step.

    Args:
        objective: what is trained; its frozen parameters are left out.
        ema: its average, if there is one.
        scaler: the loss scaler of fp16.
        meter: the loss since the last logged step.
        guard: counts of skipped steps and bad samples.
        validator: the best weights so far, if they are looked for.
    """

    objective: Objective
    ema: Ema | None
    scaler: GradScaler | None
    meter: Meter
    guard: StepGuard
    validator: Validator | None = None

    def state_dict(self, step: int, finished: bool, update: Update) -> dict[str, Any]:
        """Return the content of a checkpoint; with sharded networks it is complete on the main process only.

        Args:
            step: steps done.
            finished: whether the stage has stopped before its last step.
            update: the optimizer, its scheduler, and the networks; if they are sharded, all processes must call it.
        """
        if update.networks is not None:
            tensors = update.networks.state_dict(update.optimizer)
        else:
            frozen = {name for name, p in self.objective.named_parameters() if not p.requires_grad}
            tensors = {
                "weights": {k: v for k, v in self.objective.state_dict().items() if k not in frozen},
                "optimizer": update.optimizer.state_dict(),
                "ema": self.ema.average.state_dict() if self.ema else None,
            }
        return {
            "step": step,
            "finished": finished,
            **tensors,
            "made_with": update.made_with,
            "scheduler": update.scheduler.state_dict() if update.scheduler else None,
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "counters": self.meter.state_dict(),
            "mishaps": self.guard.state_dict(),
            "validation": self.validator.state_dict() if self.validator else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a checkpoint, except for the optimizer's state: there is no optimizer yet, and nothing is sharded."""
        self.objective.load_state_dict(state["weights"], strict=False)
        if self.ema is not None:
            self.ema.average.load_state_dict(state["ema"])
        if state["scaler"] is not None and self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        self.meter.load_state_dict(state["counters"])
        self.guard.load_state_dict(state["mishaps"])
        if self.validator is not None and state.get("validation"):
            self.validator.load_state_dict(state["validation"])
