"""Selectors that choose among the masks that their settings allow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

from typing_extensions import override

from ..pruning.decision import Decision
from ..samplers.compiled import Constraints, compile_constraints
from ..samplers.constraints import Rules, check_said, combined
from ..samplers.demands import Budget, Spending
from ..samplers.patterns import Pattern, parse_pattern
from .base import Selector
from .budget import CostBudget, check_bound, parse_budget
from .costs import NetworkCosts


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

    def allowed(self) -> dict[str, Any]:
        """Return the settings that say which masks are allowed, for another selector."""
        return {f.name: getattr(self, f.name) for f in fields(Constrained)}

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
