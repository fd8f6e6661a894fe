"""The interface of a start."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import nn

from ...parsing.settings import Settings
from ...protocols.task import Task
from ...pruning.decision import Decision
from ...runtime.run_folder import RunFolder
from ..trainer import Trainer


class Start(Settings, ABC):
    """Changes the weights of a pruned network before it is trained, so that it begins nearer to its teacher."""

    def check(self, task: Task) -> None:
        """Check that the task's network can be started this way, before a search is paid for. By default it can.

        Raises:
            UserError: it cannot.
        """
        return

    def check_left(self, run: RunFolder, decision: Decision) -> None:
        """Check what a finished search has left, before a recovery is begun anew. By default nothing.

        Args:
            run: the folder of the search.
            decision: of the search.

        Raises:
            UserError: it is missing or damaged.
        """
        return

    def planned(self, task: Task, decision: Decision) -> tuple[str, int]:
        """Return what it does, in words, and how many bytes it holds beside student and teacher; by default its name.

        Args:
            task: the teacher, on the meta device, and its objective. It has no data.
            decision: a possible one, in whole blocks.

        Raises:
            UserError: the network cannot be started this way.
        """
        return type(self).__name__, 0

    @abstractmethod
    def __call__(
        self,
        task: Task,
        student: nn.Module,
        decision: Decision,
        trainer: Trainer,
        stage: str,
        run: RunFolder | None = None,
    ) -> None:
        """Change a student in place: the values of its weights, and nothing else.

        Every process calls it and must get the same weights.

        Args:
            task: the teacher, its objective and data. The teacher comes back as it was.
            student: the network, on the device where it is trained.
            decision: how it was pruned from the teacher.
            trainer: precision and seed.
            stage: name of the stage, used in random streams.
            run: the folder of the recovery, with what its search has left.

        Raises:
            UserError: the network cannot be started this way.
        """
