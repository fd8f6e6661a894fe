"""The interface of selectors: stages that decide which blocks are kept."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..protocols.backbone import block_lists
from ..protocols.task import Task
from ..pruning.decision import Decision
from ..runtime.run_folder import RunFolder
from ..samplers.constraints import Budget
from ..training.recover import Recover
from ..training.trainer import Trainer

if TYPE_CHECKING:
    from .search import Search


@dataclass(frozen=True)
class Decisive:
    """The settings that can change the results of a stage.

    Attributes:
        trainer: the trainer as the stage uses it.
        but: settings of the stage that change no result, or only through the trainer.
        but_of_trainer: settings of the trainer that change no result of this stage.
    """

    trainer: Trainer
    but: tuple[str, ...] = ()
    but_of_trainer: tuple[str, ...] = ()


class Selector(ABC):
    """A stage that decides which blocks are kept: the learned search, or a criterion."""

    @abstractmethod
    def __call__(self, task: Task, trainer: Trainer, run: RunFolder | None = None) -> Decision:
        """Decide. Leaves the task's network as it was.

        Args:
            task: the network to prune, its objective and data.
            trainer: how to train; device, precision and seed.
            run: where to log and to keep checkpoints.
        """

    def inputs(self) -> dict[str, str]:
        """Return the hashes of the files that affect the outcome besides the settings, by key."""
        return {}

    @abstractmethod
    def preview(self, blocks: Sequence[str]) -> Decision:
        """Return a possible decision, for planning: budget and groups are right, the kept blocks may differ.

        Raises:
            UserError: the budget does not fit these blocks.
        """

    def budget(self, blocks: Sequence[str]) -> Budget | None:
        """Return how many blocks are kept: by list, or in total where lists share a choice; None if costs decide."""
        decision = self.preview(blocks)
        lists = [set(members) for members in block_lists(blocks).values()]
        apart = all(any(members.issuperset(choice) for members in lists) for choice in decision.choices)
        return count_by_list(decision.kept, blocks) if apart and len(lists) > 1 else len(decision.kept)

    def learned(self) -> Search | None:
        """Return the learned search it contains; None if there is none."""
        return None

    def trainings(self) -> Sequence[Search | Recover]:
        """Return the trainings it runs, in order."""
        return ()

    def decisive(self, trainer: Trainer) -> Decisive:
        """Return the settings, its own and the trainer's, that can change its outcome."""
        return Decisive(trainer)


def count_by_list(kept: Collection[int], blocks: Sequence[str]) -> dict[str, int]:
    """Return how many blocks of each list are kept."""
    return {name: len(set(members) & set(kept)) for name, members in block_lists(blocks).items()}
