"""Compares selectors under the same budget, data and recovery, with random subsets as reference.

`Compare` and `Audit` are two views of the same cached results: decisions, losses right after pruning, recoveries.
Finished results are never computed again (see `cache.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from typing_extensions import override

from ..errors import UserError, require
from ..evaluation.metrics import HeldOutLoss, Metric
from ..protocols.task import Task
from ..runtime.distributed import on_main_process
from ..runtime.files import read_json
from ..runtime.locking import owned
from ..runtime.progress import track
from ..runtime.run_folder import COMPARISON_RESULTS, RunFolder
from ..runtime.seeding import generator
from ..samplers.compiled import compile_constraints
from ..samplers.constraints import Budget, budget_text
from ..selection.base import Selector, count_by_list
from ..selection.criteria import BKSDM, Criterion, FirstN, LastN, Uniform
from ..selection.sensitivity import Greedy, LeaveOneOut, Taylor
from ..selection.similarity import BlockInfluence, InputOutputMSE, SpanSimilarity
from ..training.recover import Recover
from ..training.trainer import Trainer
from .cache import ResultCache
from .results import ComparisonResults, Entry
from .statistics import RANDOM

CRITERIA: tuple[type[Criterion], ...] = (
    Uniform, FirstN, LastN, BKSDM, BlockInfluence, InputOutputMSE, SpanSimilarity, LeaveOneOut, Greedy, Taylor
)  # fmt: skip
"""All criteria except the random one, which is the reference."""


@dataclass(frozen=True)
class Candidates:
    """What is compared.

    Attributes:
        selectors: searches and criteria by name.
        budget: how many blocks each of them keeps.
        left_out: criteria that are not available at this budget, with the reason.
    """

    selectors: Mapping[str, Selector]
    budget: Budget
    left_out: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The common part of `Compare` and `Audit`."""

    candidates: dict[str, Selector] | None = None
    seeds: int = 3

    def __post_init__(self) -> None:
        require(self.seeds >= 1, f"{self.view}.seeds", self.seeds, "at least 1")
        require(self.candidates != {}, f"{self.view}.candidates", {}, "at least one; null takes every criterion")
        for name in self.candidates or {}:
            named = isinstance(name, str) and name.strip() not in ("", RANDOM)
            require(named, f"{self.view}.candidates: the name of one", name, f"a text, and not '{RANDOM}'")

    @property
    def view(self) -> str:
        """Name of the command: `compare` or `audit`."""
        return type(self).__name__.lower()

    def reference(self) -> tuple[int, int]:
        """Return how many random subsets to recover, and with how many seeds."""
        raise NotImplementedError  # under ABC, jsonargparse would write sections as class_path and init_args

    def recovery(self, recover: Recover) -> Recover:
        """Return the recovery of every subset."""
        return recover

    def candidates_for(self, search: Selector | None, blocks: Sequence[str]) -> Candidates:
        """Return what would be compared in a network with these blocks.

        Raises:
            UserError: candidates do not fit or differ in their budget (all of them are named), or there are none.
        """
        if self.candidates is not None:
            return Candidates(self.candidates, _common_budget(self.view, self.candidates, blocks))
        if search is None:
            raise UserError(f"{self.view}: give candidates, or a search to compare the criteria with")
        budget = _budget(search, blocks)
        keep = budget if isinstance(budget, int) else dict(budget)
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
        return Candidates(candidates, budget, left_out)

    def __call__(
        self,
        task: Task,
        recover: Recover,
        trainer: Trainer,
        run_dir: Path | str,
        search: Selector | None = None,
        evaluate: Sequence[Metric] = (),
    ) -> ComparisonResults:
        """Compute the results that are missing, and return all.

        Args:
            task: what to prune; candidates see its training data only, results are on its held-out data.
            recover: the recovery of every subset.
            trainer: how to train; its seed is the first one.
            run_dir: where results are kept.
            search: without candidates: the search to compare every criterion with.
            evaluate: a `HeldOutLoss` with options of its own and, for `compare`, further metrics of the candidates; of
                a metric with several measurements the first is used (see `Metric.column`).

        Raises:
            UserError: candidates do not fit the network or differ in their budget (all of them are named); one cannot
                decide, or not as previewed; or the folder holds a run or the other view's results.
            Interrupted: a signal arrived; the same call resumes.
        """
        candidates = self.candidates_for(search, task.blocks)
        selectors, budget = candidates.selectors, candidates.budget
        folder, main = RunFolder(run_dir), trainer.accelerator.is_main_process
        self._check_folder(folder)
        seeds = tuple(trainer.seed + i for i in range(self.seeds))
        num_random, num_seeds = self.reference()
        allowed = compile_constraints(task.blocks, self.view, keep=budget)
        subsets = allowed.distinct(num_random, generator(trainer.seed, "comparison", "random subsets"))
        work = 2 * len(selectors) * len(seeds) + len(subsets) * num_seeds
        with ExitStack() as stack:

            def take() -> None:
                stack.enter_context(owned(folder.path, "--run-dir"))

            on_main_process(take)
            progress = stack.enter_context(track(self.view, work, show=main))
            held_out = next((m for m in evaluate if isinstance(m, HeldOutLoss)), HeldOutLoss())
            cache = ResultCache(
                task, self.recovery(recover), trainer, folder, progress, held_out, self._columns(evaluate)
            )
            teacher = cache.calibrate(range(len(task.blocks)))
            decided = [cache.decide(name, s, seed) for seed in seeds for name, s in selectors.items()]
            for entry in decided:
                kept = len(entry.kept) if isinstance(budget, int) else count_by_list(entry.kept, task.blocks)
                if kept != budget:
                    raise UserError(
                        f"{self.view}: with seed {entry.seed} {entry.method} keeps {budget_text(kept)}, "
                        f"where its preview keeps {budget_text(budget)} of the blocks"
                    )
            results = ComparisonResults(
                view=self.view,
                blocks=tuple(task.blocks),
                budget=budget,
                num_masks=allowed.num_masks,
                steps=cache.recovery.steps,
                seeds=seeds,
                teacher=teacher,
                learned=tuple(name for name, s in selectors.items() if s.learned() is not None),
                entries=tuple(cache.recover(entry, full=True) for entry in decided),
                masks=tuple(cache.recover(Entry("", seed, kept)) for seed in seeds[:num_seeds] for kept in subsets),
                left_out=candidates.left_out,
                note=f"draws for each of {len(task.held_out)} held-out samples: {held_out.draws}",
            )
            on_main_process(lambda: results.save(folder / COMPARISON_RESULTS))
        return results

    def _check_folder(self, folder: RunFolder) -> None:
        """Raise UserError if the folder holds something that this would overwrite."""
        what = "a run" if (folder / "run.json").exists() else ""
        found = folder / COMPARISON_RESULTS
        if found.exists() and (view := read_json(found).get("view")) != self.view:
            what = f"the results of another command ({view})"
        if what:
            raise UserError(f"{folder.path}: holds {what}; choose another --run-dir")

    def _columns(self, evaluate: Sequence[Metric]) -> dict[str, Metric]:
        """The metrics to measure besides the held-out loss, by column name; equal names are numbered."""
        columns: dict[str, Metric] = {}
        names = [metric.column for metric in evaluate]
        for i, (name, metric) in enumerate(zip(names, evaluate, strict=True)):
            if name is not None:
                same = names[:i].count(name)
                columns[f"{name} ({same + 1})" if same else name] = metric
        return columns


@dataclass(frozen=True, kw_only=True)
class Compare(Comparison):
    """Prune with every candidate, recover all of them alike, and compare them with random subsets.

    Args:
        candidates: searches and criteria by name, all with the same budget; by default the recipe's search and
            every criterion.
        seeds: how often each candidate decides and recovers: with the trainer's seed, the next one, and so on.
        random: random subsets to recover, with the first seed.
    """

    random: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.random >= 0, "compare.random", self.random, "0 or more")

    @override
    def reference(self) -> tuple[int, int]:
        return self.random, 1


@dataclass(frozen=True, kw_only=True)
class Audit(Comparison):
    """Recover random subsets, or all of them, and see how well every cheap score predicts the recovered loss.

    Args:
        candidates: searches and criteria by name, all with the same budget; by default the recipe's search and
            every criterion.
        seeds: how often each candidate decides and recovers: with the trainer's seed, the next one, and so on.
        masks: random subsets within the budget; all of them if there are no more.
        healings: with how many of the seeds the random subsets are recovered.
        steps: steps of every recovery, instead of the recipe's. The average of the weights is adapted: of
            `recover.ema` only 0 is kept, because another decay would still be at the first weights.
    """

    masks: int = 100
    healings: int = 1
    steps: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.masks >= 3, "audit.masks", self.masks, "at least 3")
        require(1 <= self.healings <= self.seeds, "audit.healings", self.healings, f"1 to audit.seeds ({self.seeds})")
        require(self.steps >= 1, "audit.steps", self.steps, "at least 1")

    @override
    def reference(self) -> tuple[int, int]:
        return self.masks, self.healings

    @override
    def recovery(self, recover: Recover) -> Recover:
        return recover.with_steps(self.steps)

    @override
    def _columns(self, evaluate: Sequence[Metric]) -> dict[str, Metric]:
        return {}


def _common_budget(view: str, candidates: Mapping[str, Selector], blocks: Sequence[str]) -> Budget:
    """How many blocks all candidates keep. Raises UserError unless they agree, in total if that is all one promises."""
    problems, budgets = [], {}
    for name, candidate in candidates.items():
        try:
            budgets[name] = _budget(candidate, blocks)
        except UserError as e:
            problems.append(f"{view}.candidates.{name}: {e}")
    if any(isinstance(budget, int) for budget in budgets.values()):
        budgets = {name: b if isinstance(b, int) else sum(b.values()) for name, b in budgets.items()}
    if any(budget != other for budget in budgets.values() for other in budgets.values()):
        problems.append(
            f"{view}.candidates: not the same budget: "
            + "; ".join(f"{name} keeps {budget_text(budget)}" for name, budget in budgets.items())
            + ". Only the same budget tells which choice is better"
        )
    if problems:
        raise UserError("\n".join(problems))
    return next(iter(budgets.values()))


def _budget(candidate: Selector, blocks: Sequence[str]) -> Budget:
    budget = candidate.budget(blocks)
    if budget is None:
        raise UserError("has a budget of costs; only candidates that keep the same number of blocks are compared")
    candidate.preview(blocks)  # what else is wrong with it shows here
    return budget
