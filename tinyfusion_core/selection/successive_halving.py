"""Successive halving: the best masks of a search are recovered for a few steps each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import nn
from typing_extensions import override

from ..errors import Diverged, UserError, require
from ..protocols.task import Task
from ..pruning.decision import Decision
from ..pruning.prune import prune
from ..runtime.files import NEUTRAL
from ..runtime.run_folder import RunFolder
from ..samplers.demands import Budget, Spending
from ..training.recover import Recover
from ..training.starts.base import Start
from ..training.trainer import Trainer
from .base import FOLLOWS, Selector, prepared
from .budget import CostBudget
from .costs import NetworkCosts
from .criteria.calibration import Calibration
from .judging.recoveries import folder_name
from .search import Search


@dataclass(frozen=True, kw_only=True)
class Finals(Selector):
    """A search, then successive halving (Jamieson and Talwalkar, arXiv:1502.07943) of its most probable masks.

    All finalists are recovered for some steps; the better half, by the loss on calibration samples, for as many again,
    until one is left. A finalist that diverges is eliminated. It helps where a search cannot separate its best masks,
    and with `others` the search's masks compete with those of criteria.

    Args:
        search: the search.
        masks: how many of its most probable masks are recovered.
        others: selectors whose choices are finalists too. They must be within the search's budget.
        steps: updates of a finalist in each round.
        lr: learning rate of the recovery.
        batch_size: samples per update; default the trainer's.
        samples: training samples on which a recovered network is judged.
        start: what the first round begins with. Default the recipe's `recover.start`, or nothing.
    """

    search: Search
    masks: int = 4
    others: Sequence[Selector] = ()
    steps: int = 25
    lr: float = 1e-3
    batch_size: int | None = None
    samples: int = 256
    start: Start | None = field(default=None, metadata={FOLLOWS: "start", NEUTRAL: None})

    def __post_init__(self) -> None:
        for name in ("masks", "steps", "samples"):
            require(getattr(self, name) >= 1, f"search.{name}", getattr(self, name), "at least 1")
        require(self.lr > 0, "search.lr", self.lr, "a rate above 0")
        require(self.batch_size is None or self.batch_size >= 1, "search.batch_size", self.batch_size, "at least 1")

    @property
    def recovery(self) -> Recover:
        """The recovery of a finalist in the first round; the others go on from there."""
        how = Recover(steps=self.steps, batch_size=self.batch_size, lr=self.lr, schedule="constant", ema=0.0)
        return replace(how, start=self.start)

    @override
    def inputs(self) -> dict[str, str]:
        parts = {"search": self.search, **self._by_key()}
        return {f"{part}.{key}": value for part, selector in parts.items() for key, value in selector.inputs().items()}

    @override
    def preview(self, blocks: Sequence[str]) -> Decision:
        return self.search.preview_beside(blocks, self._by_key())

    @override
    def cost_budgets(self) -> Sequence[CostBudget]:
        return [budget for part in (self.search, *self.others) for budget in part.cost_budgets()]

    @override
    def bound(self, costs: Mapping[str, NetworkCosts]) -> Self:
        others = [other.bound(costs) for other in self.others]
        return replace(self, search=self.search.bound(costs), others=others) if self.cost_budgets() else self

    @override
    def keeps(self, blocks: Sequence[str]) -> Budget | Spending | None:
        return self.search.keeps(blocks)

    @override
    def learned(self) -> Search | None:
        return self.search

    @override
    def trainings(self, trainer: Trainer, processes: int) -> Sequence[Search | Recover]:
        return (self.search, self.recovery)

    def _by_key(self) -> dict[str, Selector]:
        return {f"others[{i}]": other for i, other in enumerate(self.others)}

    @override
    def __call__(self, task: Task, trainer: Trainer, run: RunFolder | None = None) -> Decision:
        how, costs = prepared(self, task, trainer, run)
        decision = how._halve(task, trainer, run)
        return replace(decision, provenance={**decision.provenance, **costs})

    def _halve(self, task: Task, trainer: Trainer, run: RunFolder | None) -> Decision:
        quiet = trainer.quiet()  # each piece of work would be a run of its own
        proposed, evaluations = self._others(task, quiet, run)
        learned = self.search.learn(task, trainer, run)
        decision = replace(self.search.decide(learned, task, trainer), method=type(self).__name__)
        for kept in learned.sampler.best(self.masks):
            proposed.setdefault(kept, []).append(type(self.search).__name__)
        # They wait in main memory: a device may not hold them all.
        students = {kept: prune(task, replace(decision, kept=kept)).cpu() for kept in proposed}
        evaluations += int(decision.provenance["evaluations"])
        judged: list[list[dict[str, Any]]] = []
        while len(students) > 1:
            number, losses = len(judged) + 1, dict[tuple[int, ...], float]()
            with quiet.track(f"finals, round {number}", len(students)) as progress:
                for kept, student in students.items():
                    part = None if run is None else run.part("search", f"finals {number} of {folder_name(kept)}")
                    made = replace(decision, kept=kept)
                    losses[kept], looked_at = self._recover(task, student, made, quiet, part, number)
                    evaluations += looked_at
                    progress.advance()
            best = [kept for kept in sorted(losses, key=losses.__getitem__) if math.isfinite(losses[kept])]
            if not best:
                raise UserError(
                    f"search.lr is {self.lr}: after {self.steps} steps no finalist has a finite loss; lower it"
                )
            judged.append(
                [
                    {"kept": list(kept), "loss": loss if math.isfinite(loss) else None, "of": proposed[kept]}
                    for kept, loss in losses.items()
                ]
            )
            students = {kept: students[kept] for kept in best[: (len(students) + 1) // 2]}
        (winner,) = students
        return replace(
            decision,
            kept=winner,
            # They are the probability of the mode.
            confidences=decision.confidences if winner == decision.kept else (),
            provenance={**decision.provenance, "evaluations": evaluations, "finals": judged},
        )

    def _recover(
        self, task: Task, student: nn.Module, decision: Decision, trainer: Trainer, part: RunFolder | None, number: int
    ) -> tuple[float, int]:
        """Train a finalist further. Returns its loss, infinite if not finite, and the number of samples used."""
        recovered = Calibration(replace(task, model=student), trainer, self.samples, 64, "finals")
        try:
            recovery = self.recovery if number == 1 else replace(self.recovery, start=None)
            recovery(task, student, decision, trainer, part, stage=f"finals {number}")
            (loss,) = recovered.losses(torch.ones(1, len(recovered.task.blocks)))
        except Diverged:
            loss = math.inf
        student.cpu()
        return loss, self.steps * (self.batch_size or trainer.batch_size) + recovered.num_samples

    def _others(
        self, task: Task, trainer: Trainer, run: RunFolder | None
    ) -> tuple[dict[tuple[int, ...], list[str]], int]:
        """What the other selectors choose, with their names, and the number of samples they used.

        They run first, because a choice outside the budget ends the run, before the cost of a search.
        """
        sampler, evaluations = self.search.make_sampler(task.lists), 0
        proposed: dict[tuple[int, ...], list[str]] = {}
        for i, other in enumerate(self.others):
            found = other(task, trainer, None if run is None else run.part("search", f"other {i}"))
            if not sampler.allows(found.kept):
                raise UserError(
                    f"search.others[{i}]: {found.method} keeps {' '.join(map(str, found.kept))}, which is outside of "
                    "the search's budget; give it the same keep or pattern, and the same protected blocks"
                )
            proposed.setdefault(found.kept, []).append(found.method)
            evaluations += int(found.provenance.get("evaluations", 0))
        return proposed, evaluations
