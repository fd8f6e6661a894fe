"""What every selector is: a stage that decides which blocks stay."""

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
    """What can change the numbers of a stage.

    Attributes:
        trainer: as the stage uses it.
        but: settings of the stage that change no number, or do so through the trainer.
        but_of_trainer: settings of the trainer that change no number of this stage.
    """

    trainer: Trainer
    but: tuple[str, ...] = ()
    but_of_trainer: tuple[str, ...] = ()


class Selector(ABC):
    """A stage that decides which blocks stay: the learned search, or a criterion."""

    @abstractmethod
    def __call__(self, task: Task, trainer: Trainer, run: RunFolder | None = None) -> Decision:
        """Decide. Leaves the task's network as it was."""

    def inputs(self) -> dict[str, str]:
        """Files that decide the outcome besides the settings, by key, as their hashes."""
        return {}

    @abstractmethod
    def preview(self, blocks: Sequence[str]) -> Decision:
        """A decision it could come to, to plan with: budget and groups are right, which blocks stay may not be.

        Raises:
            UserError: the budget does not fit these blocks.
        """

    def budget(self, blocks: Sequence[str]) -> Budget | None:
        """How many blocks stay: of every list, of all where lists share a choice; None when costs decide."""
        decision = self.preview(blocks)
        lists = [set(members) for members in block_lists(blocks).values()]
        apart = all(any(members.issuperset(choice) for members in lists) for choice in decision.choices)
        return count_by_list(decision.kept, blocks) if apart and len(lists) > 1 else len(decision.kept)

    def learned(self) -> Search | None:
        """The learned search in it, if there is one."""
        return None

    def trainings(self) -> Sequence[Search | Recover]:
        """What it trains, one after the other."""
        return ()

    def decisive(self, trainer: Trainer) -> Decisive:
        """What of its settings and of a trainer's can change its outcome."""
        return Decisive(trainer)


def count_by_list(kept: Collection[int], blocks: Sequence[str]) -> dict[str, int]:
    """How many blocks of each list are kept."""
    return {name: len(set(members) & set(kept)) for name, members in block_lists(blocks).items()}
