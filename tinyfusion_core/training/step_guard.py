"""What a training gets over, and what ends it: the same on every process."""

from __future__ import annotations

import math
import signal
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import Diverged, UserError
from ..runtime.distributed import check_rows_agree, fingerprint, on_every_rank

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Agreed:
    """What the processes told each other in a step; the same on all of them.

    Attributes:
        loss: mean over the whole batch.
        terms: means of its parts.
        finite: whether the loss and every process's gradient are.
        signum: the signal that any of them was sent, 0 for none.
        save: whether it is time for a checkpoint on any of them.
        bad: samples that could not be read, on all of them together.
        failed: whether any of them cannot go on.
    """

    loss: float
    terms: Sequence[float]
    finite: bool
    signum: int
    save: bool
    bad: int
    failed: bool


class Mishaps:
    """Counts steps that were skipped and samples that could not be read, and ends a training that has too many.

    Args:
        stage: what is trained.
        accelerator: knows the processes.
        max_skipped: steps in a row that may be skipped, less one.
        max_bad_samples: samples that may be unreadable.
        minutes: between two checkpoints.

    Attributes:
        skipped: steps so far whose loss or gradient was not finite.
        bad: samples so far that could not be read.
        trouble: what keeps this process from going on; the others hear of it in the next step.
        saved: when the last checkpoint was written.
    """

    def __init__(
        self, stage: str, accelerator: Accelerator, max_skipped: int, max_bad_samples: int, minutes: float
    ) -> None:
        self.stage, self.accelerator = stage, accelerator
        self.max_skipped, self.max_bad_samples, self.minutes = max_skipped, max_bad_samples, minutes
        self.skipped, self.streak, self.bad = 0, 0, 0
        self.trouble: UserError | None = None
        self.saved = time.monotonic()

    def agree(
        self, step: int, means: Tensor, norm: Any, gates: Iterable[Tensor], bad: int, stop: Sequence[int]
    ) -> Agreed:
        """Hear of the other processes in one message, so that all of them skip, save, stop or fail, or none.

        Args:
            step: the step.
            means: of the losses on this process, and of their terms.
            norm: of its gradient.
            gates: what must be the same on all processes.
            bad: samples that it could not read.
            stop: signals that it was sent.

        Raises:
            UserError: the processes do not hold the same gates; raised on all of them.
        """
        due = time.monotonic() - self.saved >= 60 * self.minutes
        flags = [signal.SIGINT in stop, signal.SIGTERM in stop, due, bad, self.trouble is not None]
        wild = (~torch.isfinite(torch.as_tensor(norm, device=means.device))).float()
        mine = torch.cat([means, wild[None], means.new_tensor(flags), fingerprint(gates).to(means)])
        everybody = self.accelerator.gather(mine[None]).cpu()
        check_rows_agree(everybody[:, -3:], f"{self.stage}: the gates at step {step + 1}")
        loss, *terms = everybody[:, : len(means)].mean(0).tolist()
        any_wild, interrupt, terminate, any_due, all_bad, failed = everybody[:, len(means) : -3].sum(0).tolist()
        return Agreed(
            loss=loss,
            terms=terms,
            finite=math.isfinite(loss) and not any_wild,
            signum=signal.SIGTERM if terminate else signal.SIGINT if interrupt else 0,
            save=any_due > 0,
            bad=int(all_bad),
            failed=failed > 0,
        )

    def bear(self, step: int, agreed: Agreed, bad: Sequence[str]) -> None:
        """Count what happened in a step.

        Args:
            step: the step.
            agreed: what happened.
            bad: for every sample that this process could not read what was wrong.

        Raises:
            Diverged: too many steps in a row were not finite.
            UserError: too many samples could not be read, or a process cannot go on.
            FailedElsewhere: the same, seen from the other processes.
        """
        for text in bad:
            warnings.warn(f"{text}; took another one", stacklevel=2)
        self.bad += agreed.bad
        too_many = agreed.bad > 0 and self.bad > self.max_bad_samples
        if too_many and bad:
            self.trouble = UserError(
                f"{bad[-1]}. Mend it, or let the run get over some with trainer.max_bad_samples "
                f"(it is {self.max_bad_samples}, and {self.bad} were met in {self.stage})"
            )
        if too_many or agreed.failed:
            on_every_rank(self.settle)
        self.streak = 0 if agreed.finite else self.streak + 1
        self.skipped += not agreed.finite
        if self.streak >= self.max_skipped:
            raise Diverged(
                f"{self.stage}: loss or gradient not finite in {self.streak} steps in a row (up to step {step + 1}). "
                "Lower the learning rate, use precision bf16 or fp32, or check the checkpoint and the data; "
                "trainer.max_skipped sets the patience"
            )

    def settle(self) -> None:
        """Raise this process's trouble, if it has any."""
        if self.trouble is not None:
            raise self.trouble
