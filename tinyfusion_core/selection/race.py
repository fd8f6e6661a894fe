"""A race: what several selectors propose is recovered for some steps, and what recovers best is kept."""

# No `from __future__ import annotations` here, for the reason given in constrained.py.

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor
from typing_extensions import override

from ..dataloading.set_apart import set_apart
from ..errors import Diverged, UserError, require
from ..protocols.data import Samples
from ..protocols.task import Task
from ..pruning.decision import Decision, provenance
from ..pruning.prune import prune
from ..runtime.distributed import on_main_process
from ..runtime.files import read_weights, save_tensors
from ..runtime.progress import track
from ..runtime.run_folder import RunFolder
from ..samplers.compiled import Constraints
from ..training.recover import Recover
from ..training.trainer import Trainer
from .base import Selector, prepared
from .budget import CostBudget
from .constrained import Constrained
from .costs import NetworkCosts
from .criteria.calibration import Calibration
from .criteria.sensitivity import Greedy, LeaveOneOut, Taylor
from .criteria.similarity import BlockInfluence
from .paired import Mask, difference, folder_name, leading, mean_of, surviving
from .search import Search

JUDGED = "losses.safetensors"
"""File with the losses of an entrant, while the race runs."""
LEAST = 10
"""Steps of a first recovery, if there are enough: along a cosine they rank masks nearly as a hundred do."""


@dataclass(frozen=True, kw_only=True)
class Race(Constrained):
    """Recover the masks that several selectors propose, a few steps each, and keep the one that recovers best.

    Successive halving (Jamieson and Talwalkar, arXiv:1502.07943) of real recoveries: in every round each entrant is
    recovered from the teacher's blocks, along a cosine, by more steps than in the round before, and judged on samples
    that no entrant is trained on. All entrants of a round see the same samples, noise and schedule, so that their
    differences can be told from noise sample by sample. After the first round the neighbours of the leader, which
    exchange one kept block for another, may enter.

    Args:
        steps: updates of all recoveries together; a default search takes half as many beside them.
        rounds: rounds, besides that of the neighbours; all have the same share of the steps.
        proposers: selectors whose choices enter, within this budget; by default a search, Greedy, LeaveOneOut, Taylor
            and BlockInfluence.
        masks: how many of its most probable masks a search proposes.
        neighbours: whether neighbours of the first leader enter.
        lr: learning rate of the recoveries; falls along a cosine to a hundredth.
        batch_size: samples per update; default the trainer's.
        samples: training samples set apart to judge on, at most half of all.
        sure: standard errors of a paired difference from which on it is no noise.
    """

    steps: int = 10_000
    rounds: int = 3
    proposers: Sequence[Selector] | None = None
    masks: int = 4
    neighbours: bool = True
    lr: float = 1e-3
    batch_size: int | None = None
    samples: int = 512
    sure: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in {"rounds": 1, "masks": 1, "samples": 2, "steps": self.rounds + self.neighbours}.items():
            require(getattr(self, name) >= least, f"search.{name}", getattr(self, name), f"at least {least}")
        require(self.lr > 0, "search.lr", self.lr, "a rate above 0")
        require(self.sure >= 0, "search.sure", self.sure, "0 or more standard errors")
        require(self.batch_size is None or self.batch_size >= 1, "search.batch_size", self.batch_size, "at least 1")
        some = self.proposers is None or len(self.proposers) > 0
        require(some, "search.proposers", self.proposers, "at least one selector")

    def recovery(self, steps: int) -> Recover:
        """Return the recovery of one entrant by some steps."""
        return Recover(steps=steps, batch_size=self.batch_size, lr=self.lr, lr_final=self.lr / 100, ema=0.0)

    def proposed_by(self) -> Sequence[Selector]:
        """Return the proposers: those given, or the default ones for the race's own masks."""
        if self.proposers is not None:
            return self.proposers
        same: dict[str, Any] = {"keep": self.keep, "budget": self.budget, "protect": self.protect}
        same |= {"pattern": self.pattern, "constraints": self.constraints}
        search = Search(**same, steps=max(1, self.steps // 2), batch_size=self.batch_size)
        return (search, *(criterion(**same) for criterion in (Greedy, LeaveOneOut, Taylor, BlockInfluence)))

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
    def trainings(self) -> Sequence[Search | Recover]:
        theirs = [training for proposer in self.proposed_by() for training in proposer.trainings()]
        return (*theirs, self.recovery(self.steps))

    @override
    def __call__(self, task: Task, trainer: Trainer, run: RunFolder | None = None) -> Decision:
        how, costs = prepared(self, task, trainer, run)
        decision = _Running(how, task, trainer, run).decision()
        return replace(decision, provenance={**decision.provenance, **costs})


@dataclass
class _Running:
    """One race.

    Attributes:
        quiet: the trainer for pieces of the race, which would each be a run of their own to a tracker.
        trained: the task with the samples that entrants are trained on.
        judged: the samples that they are judged on.
        of: who proposed each mask.
        rounds: for each round, every entrant with its loss, for the record.
        evaluations: samples that networks were run on.
        spent: updates of all recoveries.
    """

    how: Race
    task: Task
    trainer: Trainer
    run: RunFolder | None
    quiet: Trainer = field(init=False)
    trained: Task = field(init=False)
    judged: Samples = field(init=False)
    of: dict[Mask, list[str]] = field(default_factory=dict)
    rounds: list[list[dict[str, Any]]] = field(default_factory=list)
    evaluations: int = 0
    spent: int = 0

    def __post_init__(self) -> None:
        self.quiet = replace(self.trainer, trackers=())
        rest, self.judged = set_apart(self.task.train, self.how.samples, self.trainer.seed, "race")
        self.trained = replace(self.task, train=rest)
        if len(self.judged) < 2:
            found = len(self.task.train)
            raise UserError(f"search: a race needs at least 4 training samples, to judge on some; there are {found}")

    def decision(self) -> Decision:
        how = self.how
        constraints = how.compiled(self.task.blocks)
        marginals = self._propose(constraints)
        entrants, leader, before = list(self.of), None, 0
        for number in range(1, how.rounds + 1):
            begins = number == 1 and how.neighbours
            share = (how.steps - self.spent) // (how.rounds - number + 1 + begins)
            steps = share // len(entrants)
            if not steps and number == 1:
                least = len(entrants) * (how.rounds + how.neighbours)
                raise UserError(
                    f"search.steps is {how.steps}: too few for {len(entrants)} masks to recover; give at least {least}"
                )
            if steps <= before:  # a shorter recovery has nothing to say about those that were close in a longer one
                break
            if begins:  # shorter, if that lets more neighbours enter: those of two leaders
                most = len(entrants) + 2 * len(constraints.exchanges(entrants[0]))
                steps = min(steps, max(LEAST, 2 * share // most))
            before, losses = steps, self._recovered(number, entrants, steps)
            leader = leading(losses, leader, how.sure)
            if begins:
                leader = self._try_neighbours(constraints, losses, leader, (number, steps), 2 * share - self.spent)
            if how.neighbours and len(surviving(losses, leader, how.sure)) == 1:  # what is left is for more of them
                leader = self._try_neighbours(constraints, losses, leader, (number, steps), how.steps - self.spent)
            self._record(losses, leader, steps)
            entrants = surviving(losses, leader, how.sure)
            if len(entrants) == 1:
                break
        assert leader is not None
        where = {**provenance(self.trainer.seed, self.task.source), "evaluations": self.evaluations}
        decision = how._decision(self.task.blocks, constraints, leader, {**where, "race": self.rounds})
        return replace(decision, marginals=marginals)

    def _propose(self, constraints: Constraints) -> tuple[float, ...]:
        """Let everybody propose; returns the marginals of the first who has learned some."""
        logged = False
        marginals: tuple[float, ...] = ()
        # Those that train come last: a choice outside of the budget ends the race before they cost anything.
        for i, proposer in sorted(enumerate(self.how.proposed_by()), key=lambda pair: len(pair[1].trainings())):
            # One search is shown as that of the run.
            own = proposer.learned() is not None and not logged
            part = self.run if own or self.run is None else self.run.part("search", f"proposer {i}")
            found = proposer.propose(self.task, self.trainer if own else self.quiet, part, self.how.masks)
            logged |= own
            for mask in found.masks:
                if not constraints.accepts(mask):
                    raise UserError(
                        f"search.proposers[{i}]: {type(proposer).__name__} keeps {' '.join(map(str, mask))}, which is "
                        "outside of the race's budget; give it the same budget, protected blocks and constraints"
                    )
                self.of.setdefault(tuple(mask), []).append(type(proposer).__name__)
            marginals = marginals or found.decision.marginals
            self.evaluations += int(found.decision.provenance.get("evaluations", 0))
        return marginals

    def _try_neighbours(
        self, constraints: Constraints, losses: dict[Mask, Tensor], leader: Mask, heat: tuple[int, int], share: int
    ) -> Mask:
        """Let neighbours of the leader enter a round, and of whoever takes its place. Returns the leader at the end.

        `losses` gets theirs; `heat` is the number of the round and its steps, `share` the updates that they may take.
        """
        number, steps = heat
        while near := self._neighbours(constraints, leader, losses)[: share // steps]:
            share -= len(near) * steps
            for mask in near:
                self.of[mask] = ["neighbour"]
            losses |= self._recovered(number, near, steps, ", neighbours")
            leader = leading(losses, leader, self.how.sure)
        return leader

    def _neighbours(self, constraints: Constraints, leader: Mask, tried: Mapping[Mask, Tensor]) -> list[Mask]:
        """Masks one exchange away that were not tried, those with the blocks that entrants keep most often first."""
        votes = [sum(block in mask for mask in tried) for block in range(constraints.num_blocks)]
        exchanged = [tuple(sorted({*leader} - {*out} | {*back})) for out, back in constraints.exchanges(leader)]
        near = [mask for mask in exchanged if mask not in tried]
        return sorted(near, key=lambda mask: (-sum(votes[block] for block in mask), mask))

    def _recovered(self, number: int, entrants: Sequence[Mask], steps: int, note: str = "") -> dict[Mask, Tensor]:
        """Recover entrants; returns the losses of each, (samples,), infinite if they are not finite."""
        losses, show = {}, self.trainer.accelerator.is_main_process
        with track(f"race, round {number}{note}", len(entrants), show=show) as progress:
            for mask in entrants:
                losses[mask] = self._recover(mask, number, steps)
                progress.advance()
        if number == 1 and not note and not any(math.isfinite(mean_of(values)) for values in losses.values()):
            raise UserError(f"search.lr is {self.how.lr}: after {steps} steps no entrant has a finite loss; lower it")
        return losses

    def _recover(self, mask: Mask, number: int, steps: int) -> Tensor:
        """Recover an entrant and judge it. Only its losses are kept: weights of all would fill a disk."""
        quiet, stage = self.quiet, f"race {number}"
        self.spent += steps
        self.evaluations += steps * (self.how.batch_size or quiet.batch_size) + len(self.judged)
        part = self.run and self.run.part("search", f"{stage} of {folder_name(mask)}")
        if part is not None and (part / JUDGED).exists():
            return read_weights(part / JUDGED)["losses"]
        student = prune(self.task, Decision(blocks=tuple(self.task.blocks), kept=mask, method="Race"))
        judged = replace(self.task, model=student, train=self.judged)
        calibration = Calibration(judged, quiet, len(self.judged), 64, "race")
        try:
            self.how.recovery(steps)(self.trained, student, None, quiet, part, stage=stage)
            losses = calibration.sample_losses(torch.ones(1, len(mask)))[0]
        except Diverged:
            losses = torch.full((len(self.judged),), math.inf, dtype=torch.float64)
        if part is not None:
            on_main_process(partial(_keep_losses, part, stage, losses))
        return losses

    def _record(self, losses: Mapping[Mask, Tensor], leader: Mask, steps: int) -> None:
        def entry(mask: Mask) -> dict[str, Any]:
            mean, error = difference(losses[mask], losses[leader])
            found = {"loss": mean_of(losses[mask]), "behind": mean, "standard_error": error}
            finite = {name: value if math.isfinite(value) else None for name, value in found.items()}
            return {"kept": list(mask), "of": self.of[mask], "steps": steps, **finite}

        self.rounds.append([entry(mask) for mask in sorted(losses, key=lambda mask: mean_of(losses[mask]))])


def _keep_losses(part: RunFolder, stage: str, losses: Tensor) -> None:
    save_tensors(part / JUDGED, {"losses": losses})
    part.drop_checkpoints(stage)
