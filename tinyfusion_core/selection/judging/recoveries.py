"""Short recoveries: pruned networks are trained a little and judged on samples that none of them is trained on."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...dataloading.set_apart import set_apart
from ...errors import Diverged, UserError
from ...parsing.weights import read_weights
from ...protocols.data import Samples
from ...protocols.task import Task
from ...pruning.decision import Decision
from ...pruning.prune import prune
from ...runtime.distributed import local_share, map_alone, on_main_process, rank_and_world_size
from ...runtime.files import digest, save_tensors, write_json
from ...runtime.run_folder import NOW, RunFolder
from ...runtime.stages import SEARCH, Now
from ...training.recover import Recover
from ...training.trainer import Trainer
from ..criteria.calibration import Calibration
from .paired import Mask

JUDGED = "losses.safetensors"
"""File with the losses of a recovered network, while the stage runs."""


@dataclass(frozen=True)
class Entrant:
    """A short recovery that is handed to another process.

    Attributes:
        mask: indices of the kept blocks.
        stage: name of the random streams.
        how: the recovery, and what makes `ShortRecoveries` like those that handed it out, pickled by themselves: they
            can be read once the plugin files of the recipe are loaded.
    """

    mask: Mask
    stage: str
    how: bytes

    def recover(self, task: Task, trainer: Trainer, run: RunFolder) -> None:
        """Recover the mask and leave its losses in the folder of the search, from which they are read."""
        recovery, make = pickle.loads(self.how)
        make(task, trainer, run, lambda batches: recovery)._find(self.mask, self.stage, recovery, trainer.quiet())


@dataclass
class ShortRecoveries:
    """Recovers masks from the teacher's weights, by the same samples, noise and schedule.

    Attributes:
        task: the network and its objective.
        trainer: how to train.
        run: where losses are kept while the stage runs.
        recovery: the recovery by its number of batches.
        samples: how many training samples to set apart to judge on.
        steps: batches that there are for all recoveries.
        main: whether this process shows what is being done.
        quiet: the trainer for one of them, which would be a run of its own to a tracker.
        trained: the task with the samples to train on.
        judged: the samples to judge on.
        known: (samples,) losses of every mask that was recovered, by its batches.
        evaluations: samples that networks were run on.
        spent: batches of all recoveries so far.
    """

    task: Task
    trainer: Trainer
    run: RunFolder | None
    recovery: Callable[[int], Recover]
    samples: int
    steps: int
    main: bool = field(init=False)
    quiet: Trainer = field(init=False)
    trained: Task = field(init=False)
    judged: Samples = field(init=False)
    known: dict[Mask, dict[int, Tensor]] = field(default_factory=dict)
    evaluations: int = 0
    spent: int = 0

    def __post_init__(self) -> None:
        self.main = rank_and_world_size()[0] == 0
        self.quiet = self.trainer.quiet()
        rest, self.judged = set_apart(self.task.train, self.samples, self.trainer.seed, "race")
        self.trained = replace(self.task, train=rest, model=self.task.teacher)
        if len(self.judged) < 2:
            found = len(self.task.train)
            raise UserError(f"search: a race needs at least 4 training samples, to judge on some; there are {found}")

    @property
    def left(self) -> int:
        """Batches that are left."""
        return self.steps - self.spent

    @property
    def num_losses(self) -> int:
        """How many losses are known of a recovered network."""
        return len(self.judged)

    def losses(self, masks: Sequence[Mask], stage: str, steps: int, note: str = "") -> dict[Mask, Tensor]:
        """Recover masks and judge them. Only their losses are kept: weights of all would fill a disk.

        As many masks as processes, or more, are recovered each by one process; fewer by all of them together; or
        other processes recover them, where the trainer has such.

        Args:
            masks: indices of the kept blocks of each.
            stage: name of the random streams, the same for all that are compared.
            steps: batches of each.
            note: what the progress says besides.

        Returns:
            (samples,) losses of each in float64, infinite if they are not finite.
        """
        recovery = self.recovery(steps)
        together = self.quiet.with_batch_size(recovery.batch_size)
        alone = together.each_alone(len(masks))

        def work(mask: Mask) -> Tensor:
            return self._known(mask, stage, recovery, alone or together, self.spent + steps * masks.index(mask))

        def shown(mask: Mask) -> Tensor:
            losses = work(mask)
            progress.advance()
            return losses

        if self._hand_out(masks, stage, recovery, steps, note):
            found = [work(mask) for mask in masks]
        else:
            with self.trainer.track(f"{stage}{note}", len(local_share(masks) if alone else masks)) as progress:
                found = map_alone(masks, shown) if alone else [shown(mask) for mask in masks]
        self.spent += steps * len(masks)
        self.evaluations += (recovery.steps * together.batch_size + len(self.judged)) * len(masks)
        for mask, losses in zip(masks, found, strict=True):
            self.known.setdefault(mask, {})[steps] = losses
        return dict(zip(masks, found, strict=True))

    def judge(self, model: nn.Module) -> Tensor:
        """Return the losses of a network on the samples that judge, (samples,) in float64; infinite if not finite."""
        judged = replace(self.task, model=model, train=self.judged)
        calibration = Calibration(judged, self.quiet, len(self.judged), 64, "race")
        return calibration.sample_losses(torch.ones(1, len(judged.blocks)))[0]

    def _known(self, mask: Mask, stage: str, recovery: Recover, trainer: Trainer, done: int) -> Tensor:
        """The losses of a mask: those of an earlier run of this stage, or recovered and judged now."""
        part = self.run and self._part(self.run, stage, mask)
        if part is not None and (part / JUDGED).exists():
            return read_weights(part / JUDGED)["losses"]
        what = f"{stage}: recovers {' '.join(map(str, mask))}"
        self.tell(what, recovery.steps, "" if part is None else part.path.name, done)
        return self._find(mask, stage, recovery, trainer)

    def _find(self, mask: Mask, stage: str, recovery: Recover, trainer: Trainer) -> Tensor:
        """Recover a mask and judge it; its losses are kept in the run, if there is one."""
        part = self.run and self._part(self.run, stage, mask)
        losses = self._recovered(mask, recovery, stage, part, trainer)
        if part is not None:
            on_main_process(partial(_keep, part, stage, losses))
        return losses

    def _hand_out(self, masks: Sequence[Mask], stage: str, recovery: Recover, steps: int, note: str) -> bool:
        """Have other processes recover what is not known, if the trainer has any. Returns whether it has."""
        elsewhere, run = self.trainer.elsewhere, self.run
        if elsewhere is None or run is None:
            return False
        lacking = [mask for mask in masks if not (self._part(run, stage, mask) / JUDGED).exists()]
        if not lacking:
            return True
        how = pickle.dumps((recovery, partial(type(self), **self._of_its_kind())))
        left, what = len(lacking), f"{stage}{note}, by workers"
        self.tell(what, None)
        self.task.teacher.cpu()  # the others may work on this device
        with self.trainer.track(what, left) as progress:
            for _ in elsewhere([Entrant(mask, stage, how) for mask in lacking]):
                left -= 1
                self.tell(what, None, done=self.spent + steps * (len(masks) - left))
                progress.advance()
        self.trainer.to_device(self.task.teacher)
        return True

    def _of_its_kind(self) -> dict[str, Any]:
        """What makes recoveries of this kind for the same task elsewhere, besides the recovery; pickled."""
        return {"samples": self.samples, "steps": 0}

    @staticmethod
    def _part(run: RunFolder, stage: str, mask: Mask) -> RunFolder:
        """What of the search's folder belongs to one recovery."""
        return run.part(SEARCH, f"{stage} of {folder_name(mask)}")

    def _recovered(self, mask: Mask, recovery: Recover, stage: str, part: RunFolder | None, trainer: Trainer) -> Tensor:
        decision = Decision(blocks=tuple(self.task.blocks), kept=mask, method="Race")
        student = prune(self.task, decision)
        self.task.teacher.cpu()  # meanwhile: with the optimizer's state, a device may hold the student alone
        try:
            recovery(self.trained, student, decision, trainer, part, stage=stage)
            return self.judge(student)
        except Diverged:
            return torch.full((self.num_losses,), math.inf, dtype=torch.float64)
        finally:
            self.trainer.to_device(self.task.teacher)

    def tell(self, what: str, steps: int | None, part: str = "", done: int | None = None) -> None:
        """Tell those who watch the run's folder.

        Args:
            what: what is being done.
            steps: the number of steps of what is logged meanwhile; None if it has none.
            part: the part of the stage that it is logged in; empty: the run's own log.
            done: batches of all recoveries so far, where it is not what was spent.
        """
        if self.run is not None:
            done = self.spent if done is None else done
            now: Now = {"part": part, "what": what, "done": done, "total": self.steps, "steps": steps}
            path = self.run.part(SEARCH, NOW).path
            on_main_process(lambda: write_json(path, now) if self.main else None)


def folder_name(mask: Sequence[int]) -> str:
    """Return a short name for what belongs to a mask; the indices themselves can be too long for one."""
    return digest(list(mask))[:16]


def _keep(part: RunFolder, stage: str, losses: Tensor) -> None:
    save_tensors(part / JUDGED, {"losses": losses})
    part.drop_checkpoints(stage)
