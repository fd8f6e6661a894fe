"""The interface of selectors: stages that decide which blocks are kept."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar, cast

from ..errors import UserError
from ..evaluation.metrics import Metric
from ..parsing.settings import Settings, check_arguments
from ..protocols.blocks.paths import block_lists
from ..protocols.task import Task
from ..pruning.decision import Decision
from ..pruning.removal import check_removal
from ..runtime.distributed import on_main_process
from ..runtime.run_folder import RunFolder
from ..samplers.constraints import Rules
from ..samplers.demands import Budget, Spending
from ..training.recover import Recover
from ..training.trainer import Trainer
from .budget import CostBudget, measure, save_costs
from .costs import NetworkCosts

if TYPE_CHECKING:
    from .search import Search


FOLLOWS = "follows"
"""Metadata key of a field: the option of the recipe's `recover` that is its default, or a function of all of them."""


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


@dataclass(frozen=True)
class Proposals:
    """What a selector proposes to recover.

    Attributes:
        decision: its decision.
        masks: indices of the kept blocks of each mask, the decision's first.
    """

    decision: Decision
    masks: Sequence[tuple[int, ...]]


class Selector(Settings, ABC):
    """A stage that decides which blocks are kept: the learned search, or a criterion.

    Attributes:
        hands_out: whether other processes can do pieces of it; see `Trainer.elsewhere`.
    """

    hands_out: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, task: Task, trainer: Trainer, run: RunFolder | None = None) -> Decision:
        """Decide. Leaves the task's network as it was.

        Args:
            task: the network to prune, its objective and data.
            trainer: how to train; device, precision and seed.
            run: where to log and to keep checkpoints.
        """

    def propose(self, task: Task, trainer: Trainer, run: RunFolder | None, num: int) -> Proposals:
        """Decide, and name further masks that may recover as well. Arguments as for a call.

        Args:
            task: the network to prune, its objective and data.
            trainer: how to train.
            run: where to log and to keep checkpoints.
            num: how many masks to name at most.
        """
        decision = self(task, trainer, run)
        return Proposals(decision, (decision.kept,))

    def inputs(self) -> dict[str, str]:
        """Return the hashes of the files that affect the outcome besides the settings, by key."""
        return {}

    def metrics(self) -> Sequence[Metric]:
        """Return the metrics by which it judges, whose data are checked beforehand."""
        return ()

    @abstractmethod
    def preview(self, blocks: Sequence[str]) -> Decision:
        """Return a possible decision, for planning: budget and groups are right, the kept blocks may differ.

        Where `keeps` is None it keeps as many blocks as a decision may at most.

        Raises:
            UserError: the budget does not fit these blocks.
        """

    def cost_budgets(self) -> Sequence[CostBudget]:
        """Return the cost budgets of this selector and its parts; they limit blocks only when the costs are known."""
        return ()

    def bound(self, costs: Mapping[str, NetworkCosts]) -> Self:
        """Return the selector with rules in place of its `cost_budgets`.

        Args:
            costs: costs of the network, by name of the budget.

        Raises:
            UserError: a budget cannot be met.
        """
        return self

    def keeps(self, blocks: Sequence[str]) -> Budget | Spending | None:
        """Return how many blocks are kept: by list, or in total where lists share a choice; or what they may cost.

        None if that is unknown. A selector with `cost_budgets` must be `bound` first, as for `preview`.
        """
        decision = self.preview(blocks)
        lists = [set(members) for members in block_lists(blocks).values()]
        apart = all(any(members.issuperset(choice) for members in lists) for choice in decision.choices)
        return count_by_list(decision.kept, blocks) if apart and len(lists) > 1 else len(decision.kept)

    def ranks(self) -> bool:
        """Return whether its decision says in which order more blocks would go; see `Decision.ranking`."""
        return self.learned() is not None

    def learned(self) -> Search | None:
        """Return the learned search it contains; None if there is none."""
        return None

    def trainings(self, trainer: Trainer, processes: int) -> Sequence[Search | Recover]:
        """Return the trainings it runs, in order.

        Args:
            trainer: how they are trained.
            processes: how many share a batch.
        """
        return ()

    def decisive(self, trainer: Trainer) -> Decisive:
        """Return the settings, its own and the trainer's, that can change its outcome."""
        return Decisive(trainer)


S = TypeVar("S", bound=Selector)


def within(selector: S, limits: Mapping[str, Sequence[Any]]) -> S:
    """Return a selector whose constraints, and those of the selectors inside of it, hold a network's limits too.

    A sampler that is named has rules of its own, and is left alone.

    Args:
        selector: a selector.
        limits: what `Backbone.limits` returned.

    Raises:
        UserError: its settings leave no room for them.
    """
    if not limits or getattr(selector, "sampler", None) is not None:
        return selector

    def limited(name: str, value: Any) -> Any:
        if name == "constraints":
            return (value or Rules()).with_limits(limits)
        if isinstance(value, Selector):
            return within(value, limits)
        several = isinstance(value, list | tuple) and any(isinstance(item, Selector) for item in value)
        return [limited("", item) for item in value] if several else value

    settings = [f.name for f in fields(cast(Any, selector)) if f.init]
    try:
        found: S = replace(cast(Any, selector), **{name: limited(name, getattr(selector, name)) for name in settings})
        return found
    except UserError as e:
        told = ", ".join(f"{name} {list(value)}" for name, value in limits.items())
        raise UserError(f"search: the network's config expresses only masks of the constraints {told}; {e}") from None


def prepared(selector: S, task: Task, trainer: Trainer, run: RunFolder | None) -> tuple[S, dict[str, Any]]:
    """Make a selector ready for a task: bind it to what the network costs, if it has budgets of costs.

    It obeys the limits of the network. Before anything is spent, a choice as it may come out is tried; see
    `check_removal`.

    Args:
        selector: a selector, with or without such budgets.
        task: the network and its objective.
        trainer: device, precision and seed.
        run: where the costs are kept, so that an interrupted call resumes with the same numbers.

    Returns:
        The bound selector, and the costs, for the record.

    Raises:
        UserError: the task cannot be pruned so, or an argument is something else.
    """
    check_arguments(task=(task, Task), trainer=(trainer, Trainer), run=(run, RunFolder | None))
    trainer.to_device(task.teacher)
    limits = task.backbone.limits(task.teacher)
    budgets = selector.cost_budgets()
    if not budgets:
        how = within(selector, limits)
        check_removal(task, how.preview(task.blocks).kept)
        return how, {}

    def work() -> dict[str, NetworkCosts]:
        found = measure(budgets, task, trainer, run.path if run else None)
        if run is not None:
            save_costs(found, task, trainer, run.path)
        return found

    costs = on_main_process(work)
    said = list(dict.fromkeys(budget.describe(costs[budget.name]) for budget in budgets))
    how = within(selector.bound(costs), limits)
    check_removal(task, how.preview(task.blocks).kept)
    return how, {"budget": said, "costs": {name: asdict(found) for name, found in costs.items()}}


def count_by_list(kept: Collection[int], blocks: Sequence[str]) -> dict[str, int]:
    """Return how many blocks of each list are kept."""
    return {name: len(set(members) & set(kept)) for name, members in block_lists(blocks).items()}
