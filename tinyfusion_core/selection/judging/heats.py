"""The rounds of a race: who enters, who leads, who goes on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ...errors import UserError
from ...pruning.decision import Decision, provenance
from ...runtime.stages import SEARCH
from ...samplers.compiled import Constraints
from .paired import Mask, difference, leading, mean_of, surviving
from .recoveries import ShortRecoveries
from .surrogate import predicted

if TYPE_CHECKING:
    from ..race import Race

LEAST = 10
"""Steps of a first recovery, if there are enough: along a cosine they rank masks nearly as a hundred do."""


@dataclass
class Heats:
    """One race.

    Attributes:
        how: its settings, bound to the costs of the network.
        recoveries: recovers masks and judges them, with the steps that are left for this race.
        constraints: what masks obey.
        of: who proposed each mask.
        near: of each neighbour, whose it is and the loss that was predicted.
        rounds: for each round, every entrant with its loss, for the record.
    """

    how: Race
    recoveries: ShortRecoveries
    constraints: Constraints = field(init=False)
    of: dict[Mask, list[str]] = field(default_factory=dict)
    near: dict[Mask, dict[str, Any]] = field(default_factory=dict)
    rounds: list[list[dict[str, Any]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.constraints = self.how.compiled(self.recoveries.task.blocks)

    def decision(self) -> Decision:
        """Run the race; returns what won, without what the costs were."""
        marginals, task = self._propose(), self.recoveries.task
        leader = self._race(list(self.of))
        where = provenance(self.recoveries.trainer.seed, task.source)
        where |= {"evaluations": self.recoveries.evaluations, "race": self.rounds}
        return replace(self.how._decision(task.blocks, self.constraints, leader, where), marginals=marginals)

    def _race(self, entrants: list[Mask]) -> Mask:
        """Recover entrants, round by round. Returns the winner."""
        how, recoveries = self.how, self.recoveries
        leader, before = entrants[0], 0
        for number in range(1, how.rounds + 1):
            first = number == 1
            both = 2 if first and how.neighbours else 1  # the neighbours' round has a share of its own
            share = recoveries.left // (how.rounds - number + both)
            steps = self._length(entrants, share, both)
            if not steps and first:
                within = "" if how.minutes is None else f", in the time of search.minutes {how.minutes:g}"
                raise UserError(
                    f"search.steps is {how.steps}{within}: too few for {len(entrants)} masks to recover; give at least "
                    f"{len(entrants)}, and ten times as many to tell them apart"
                )
            if steps <= before:  # with few entrants what is left is one round
                steps = recoveries.left // len(entrants)
            if steps <= before:  # a shorter recovery has nothing to say about those that were close in a longer one
                break
            before, losses = steps, self._recovered(number, entrants, steps)
            leader = leading(losses, None if first else leader, how.sure)
            if both > 1:
                leader = self._try_neighbours(losses, leader, (number, steps), both * share - steps * len(entrants))
            self._record(losses, leader, steps)
            entrants = surviving(losses, leader)
            if len(entrants) == 1:
                break
        return leader

    def _length(self, entrants: Sequence[Mask], share: int, both: int) -> int:
        """How many steps the recoveries of a round take.

        Args:
            entrants: who enters.
            share: updates that a round may take.
            both: 2 if neighbours enter it too, with a share of their own; else 1.
        """
        steps = share // len(entrants)
        if both > 1:  # shorter, if that lets more neighbours enter: those of two leaders
            most = len(entrants) + 2 * len(self.constraints.exchanges(entrants[0]))
            steps = min(steps, both * share // most)
        return max(steps, min(LEAST, self.recoveries.left // len(entrants)))

    def _propose(self) -> tuple[float, ...]:
        """Let everybody propose; returns the marginals of the first who has learned some."""
        recoveries, logged = self.recoveries, False
        run = recoveries.run
        marginals: tuple[float, ...] = ()
        # Those that train come last: a choice outside of the budget ends the race before they cost anything.
        of = recoveries.trainer, recoveries.trainer.accelerator.num_processes
        for i, proposer in sorted(enumerate(self.how.proposed_by()), key=lambda pair: len(pair[1].trainings(*of))):
            # One search is shown as that of the run.
            own, name = proposer.learned() is not None and not logged, type(proposer).__name__
            part = run if own or run is None else run.part(SEARCH, f"proposer {i}")
            steps = next((training.steps for training in proposer.trainings(*of)), None)
            recoveries.tell(f"{name} proposes", steps, "" if own else f"proposer {i}")
            trainer = recoveries.trainer if own else recoveries.quiet
            found = proposer.propose(recoveries.task, trainer, part, self.how.masks)
            logged |= own
            for mask in found.masks:
                if not self.constraints.accepts(mask):
                    raise UserError(
                        f"search.proposers[{i}]: {name} keeps {' '.join(map(str, mask))}, which is outside of the "
                        "race's budget; give it the same budget, protected blocks and constraints"
                    )
                self.of.setdefault(tuple(mask), []).append(name)
            marginals = marginals or found.decision.marginals
            recoveries.evaluations += int(found.decision.provenance.get("evaluations", 0))
        return marginals

    def _try_neighbours(self, losses: dict[Mask, Tensor], leader: Mask, heat: tuple[int, int], share: int) -> Mask:
        """Let neighbours of the best enter a round, a quarter of them at a time. Returns the leader at the end.

        `losses` gets theirs; `heat` is the number of the round and its steps, `share` the updates that they may take.
        """
        number, steps = heat
        left = max(0, share) // steps
        at_once = max(2, math.ceil(left / 4))
        while left and (near := self._neighbours(leader, losses)[: min(at_once, left)]):
            left -= len(near)
            for mask, told in near:
                self.of[mask], self.near[mask] = ["neighbour"], told
            losses |= self._recovered(number, [mask for mask, _ in near], steps, ", neighbours")
            leader = leading(losses, leader, self.how.sure)
        return leader

    def _neighbours(self, leader: Mask, tried: Mapping[Mask, Tensor]) -> list[tuple[Mask, dict[str, Any]]]:
        """Masks one exchange away from those that would go on and not tried, those predicted to be best first.

        With each of them whose it is, and its prediction.
        """
        whose: dict[Mask, Mask] = {}
        for mask in surviving(tried, leader):
            for out, back in self.constraints.exchanges(mask):
                whose.setdefault(tuple(sorted({*mask} - {*out} | {*back})), mask)
        masks = sorted(whose.keys() - tried.keys())
        known = {mask: loss for mask, losses in tried.items() if math.isfinite(loss := mean_of(losses))}
        found = predicted(known, masks, self.constraints.num_blocks)
        order, losses = found.argsort(stable=True).tolist(), found.tolist()
        return [(masks[i], {"neighbour_of": list(whose[masks[i]]), "predicted": losses[i]}) for i in order]

    def _recovered(self, number: int, entrants: Sequence[Mask], steps: int, note: str = "") -> dict[Mask, Tensor]:
        """Recover entrants; returns the losses of each, (samples,), infinite if they are not finite."""
        losses = self.recoveries.losses(entrants, f"race {number}", steps, note)
        if number == 1 and not note and not any(math.isfinite(mean_of(values)) for values in losses.values()):
            recovery = self.recoveries.recovery(steps)
            raise UserError(
                f"search.lr is {recovery.lr}: after {recovery.steps} steps no entrant has a finite loss; lower it"
            )
        return losses

    def _record(self, losses: Mapping[Mask, Tensor], leader: Mask, steps: int) -> None:
        updates = self.recoveries.recovery(steps).steps

        def entry(mask: Mask) -> dict[str, Any]:
            mean, error = difference(losses[mask], losses[leader])
            found = {"loss": mean_of(losses[mask]), "behind": mean, "standard_error": error}
            finite = {name: value if math.isfinite(value) else None for name, value in found.items()}
            return {"kept": list(mask), "of": self.of[mask], "steps": updates, **finite, **self.near.get(mask, {})}

        self.rounds.append([entry(mask) for mask in sorted(losses, key=lambda mask: mean_of(losses[mask]))])
