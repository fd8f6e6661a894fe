"""The interface of criteria."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch.utils._pytree import tree_map
from typing_extensions import override

from ...protocols.task import Task
from ...pruning.decision import Decision, provenance
from ...runtime.run_folder import RunFolder
from ...samplers.compiled import Constraints
from ...training.trainer import Trainer
from ..base import prepared
from ..constrained import Constrained


@dataclass(frozen=True)
class CriterionResult:
    """The result of a criterion.

    Attributes:
        kept: indices of the kept blocks.
        evaluations: sample forward passes it took.
        provenance: scores or losses it was decided by, for the record.
        seen: the loss of every choice of blocks that was tried on the way, if it tells; also of those that keep more
            than they may.
    """

    kept: Sequence[int]
    evaluations: int = 0
    provenance: Mapping[str, Any] = field(default_factory=dict)
    seen: Mapping[tuple[int, ...], float] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """Return what a decision records of it."""
        found: dict[str, Any] = tree_map(_recorded, {"evaluations": self.evaluations, **self.provenance})
        return found


class Criterion(Constrained):
    """A heuristic: it scores blocks or masks, and trains nothing."""

    #: Whether it scores every block, for the record of its decision.
    scored: ClassVar[bool] = False

    @override
    def ranks(self) -> bool:
        return self.scored

    @override
    def __call__(self, task: Task, trainer: Trainer, run: RunFolder | None = None) -> Decision:
        how, costs = prepared(self, task, trainer, run)
        constraints = how.compiled(task.blocks)
        result = how.decide(constraints, task, trainer)
        where = {**provenance(trainer.seed, task.source), **result.record(), **costs}
        return how._decision(task.blocks, constraints, result.kept, where)

    @abstractmethod
    def decide(self, constraints: Constraints, task: Task, trainer: Trainer) -> CriterionResult:
        """Choose blocks that obey the constraints. Leaves the network as it was."""


def _recorded(value: Any) -> Any:
    """Six digits of a number; JSON has no infinity."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None
