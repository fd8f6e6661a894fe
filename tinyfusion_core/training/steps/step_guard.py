"""Decides after every step, on all processes alike, whether the training goes on."""

from __future__ import annotations

import math
import signal
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...errors import Diverged, UserError
from ...runtime.distributed import on_every_rank
from ...runtime.seeding import to_device
from .agreement import check_rows_agree, fingerprint

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class StepReport:
    """The outcome of a step over all processes; the same on each of them.

    Attributes:
        loss: mean over the whole batch.
        terms: means of its parts.
        finite: whether the loss and every process's gradient are finite.
        signum: the signal that any process received, 0 for none.
        asked: whether a callback of any process has asked for the end.
        checkpoint_due: whether a checkpoint is due on any process.
        bad_samples: number of samples that could not be read.
        failed: whether any process cannot go on.
    """

    loss: float
    terms: Sequence[float]
    finite: bool
    signum: int
    asked: bool
    checkpoint_due: bool
    bad_samples: int
    failed: bool


class StepGuard:
    """Counts skipped non-finite steps and unreadable samples, and ends a training with too many of them.

    Args:
        stage: what is trained, for messages.
        accelerator: the processes.
        max_skipped: this many skipped steps in a row end the training.
        max_bad_samples: more unreadable samples than this end it.

    Attributes:
        skipped: steps so far whose loss or gradient was not finite.
        streak: how many of the last steps were skipped in a row.
        bad_samples: samples so far that could not be read, on all processes.
        pending: an error of this process that ends the training; the others learn of it in the next step.
    """

    def __init__(self, stage: str, accelerator: Accelerator, max_skipped: int, max_bad_samples: int) -> None:
        self.stage, self.accelerator = stage, accelerator
        self.max_skipped, self.max_bad_samples = max_skipped, max_bad_samples
        self.skipped, self.streak, self.bad_samples = 0, 0, 0
        self.pending: UserError | None = None

    def reduce(
        self,
        step: int,
        means: Tensor,
        norm: Any,
        gates: Iterable[Tensor],
        *,
        bad_samples: int,
        checkpoint_due: bool,
        stop: Sequence[int],
        asked: bool,
    ) -> StepReport:
        """Combine the outcome of a step over all processes, in one collective call.

        All skip, save, stop or fail, or none does.

        Args:
            step: the step.
            means: (1 + terms,) means of the losses on this process and of their terms.
            norm: norm of this process's gradient, a scalar.
            gates: parameters of any shape that must be the same on all processes.
            bad_samples: how many samples this process could not read.
            checkpoint_due: whether a checkpoint is due on this process.
            stop: signals that this process received.
            asked: whether a callback of this process has asked for the end.

        Raises:
            UserError: the processes do not hold the same gates; raised on all of them.
        """
        has_pending = self.pending is not None
        flags = [signal.SIGINT in stop, signal.SIGTERM in stop, asked, checkpoint_due, bad_samples, has_pending]
        not_finite = (~torch.isfinite(torch.as_tensor(norm, device=means.device))).float()
        told = [to_device(t, means.device, means.dtype) for t in (torch.tensor(flags), fingerprint(gates))]
        mine = torch.cat([means, not_finite[None], *told])
        everybody = self.accelerator.gather(mine[None]).cpu()
        check_rows_agree(everybody[:, -3:], f"{self.stage}: the gates at step {step + 1}")
        loss, *terms = everybody[:, : len(means)].mean(0).tolist()
        any_not_finite, interrupt, terminate, ended, due, bad, failed = everybody[:, len(means) : -3].sum(0).tolist()
        return StepReport(
            loss=loss,
            terms=terms,
            finite=math.isfinite(loss) and not any_not_finite,
            signum=signal.SIGTERM if terminate else signal.SIGINT if interrupt else 0,
            asked=ended > 0,
            checkpoint_due=due > 0,
            bad_samples=int(bad),
            failed=failed > 0,
        )

    def check(self, step: int, report: StepReport, problems: Sequence[str], last: bool) -> None:
        """Count the outcome of a step, and raise if the training cannot go on.

        Args:
            step: the step.
            report: the outcome over all processes.
            problems: one message for each sample that this process could not read.
            last: whether it is the last one.

        Raises:
            Diverged: too many steps in a row were not finite, or the last one was not.
            UserError: too many samples could not be read, or this process has failed.
            FailedElsewhere: another process has failed.
        """
        for problem in problems:
            warnings.warn(f"{problem}; took another one", stacklevel=2)
        self.bad_samples += report.bad_samples
        too_many = report.bad_samples > 0 and self.bad_samples > self.max_bad_samples
        if too_many and problems:
            self.pending = UserError(
                f"{problems[-1]}. Mend it, or let the run get over some with trainer.max_bad_samples "
                f"(it is {self.max_bad_samples}, and {self.bad_samples} were met in {self.stage})"
            )
        if too_many or report.failed:
            on_every_rank(self.raise_pending)
        self.streak = 0 if report.finite else self.streak + 1
        self.skipped += not report.finite
        if self.streak >= self.max_skipped or (self.streak and last):
            raise Diverged(
                f"{self.stage}: loss or gradient not finite in {self.streak} steps in a row (up to step {step + 1}). "
                "Lower the learning rate, use precision bf16 or fp32, or check the checkpoint and the data; "
                "trainer.max_skipped sets the patience"
            )

    def raise_pending(self) -> None:
        """Raise the pending error of this process, if there is one."""
        if self.pending is not None:
            raise self.pending

    def state_dict(self) -> list[int]:
        """Return its counts, as checkpoints hold them."""
        return [self.skipped, self.streak, self.bad_samples]

    def load_state_dict(self, state: Sequence[int]) -> None:
        """Resume its counts from a checkpoint."""
        self.skipped, self.streak, self.bad_samples = state
