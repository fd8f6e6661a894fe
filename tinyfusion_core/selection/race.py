"""A race: what several selectors propose is recovered for some steps, and what recovers best is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar, Self

from typing_extensions import override

from ..errors import UserError, require
from ..protocols.task import Task
from ..pruning.decision import Decision
from ..pruning.prune import prune
from ..runtime.files import NEUTRAL
from ..runtime.run_folder import RunFolder
from ..training.recover import Recover
from ..training.starts.base import Start
from ..training.trainer import Trainer
from .base import FOLLOWS, Selector, prepared
from .budget import CostBudget
from .constrained import Constrained
from .costs import NetworkCosts
from .criteria.sensitivity import Greedy, LeaveOneOut, Taylor
from .criteria.similarity import BlockInfluence
from .judging.heats import Heats
from .judging.pace import kept_pace, seconds_per_step
from .judging.recoveries import ShortRecoveries
from .search import Search

CRITERIA = (Greedy, LeaveOneOut, Taylor, BlockInfluence)
"""Criteria that propose where nothing is said."""


@dataclass(frozen=True, kw_only=True)
class Race(Constrained):
    """Recover the masks that several selectors propose, a few steps each, and keep the one that recovers best.

    Successive halving (Jamieson and Talwalkar, arXiv:1502.07943) of real recoveries: in every round each entrant is
    recovered from the teacher's blocks, along a cosine, by more steps than in the round before, and judged on samples
    that no entrant is trained on. All entrants of a round see the same samples, noise and schedule, so that their
    differences can be told from noise sample by sample. In the first round neighbours of the best, which exchange one
    kept block for another, may enter: those that a surrogate of the losses so far predicts to recover best. A third
    goes on from every round.

    Args:
        steps: batches of all recoveries together; a default search takes half as many steps beside them.
        rounds: rounds, besides that of the neighbours; all have the same share of the steps.
        proposers: selectors whose choices enter, within this budget; by default a search, Greedy, LeaveOneOut, Taylor
            and BlockInfluence.
        masks: how many of its most probable masks a search proposes.
        neighbours: whether neighbours of the best of the first round enter.
        lr: learning rate of the recoveries; falls along a cosine to a hundredth. Default the recipe's `recover.lr`, or
            1e-3 where there is none.
        batch_size: samples per batch; default the trainer's.
        updates_per_batch: into how many updates a recovery divides each batch, where passes of one size allow it: by
            the same samples, more updates rank masks better ("Races" in `benchmarks/RESULTS.md`). The rate is divided
            by the square root of that, as suits Adam (Malladi et al., arXiv:2205.10287).
        samples: training samples set apart to judge on, at most half of all.
        sure: standard errors of a paired difference by which another must be better to replace the leader.
        minutes: about how long the recoveries and the default search may take: a few steps are timed, and as many of
            `steps` are taken as fit. Criteria and proposers that are named come on top. Default: all of `steps`.
        start: what the recoveries begin with. Default the recipe's `recover.start`, or nothing.
    """

    steps: int = 10_000
    rounds: int = 3
    proposers: Sequence[Selector] | None = None
    masks: int = 4
    neighbours: bool = True
    lr: float | None = field(default=None, metadata={FOLLOWS: "lr"})
    batch_size: int | None = None
    updates_per_batch: int = field(default=4, metadata={NEUTRAL: 1})
    samples: int = 512
    sure: float = 2.0
    minutes: float | None = field(default=None, metadata={NEUTRAL: None})
    start: Start | None = field(default=None, metadata={FOLLOWS: "start", NEUTRAL: None})

    hands_out: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in {"rounds": 1, "masks": 1, "samples": 2, "steps": self.rounds + self.neighbours}.items():
            require(getattr(self, name) >= least, f"search.{name}", getattr(self, name), f"at least {least}")
        require(self.lr is None or self.lr > 0, "search.lr", self.lr, "a rate above 0")
        require(self.sure >= 0, "search.sure", self.sure, "0 or more standard errors")
        require(self.batch_size is None or self.batch_size >= 1, "search.batch_size", self.batch_size, "at least 1")
        require(self.updates_per_batch >= 1, "search.updates_per_batch", self.updates_per_batch, "at least 1")
        require(self.minutes is None or self.minutes > 0, "search.minutes", self.minutes, "above 0")
        some = self.proposers is None or len(self.proposers) > 0
        require(some, "search.proposers", self.proposers, "at least one selector")
        for i, proposer in enumerate(self.proposers or ()):
            if isinstance(proposer, Race):
                raise UserError(f"search.proposers[{i}] is a race itself; a search is named: class_path: Search")

    def recovery(self, batches: int, trainer: Trainer, processes: int) -> Recover:
        """Return the recovery of one entrant by some batches.

        Args:
            batches: how many, each of several updates.
            trainer: how it is trained.
            processes: how many share a batch.
        """
        trainer = trainer.with_batch_size(self.batch_size)
        parts = trainer.parts(self.updates_per_batch, processes)
        lr = (self.lr or 1e-3) / math.sqrt(parts)
        return Recover(
            steps=batches * parts,
            batch_size=trainer.batch_size // parts,
            lr=lr,
            lr_final=lr / 100,
            ema=0.0,
            start=self.start,
        )

    def recovering(self, trainer: Trainer) -> Callable[[int], Recover]:
        """Return `recovery` by the number of batches, for the processes that there are."""
        return partial(self.recovery, trainer=trainer, processes=trainer.accelerator.num_processes)

    def proposed_by(self) -> Sequence[Selector]:
        """Return the proposers: those given, or the default ones for the race's own masks."""
        if self.proposers is not None:
            return self.proposers
        search = Search(**self.allowed(), steps=max(1, self.steps // 2), batch_size=self.batch_size)
        return (search, *(criterion(**self.allowed()) for criterion in CRITERIA))

    @override
    def inputs(self) -> dict[str, str]:
        parts = enumerate(self.proposed_by())
        return {f"proposers[{i}].{key}": value for i, part in parts for key, value in part.inputs().items()}

    @override
    def preview(self, blocks: Sequence[str]) -> Decision:
        decision = super().preview(blocks)
        for i, proposer in enumerate(self.proposers or ()):
            theirs = proposer.preview(blocks).kept
            if not self.cost_budgets() and len(theirs) != len(decision.kept):
                raise UserError(
                    f"search.proposers[{i}]: keeps {len(theirs)} blocks, the race {len(decision.kept)}; give it the "
                    "same number"
                )
        return decision

    @override
    def cost_budgets(self) -> Sequence[CostBudget]:
        theirs = [budget for proposer in self.proposers or () for budget in proposer.cost_budgets()]
        return (*super().cost_budgets(), *theirs)

    @override
    def bound(self, costs: Mapping[str, NetworkCosts]) -> Self:
        theirs = None if self.proposers is None else [proposer.bound(costs) for proposer in self.proposers]
        return super().bound(costs) if theirs is None else replace(super().bound(costs), proposers=theirs)

    @override
    def learned(self) -> Search | None:
        return next((search for proposer in self.proposed_by() if (search := proposer.learned())), None)

    @override
    def trainings(self, trainer: Trainer, processes: int) -> Sequence[Search | Recover]:
        theirs = [part for proposer in self.proposed_by() for part in proposer.trainings(trainer, processes)]
        return (*theirs, self.recovery(self.steps, trainer, processes))

    @override
    def __call__(self, task: Task, trainer: Trainer, run: RunFolder | None = None) -> Decision:
        how, costs = prepared(self, task, trainer, run)
        how = how._in_time(task, trainer, run)
        recovery = how.recovering(trainer)
        decision = Heats(how, ShortRecoveries(task, trainer, run, recovery, how.samples, how.steps)).decision()
        return replace(decision, provenance={**decision.provenance, **costs})

    def _in_time(self, task: Task, trainer: Trainer, run: RunFolder | None) -> Self:
        """The race with as many steps as fit into its time."""
        if self.minutes is None:
            return self
        quiet, choice = trainer.quiet(), self.preview(task.blocks)

        def measure() -> float:
            def recover(batches: int) -> None:
                self.recovering(trainer)(batches)(task, prune(task, choice), choice, quiet, stage="pace")

            seconds = seconds_per_step(recover)
            if self.proposers is None and (search := self.learned()) is not None:  # it takes half as many steps
                seconds += seconds_per_step(lambda steps: replace(search, steps=steps).learn(task, quiet)) / 2
            return seconds

        steps = int(60 * self.minutes / kept_pace(run, measure))
        return replace(self, steps=max(self.rounds + self.neighbours, min(steps, self.steps)))
