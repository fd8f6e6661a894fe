"""Which choice of blocks recovers best? The same budget, data and recovery for all of them, and random subsets.

`Compare` and `Audit` are two views on the same cells: a decision, the loss right after pruning, a healing. A finished
cell is never computed again (see `cells.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from .backbone import block_lists
from .budget import Quota, make_quota
from .cells import Cells
from .criteria import BKSDM, Criterion, FirstN, LastN, Uniform
from .decision import Decision
from .errors import UserError, require
from .evaluation import Frechet, HeldOutLoss, Metric
from .findings import Findings, Trial
from .progress import track
from .randomness import generator
from .recover import Recover
from .run_folder import RunFolder
from .search import Search, Selector
from .sensitivity import Greedy, LeaveOneOut, Taylor
from .similarity import BlockInfluence, InputOutputMSE, SpanSimilarity
from .task import Task
from .trainer import Trainer

FINDINGS = "findings.json"
CRITERIA: tuple[type[Criterion], ...] = (
    Uniform, FirstN, LastN, BKSDM, BlockInfluence, InputOutputMSE, SpanSimilarity, LeaveOneOut, Greedy, Taylor
)  # fmt: skip
"""All but the random one, which is what they are judged by."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What `compare` and `audit` share."""

    candidates: dict[str, Selector] | None = None
    seeds: int = 3

    def __post_init__(self) -> None:
        require(self.seeds >= 1, f"{self.view}.seeds", self.seeds, "at least 1")
        require(self.candidates != {}, f"{self.view}.candidates", {}, "at least one; null takes every criterion")

    @property
    def view(self) -> str:
        return type(self).__name__.lower()

    def reference(self) -> tuple[int, int]:
        """How many random subsets to heal, and with how many seeds."""
        raise NotImplementedError

    def recovery(self, recover: Recover) -> Recover:
        """How to heal."""
        return recover

    def __call__(
        self,
        task: Task,
        recover: Recover,
        trainer: Trainer,
        run_dir: Path | str,
        search: Selector | None = None,
        evaluate: Sequence[Metric] = (),
    ) -> Findings:
        """Compute what is not there yet.

        Args:
            task: what to prune; candidates see its training data alone, figures are of its held-out data.
            recover: the recovery that every subset gets.
            trainer: how to train; its seed is the first one.
            run_dir: where cells are kept, and the findings.
            search: with no candidates given: the one to compare every criterion with.
            evaluate: a `HeldOutLoss` and, for `compare`, a `Frechet` with options of their own.

        Raises:
            UserError: candidates do not fit the network or differ in their budget; all of them are named.
            Interrupted: a signal came; the same call goes on.
        """
        candidates, left_out = self._candidates(search, task.blocks)
        budget = common_budget(self.view, candidates, task.blocks)
        folder, main = RunFolder(run_dir), trainer.accelerator.is_main_process
        seeds = tuple(trainer.seed + i for i in range(self.seeds))
        num_random, num_seeds = self.reference()
        quota = make_quota(task.blocks, budget, None, ())
        subsets = _subsets(quota, num_random, trainer.seed)
        work = 2 * len(candidates) * len(seeds) + len(subsets) * num_seeds
        with ExitStack() as stack:
            if main:
                stack.enter_context(folder.owned())
            trainer.accelerator.wait_for_everyone()
            progress = stack.enter_context(track(self.view, work, show=main))
            cells = Cells(task, self.recovery(recover), trainer, folder, progress, self._metrics(evaluate))
            teacher = cells.calibrate(range(len(task.blocks)))
            decided = [cells.decide(name, c, seed) for seed in seeds for name, c in candidates.items()]
            trials = tuple(cells.heal(trial, full=True) for trial in decided)
            masks = tuple(cells.heal(Trial("", seed, kept)) for seed in seeds[:num_seeds] for kept in subsets)
            findings = Findings(
                view=self.view,
                blocks=tuple(task.blocks),
                budget=budget,
                num_masks=quota.num_masks,
                steps=cells.recover.steps,
                seeds=seeds,
                teacher=teacher,
                learned=tuple(name for name, c in candidates.items() if isinstance(c, Search)),
                trials=trials,
                masks=masks,
                left_out=left_out,
                note=f"draws for each of {len(task.held_out)} held-out samples: {cells.held_out.draws}",
            )
            if main:
                findings.save(folder / FINDINGS)
        return findings

    def _candidates(
        self, search: Selector | None, blocks: Sequence[str]
    ) -> tuple[Mapping[str, Selector], dict[str, str]]:
        """What is compared, and criteria that cannot be had at the budget, with the reason."""
        if self.candidates is not None:
            return self.candidates, {}
        if search is None:
            raise UserError(f"{self.view}: give candidates, or a search to compare the criteria with")
        keep = _budget(search.preview(blocks))
        candidates: dict[str, Selector] = {"search": search}
        left_out = {}
        for criterion in CRITERIA:
            try:
                candidate = criterion(keep=keep)
                candidate.preview(blocks)
            except UserError as e:
                left_out[criterion.__name__] = str(e)
            else:
                candidates[criterion.__name__] = candidate
        return candidates, left_out

    def _metrics(self, evaluate: Sequence[Metric]) -> tuple[HeldOutLoss, Frechet | None]:
        loss = next((m for m in evaluate if isinstance(m, HeldOutLoss)), HeldOutLoss())
        return loss, next((m for m in evaluate if isinstance(m, Frechet)), None)


@dataclass(frozen=True, kw_only=True)
class Compare(Comparison):
    """Prune with every candidate, recover all of them alike, and set them beside random subsets.

    Args:
        candidates: searches and criteria by name, all with the same budget; by default the recipe's search and
            every criterion.
        seeds: how often each candidate decides and heals: with the trainer's seed, the next one, and so on.
        random: random subsets to heal, with the first seed.
    """

    random: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.random >= 0, "compare.random", self.random, "0 or more")

    def reference(self) -> tuple[int, int]:
        return self.random, 1


@dataclass(frozen=True, kw_only=True)
class Audit(Comparison):
    """Heal random subsets, or all of them, and see how well every cheap score foretells the healed loss.

    Args:
        candidates: searches and criteria by name, all with the same budget; by default the recipe's search and
            every criterion.
        seeds: how often each candidate decides and heals: with the trainer's seed, the next one, and so on.
        masks: random subsets within the budget; all of them when there are no more.
        healings: how many of the seeds the random subsets are healed with.
        steps: of every recovery, in the place of the recipe's.
    """

    masks: int = 100
    healings: int = 1
    steps: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.masks >= 3, "audit.masks", self.masks, "at least 3")
        require(1 <= self.healings <= self.seeds, "audit.healings", self.healings, f"1 to audit.seeds ({self.seeds})")
        require(self.steps >= 1, "audit.steps", self.steps, "at least 1")

    def reference(self) -> tuple[int, int]:
        return self.masks, self.healings

    def recovery(self, recover: Recover) -> Recover:
        return replace(recover, steps=self.steps)

    def _metrics(self, evaluate: Sequence[Metric]) -> tuple[HeldOutLoss, Frechet | None]:
        return super()._metrics(evaluate)[0], None


def common_budget(view: str, candidates: Mapping[str, Selector], blocks: Sequence[str]) -> dict[str, int]:
    """How many blocks of each list all candidates keep. Raises UserError unless they agree."""
    problems, budgets = [], {}
    for name, candidate in candidates.items():
        try:
            budgets[name] = _budget(candidate.preview(blocks))
        except UserError as e:
            problems.append(f"{view}.candidates.{name}: {e}")
    if len({tuple(budget.items()) for budget in budgets.values()}) > 1:
        problems.append(
            f"{view}.candidates: not the same budget: "
            + "; ".join(f"{name} keeps {_spoken(budget)}" for name, budget in budgets.items())
            + ". Only the same budget tells which choice is better"
        )
    if problems:
        raise UserError("\n".join(problems))
    return next(iter(budgets.values()))


def _budget(decision: Decision) -> dict[str, int]:
    lists = block_lists(decision.blocks)
    return {name: len(set(members) & set(decision.kept)) for name, members in lists.items()}


def _spoken(budget: Mapping[str, int]) -> str:
    if len(budget) == 1:
        return str(sum(budget.values()))
    return " + ".join(f"{num} of '{name}'" for name, num in budget.items())


def _subsets(quota: Quota, num: int, seed: int) -> list[tuple[int, ...]]:
    """Distinct random subsets within the budget, all of them if there are no more; a larger `num` only adds to them."""
    if num >= quota.num_masks:
        parts = [itertools.combinations(choice.blocks, choice.num_kept) for choice in quota.choices]
        return [tuple(sorted(itertools.chain(*kept))) for kept in itertools.product(*parts)]
    source, drawn = generator(seed, "comparison", "random subsets"), dict[tuple[int, ...], None]()
    while len(drawn) < num:
        drawn[quota.draw(source)] = None
    return list(drawn)
