"""Selectors that do not learn: given blocks, and criteria by position. `similarity` and `sensitivity` use data."""

# No `from __future__ import annotations` here: the fields of a base class are resolved in the modules of the
# classes that inherit them, where strings would mean nothing.

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from torch.utils._pytree import tree_map
from typing_extensions import override

from ..errors import UserError
from ..protocols.task import Task
from ..pruning.decision import Decision, provenance
from ..runtime.files import sha256
from ..runtime.run_folder import RunFolder
from ..samplers.compiled import Constraints, compile_constraints
from ..samplers.constraints import Budget, Rules, Spending, check_said, combined
from ..samplers.patterns import Pattern, parse_pattern
from ..training.trainer import Trainer
from .base import Selector, prepared
from .budget import CostBudget, check_bound, parse_budget
from .costs import NetworkCosts


@dataclass(frozen=True)
class Keep(Selector):
    """Keep given blocks: by index, or as in a decision file.

    Args:
        blocks: indices of the blocks to keep.
        decision: path of a `decision.json`, made for a checkpoint of the same architecture; or of a mergekit YAML, a
            list of indices or of peft's `layer_replication`, or a `--prune-layers` argument of llama.cpp.
    """

    blocks: Sequence[int] = field(default_factory=tuple)
    decision: str | None = None

    def __post_init__(self) -> None:
        if bool(self.blocks) == (self.decision is not None):
            raise UserError("Keep: give blocks or decision, one of the two")
        if len(set(self.blocks)) != len(self.blocks):
            raise UserError(f"Keep: blocks {list(self.blocks)} names a block twice")

    @override
    def __call__(self, task: Task, trainer: Trainer, run: RunFolder | None = None) -> Decision:
        decision = self.preview(task.blocks)
        taken = {} if self.decision is None else {"taken_from": self.decision}
        return replace(decision, provenance={**decision.provenance, **provenance(trainer.seed, task.source), **taken})

    @override
    def inputs(self) -> dict[str, str]:
        return {} if self.decision is None else {"search.decision": sha256(Path(self.decision))}

    @override
    def preview(self, blocks: Sequence[str]) -> Decision:
        if self.decision is None:
            return Decision(blocks=tuple(blocks), kept=tuple(sorted(self.blocks)), method="Keep")
        return Decision.from_file(self.decision, blocks)


@dataclass(frozen=True)
class CriterionResult:
    """The result of a criterion.

    Attributes:
        kept: indices of the kept blocks.
        evaluations: sample forward passes it took.
        findings: scores or losses it was decided by, for the record.
    """

    kept: Sequence[int]
    evaluations: int = 0
    findings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Constrained(Selector):
    """A selector that chooses among the masks that its settings allow.

    Args:
        keep: how many blocks are kept: in total, or a number for every block list, which may be 0.
        pattern: keep N of every M blocks instead, as in `Search`.
        budget: what the pruned network may cost at most instead, as in `Search`. Give one of the three.
        protect: indices of blocks that must be kept.
        constraints: further rules for masks; with costs and a budget they replace the three.
    """

    keep: int | dict[str, int] | None = None
    pattern: Pattern | int | None = None
    protect: Sequence[int] = field(default_factory=tuple)
    constraints: Rules | None = field(default=None, metadata={"neutral": None})
    budget: str | float | dict[str, str | float] | None = field(default=None, metadata={"neutral": None})

    def __post_init__(self) -> None:
        ways = {"keep": self.keep, "pattern": self.pattern, "budget": self.budget}
        check_said(type(self).__name__, self.constraints, ways)
        self.cost_budgets()
        if self.pattern is not None:
            object.__setattr__(self, "pattern", parse_pattern(self.pattern))

    @override
    def preview(self, blocks: Sequence[str]) -> Decision:
        """Return the decision for `guess`, without provenance."""
        constraints = self.compiled(blocks)
        return self._decision(blocks, constraints, self.guess(constraints), {})

    @override
    def cost_budgets(self) -> Sequence[CostBudget]:
        return () if self.budget is None else (parse_budget(self.budget, type(self).__name__),)

    @override
    def bound(self, costs: Mapping[str, NetworkCosts]) -> Self:
        rules = combined(None, self.protect, self.constraints)
        for budget in self.cost_budgets():
            rules = budget.rules(costs[budget.name], rules, type(self).__name__)
            return replace(self, budget=None, constraints=rules)
        return self

    @override
    def keeps(self, blocks: Sequence[str]) -> Budget | Spending:
        return self.compiled(blocks).budget

    def compiled(self, blocks: Sequence[str]) -> Constraints:
        """Return the constraints that the decision must obey."""
        owner, protect = type(self).__name__, self.protected(blocks)
        check_bound(self.budget, owner)
        assert not isinstance(self.pattern, int)  # parse_pattern refuses numbers
        return compile_constraints(
            blocks, owner, keep=self.keep, pattern=self.pattern, protect=protect, constraints=self.constraints
        )

    def protected(self, blocks: Sequence[str]) -> Sequence[int]:
        """Return the indices of the blocks that must be kept."""
        return self.protect

    def guess(self, constraints: Constraints) -> Sequence[int]:
        """Return blocks that obey the constraints, found without a network."""
        return constraints.best([0.0] * constraints.num_blocks)

    def _decision(
        self, blocks: Sequence[str], constraints: Constraints, kept: Sequence[int], where: Mapping[str, Any]
    ) -> Decision:
        return Decision(
            blocks=tuple(blocks),
            kept=tuple(sorted(kept)),
            method=type(self).__name__,
            pattern=self.pattern,
            choices=() if self.pattern is None else tuple(choice.blocks for choice in constraints.choices),
            provenance=where,
        )


class Criterion(Constrained):
    """A heuristic: it scores blocks or masks, and trains nothing."""

    @override
    def __call__(self, task: Task, trainer: Trainer, run: RunFolder | None = None) -> Decision:
        how, costs = prepared(self, task, trainer, run)
        constraints = how.compiled(task.blocks)
        result = how.decide(constraints, task, trainer)
        found = tree_map(_recorded, {"evaluations": result.evaluations, **result.findings})
        where = {**provenance(trainer.seed, task.source), **found, **costs}
        return how._decision(task.blocks, constraints, result.kept, where)

    @abstractmethod
    def decide(self, constraints: Constraints, task: Task, trainer: Trainer) -> CriterionResult:
        """Choose blocks that obey the constraints. Leaves the network as it was."""


def _recorded(value: Any) -> Any:
    """Six digits of a number; JSON has no infinity."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None


@dataclass(frozen=True, kw_only=True)
class Nested(Criterion):
    """Keep the blocks that an earlier search kept most often: several budgets from one search.

    Blocks are ranked by the search's decision, then by its marginals: a smaller budget keeps a subset of what a larger
    one keeps, and the search's own budget keeps its decision. The search's rules are ignored; `protect` is not.

    Args:
        decision: path of the search's `decision.json`, made for a checkpoint of the same architecture.
    """

    decision: str

    @override
    def inputs(self) -> dict[str, str]:
        return {"search.decision": sha256(Path(self.decision))}

    @override
    def preview(self, blocks: Sequence[str]) -> Decision:
        Decision.load(self.decision).check_fits(blocks, "the network")
        return super().preview(blocks)

    @override
    def guess(self, constraints: Constraints) -> Sequence[int]:
        found = Decision.load(self.decision)
        if len(found.marginals) != constraints.num_blocks:
            raise UserError(
                f"{self.decision}: has marginals of {len(found.marginals)} blocks, the network "
                f"{constraints.num_blocks}; give the decision of a learned search of it"
            )
        scores = nested_scores(found)
        kept = constraints.best(scores)
        alike = {scores[i] for i in set(kept) ^ set(constraints.best(scores, late=True))}
        if alike:
            tied = [i for i, score in enumerate(scores) if score in alike and i not in constraints.protected]
            raise UserError(
                f"{self.decision}: does not say which of the blocks {', '.join(map(str, tied))} to keep: their "
                "marginals are alike, as after a search that has settled; search with that budget"
            )
        return kept

    @override
    def decide(self, constraints: Constraints, task: Task, trainer: Trainer) -> CriterionResult:
        return CriterionResult(self.guess(constraints), findings={"taken_from": self.decision})


def nested_scores(decision: Decision) -> list[float]:
    """Return the score of each block: those the decision keeps before the others, each ranked by marginals."""
    return [p + (i in decision.kept) for i, p in enumerate(decision.marginals)]


class Positions(Criterion):
    """Keep the blocks at certain positions of every choice.

    A choice is a group of the pattern, a block list, or, with one number for all lists, their concatenation. If
    protected blocks take places, the blocks farthest from a wanted position are removed.
    """

    @abstractmethod
    def positions(self, num_kept: int, size: int) -> Sequence[int]:
        """Return the wanted positions among `size` blocks."""

    @override
    def guess(self, constraints: Constraints) -> Sequence[int]:
        scores = [0.0] * constraints.num_blocks
        for choice in constraints.choices:
            if choice.num_kept is None:
                return self._guess_number(constraints)
            self._score(scores, choice.blocks, choice.num_kept)
        return constraints.best(scores)

    def _guess_number(self, constraints: Constraints) -> Sequence[int]:
        """With costs: the number of blocks whose wanted positions come closest to what is allowed; the largest such."""
        blocks, found = range(constraints.num_blocks), []
        for number in range(constraints.num_blocks, 0, -1):
            scores = [0.0] * constraints.num_blocks
            wanted = self._score(scores, blocks, number)
            kept = constraints.best(scores)
            found.append((len(wanted ^ set(kept)), kept))
        return min(found, key=lambda pair: pair[0])[1]

    def _score(self, scores: list[float], blocks: Sequence[int], num_kept: int) -> set[int]:
        """Score each block by its distance from a wanted position; returns the blocks that are at one."""
        wanted = self.positions(num_kept, len(blocks))
        for position, block in enumerate(blocks):
            scores[block] = -min((abs(position - w) for w in wanted), default=0)
        return {blocks[w] for w in wanted}

    @override
    def decide(self, constraints: Constraints, task: Task, trainer: Trainer) -> CriterionResult:
        return CriterionResult(self.guess(constraints))


class Uniform(Positions):
    """Keep evenly spaced blocks: the last of each of k equal segments (of 8 blocks 1, 3, 5, 7)."""

    @override
    def positions(self, num_kept: int, size: int) -> Sequence[int]:
        return [(i + 1) * size // num_kept - 1 for i in range(num_kept)]


class FirstN(Positions):
    """Keep the first blocks."""

    @override
    def positions(self, num_kept: int, size: int) -> Sequence[int]:
        return range(num_kept)


class LastN(Positions):
    """Keep the last blocks."""

    @override
    def positions(self, num_kept: int, size: int) -> Sequence[int]:
        return range(size - num_kept, size)


class BKSDM(Positions):
    """Keep evenly spaced blocks from the first to the last (BK-SDM, arXiv:2305.15798; of 8 blocks 0, 2, 5, 7)."""

    @override
    def positions(self, num_kept: int, size: int) -> Sequence[int]:
        return [round(i * (size - 1) / max(1, num_kept - 1)) for i in range(num_kept)]
