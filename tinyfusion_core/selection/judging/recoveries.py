"""Short recoveries: pruned networks are trained a little and judged on samples that none of them is trained on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from ...dataloading.set_apart import set_apart
from ...errors import Diverged, UserError
from ...protocols.data import Samples
from ...protocols.task import Task
from ...pruning.decision import Decision
from ...pruning.prune import prune
from ...runtime.distributed import on_main_process
from ...runtime.files import digest, read_weights, save_tensors, write_json
from ...runtime.run_folder import NOW, Now, RunFolder
from ...runtime.stages import SEARCH
from ...training.recover import Recover
from ...training.trainer import Trainer
from ..criteria.calibration import Calibration
from .paired import Mask

JUDGED = "losses.safetensors"
"""File with the losses of a recovered network, while the stage runs."""


@dataclass
class ShortRecoveries:
    """Recovers masks from the teacher's weights, by the same samples, noise and schedule.

    Attributes:
        task: the network and its objective.
        trainer: how to train.
        run: where losses are kept while the stage runs.
        recovery: the recovery by its number of steps.
        samples: how many training samples to set apart to judge on.
        steps: updates that there are for all recoveries.
        quiet: the trainer for one of them, which would be a run of its own to a tracker.
        trained: the task with the samples to train on.
        judged: the samples to judge on.
        known: (samples,) losses of every mask that was recovered, by its steps.
        evaluations: samples that networks were run on.
        spent: updates of all recoveries so far.
    """

    task: Task
    trainer: Trainer
    run: RunFolder | None
    recovery: Callable[[int], Recover]
    samples: int
    steps: int
    quiet: Trainer = field(init=False)
    trained: Task = field(init=False)
    judged: Samples = field(init=False)
    known: dict[Mask, dict[int, Tensor]] = field(default_factory=dict)
    evaluations: int = 0
    spent: int = 0

    def __post_init__(self) -> None:
        self.quiet = replace(self.trainer, trackers=())
        rest, self.judged = set_apart(self.task.train, self.samples, self.trainer.seed, "race")
        self.trained = replace(self.task, train=rest)
        if len(self.judged) < 2:
            found = len(self.task.train)
            raise UserError(f"search: a race needs at least 4 training samples, to judge on some; there are {found}")

    @property
    def left(self) -> int:
        """Updates that are left."""
        return self.steps - self.spent

    def losses(self, mask: Mask, stage: str, steps: int) -> Tensor:
        """Recover a mask and judge it. Only its losses are kept: weights of all would fill a disk.

        Args:
            mask: indices of the kept blocks.
            stage: name of the random streams, the same for all that are compared.
            steps: updates.

        Returns:
            (samples,) losses in float64, infinite if they are not finite.
        """
        recovery, name = self.recovery(steps), f"{stage} of {folder_name(mask)}"
        self.spent += steps
        self.evaluations += steps * (recovery.batch_size or self.quiet.batch_size) + len(self.judged)
        part = self.run and self.run.part(SEARCH, name)
        if part is not None and (part / JUDGED).exists():
            losses = read_weights(part / JUDGED)["losses"]
        else:
            self.tell(f"{stage}: recovers {' '.join(map(str, mask))}", steps, name)
            losses = self._recovered(mask, recovery, stage, part)
            if part is not None:
                on_main_process(partial(_keep, part, stage, losses))
        self.known.setdefault(mask, {})[steps] = losses
        return losses

    def judge(self, model: nn.Module) -> Tensor:
        """Return the losses of a network on the samples that judge, (samples,) in float64; infinite if not finite."""
        judged = replace(self.task, model=model, train=self.judged)
        calibration = Calibration(judged, self.quiet, len(self.judged), 64, "race")
        return calibration.sample_losses(torch.ones(1, len(judged.blocks)))[0]

    def _recovered(self, mask: Mask, recovery: Recover, stage: str, part: RunFolder | None) -> Tensor:
        student = prune(self.task, Decision(blocks=tuple(self.task.blocks), kept=mask, method="Race"))
        self.task.teacher.cpu()  # meanwhile: with the optimizer's state, a device may hold the student alone
        try:
            recovery(self.trained, student, None, self.quiet, part, stage=stage)
            return self.judge(student)
        except Diverged:
            return torch.full((len(self.judged),), math.inf, dtype=torch.float64)
        finally:
            self.trainer.to_device(self.task.teacher)

    def tell(self, what: str, steps: int | None, part: str = "") -> None:
        """Tell those who watch the run's folder.

        Args:
            what: what is being done.
            steps: the number of steps of what is logged meanwhile; None if it has none.
            part: the part of the stage that it is logged in; empty: the run's own log.
        """
        if self.run is not None:
            now: Now = {"part": part, "what": what, "done": self.spent, "total": self.steps, "steps": steps}
            on_main_process(partial(write_json, self.run.part(SEARCH, NOW).path, now))


def folder_name(mask: Sequence[int]) -> str:
    """Return a short name for what belongs to a mask; the indices themselves can be too long for one."""
    return digest(list(mask))[:16]


def _keep(part: RunFolder, stage: str, losses: Tensor) -> None:
    save_tensors(part / JUDGED, {"losses": losses})
    part.drop_checkpoints(stage)
