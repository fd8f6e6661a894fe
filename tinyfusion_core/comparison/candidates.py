"""What is compared: selectors with one budget, and the recoveries of what each of them chooses."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import UserError
from ..samplers.constraints import Rules
from ..samplers.demands import Budget, Spending, budget_text
from ..selection.base import Selector, count_by_list
from ..selection.costs import NetworkCosts
from ..selection.criteria.base import Criterion
from ..selection.criteria.positions import BKSDM, FirstN, LastN, Uniform
from ..selection.criteria.sensitivity import Greedy, LeaveOneOut, Taylor
from ..selection.criteria.similarity import BlockInfluence, InputOutputMSE, SpanSimilarity

CRITERIA: tuple[type[Criterion], ...] = (
    Uniform, FirstN, LastN, BKSDM, BlockInfluence, InputOutputMSE, SpanSimilarity, LeaveOneOut, Greedy, Taylor
)  # fmt: skip
"""All criteria except the random one, which is the reference."""


@dataclass(frozen=True)
class Candidates:
    """What is compared.

    Attributes:
        selectors: searches and criteria, by the name of the candidate.
        budget: how many blocks each of them keeps, or what the blocks may cost.
        measured: a budget of measured costs as a sentence; else empty.
        left_out: criteria that are not available at this budget, with the reason.
        recoveries: the name of its recovery for every candidate that has one of its own.
    """

    selectors: Mapping[str, Selector]
    budget: Budget | Spending
    measured: str = ""
    left_out: Mapping[str, str] = field(default_factory=dict)
    recoveries: Mapping[str, str] = field(default_factory=dict)

    @property
    def recorded(self) -> Budget | str:
        """The budget for the record; a budget of costs as a sentence."""
        return self.measured or budget_text(self.budget) if isinstance(self.budget, Spending) else self.budget

    @property
    def said(self) -> str:
        """The budget, formatted for a sentence: "4 blocks"."""
        return self.recorded if isinstance(self.recorded, str) else f"{budget_text(self.recorded)} blocks"

    def settings(self, limits: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        """Return settings that give a criterion this budget, within what `Backbone.limits` returned."""
        found = _settings(self.budget)
        return {**found, "constraints": found.get("constraints", Rules()).with_limits(limits)} if limits else found

    def each_recovered(self, recoveries: Collection[str]) -> Candidates:
        """Return every selector with every one of these recoveries; without any, the candidates as they are.

        A pair has both names, or that of the recovery alone where there is one selector.

        Raises:
            UserError: two pairs would have the same name.
        """
        names = {
            recovery if len(self.selectors) == 1 else f"{selector} + {recovery}": (selector, recovery)
            for selector in self.selectors
            for recovery in recoveries
        }
        if len(names) < len(self.selectors) * len(recoveries):
            raise UserError(
                "compare: two pairs of a candidate and a recovery have the same name; leave '+' out of names"
            )
        if not names:
            return self
        selectors = {name: self.selectors[selector] for name, (selector, _) in names.items()}
        return replace(self, selectors=selectors, recoveries={name: recovery for name, (_, recovery) in names.items()})

    def outside(self, kept: Sequence[int], blocks: Sequence[str]) -> str:
        """Return what is wrong with kept blocks that do not fit the budget; empty if they fit."""
        if isinstance(self.budget, Spending):
            cost, most = self.budget.cost_of(kept), self.budget.budget
            return f"blocks that cost {cost:,}, where the budget is {most:,}" if cost > most else ""
        found = len(kept) if isinstance(self.budget, int) else count_by_list(kept, blocks)
        if found == self.budget:
            return ""
        return f"{budget_text(found)}, where its preview keeps {budget_text(self.budget)} of the blocks"


def line_up(
    view: str, given: Mapping[str, Selector], blocks: Sequence[str], costs: Mapping[str, NetworkCosts], every: bool
) -> Candidates:
    """Return the candidates of a comparison.

    Args:
        view: `compare` or `audit`, for messages.
        given: the selectors of the recipe, by name.
        blocks: paths of the network's blocks.
        costs: costs of the network, by name of the selectors' `cost_budgets`.
        every: whether to add every criterion, with the budget of the given selectors.

    Raises:
        UserError: the given selectors do not fit or differ in their budget; all of them are named.
    """
    measured = {b.describe(costs[b.name]) for selector in given.values() for b in selector.cost_budgets()}
    selectors = {name: selector.bound(costs) for name, selector in given.items()}
    budget = _common_budget(view, selectors, blocks)
    left_out = {}
    for criterion in CRITERIA if every else ():
        try:
            candidate = criterion(**_settings(budget))
            candidate.preview(blocks)
        except UserError as e:
            left_out[criterion.__name__] = str(e)
        else:
            selectors[criterion.__name__] = candidate
    return Candidates(selectors, budget, " or ".join(sorted(measured)), left_out)


def _settings(budget: Budget | Spending) -> dict[str, Any]:
    if isinstance(budget, Spending):
        return {"constraints": Rules(costs=budget.costs, budget=budget.budget)}
    return {"keep": dict(budget) if isinstance(budget, Mapping) else budget}


def _common_budget(view: str, candidates: Mapping[str, Selector], blocks: Sequence[str]) -> Budget | Spending:
    """The budget of all candidates. Raises UserError unless they agree, in total if one gives only the total."""
    problems: list[str] = []
    budgets: dict[str, Budget | Spending] = {}
    for name, candidate in candidates.items():
        try:
            budgets[name] = _budget(candidate, blocks)
        except UserError as e:
            problems.append(f"{view}.candidates.{name}: {e}")
    if any(isinstance(budget, int) for budget in budgets.values()):
        budgets = {name: sum(b.values()) if isinstance(b, Mapping) else b for name, b in budgets.items()}
    if any(budget != other for budget in budgets.values() for other in budgets.values()):
        problems.append(
            f"{view}.candidates: not the same budget: "
            + "; ".join(f"{name} keeps {budget_text(budget)}" for name, budget in budgets.items())
            + ". Only the same budget tells which choice is better"
        )
    if problems:
        raise UserError("\n".join(problems))
    return next(iter(budgets.values()))


def _budget(candidate: Selector, blocks: Sequence[str]) -> Budget | Spending:
    budget = candidate.keeps(blocks)
    if budget is None:
        raise UserError("does not say how many blocks stay; only candidates with the same budget are compared")
    candidate.preview(blocks)  # what else is wrong with it shows here
    return budget
