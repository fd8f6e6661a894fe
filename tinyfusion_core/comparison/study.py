"""Compares selectors, or recoveries, under the same budget and data, with random subsets as reference.

`Compare` and `Audit` are two views of the same cached results: decisions, losses right after pruning, recoveries.
Finished results are never computed again (see `cache.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from typing_extensions import override

from ..errors import UserError, require
from ..evaluation.metrics import HeldOutLoss, Metric
from ..parsing.settings import Settings
from ..protocols.task import Task
from ..runtime.distributed import on_main_process
from ..runtime.files import FORMERLY, write_json
from ..runtime.locking import owned
from ..runtime.progress import Tracker, track
from ..runtime.run_folder import COMPARISON, COMPARISON_RESULTS, NOW, RESULT_CACHE, RunFolder, is_comparison
from ..runtime.seeding import generator
from ..samplers.compiled import compile_constraints
from ..selection.base import Selector
from ..selection.budget import CostBudget, measure, save_costs
from ..selection.costs import NetworkCosts
from ..training.recover import Recover
from ..training.trainer import Trainer
from .cache import Elsewhere, ResultCache
from .candidates import Candidates, line_up
from .results import ComparisonResults, Entry, check_folder
from .statistics import RANDOM


@dataclass(frozen=True, kw_only=True)
class Comparison(Settings):
    """The common part of `Compare` and `Audit`."""

    candidates: dict[str, Selector] | None = None
    seeds: int = 3

    def __post_init__(self) -> None:
        require(self.seeds >= 1, f"{self.view}.seeds", self.seeds, "at least 1")
        require(self.candidates != {}, f"{self.view}.candidates", {}, "at least one; null takes every criterion")
        for name in self.candidates or {}:
            named = name.strip() not in ("", RANDOM)
            require(named, f"{self.view}.candidates: the name of one", name, f"a text, and not '{RANDOM}'")

    @property
    def view(self) -> str:
        """Name of the command: `compare` or `audit`."""
        return type(self).__name__.lower()

    def reference(self) -> tuple[int, int]:
        """Return how many random subsets to recover, and with how many seeds."""
        raise NotImplementedError  # under ABC, jsonargparse would write sections as class_path and init_args

    def recovery(self, recover: Recover) -> Recover:
        """Return the recovery of every subset that has no other one."""
        return recover

    def other_recoveries(self) -> Mapping[str, Recover]:
        """Return the recoveries of the candidates by name; without any they have that of all subsets."""
        return {}

    def cost_budgets(self, search: Selector | None) -> list[CostBudget]:
        """Return the cost budgets of the candidates; see `Selector.cost_budgets`."""
        given = self._given(search).values()
        return [budget for selector in given for budget in selector.cost_budgets()]

    def candidates_for(
        self, search: Selector | None, blocks: Sequence[str], costs: Mapping[str, NetworkCosts] | None = None
    ) -> Candidates:
        """Return what would be compared in a network with these blocks.

        Args:
            search: without candidates: the search to compare every criterion with.
            blocks: paths of the blocks.
            costs: costs of the network, by name of the `cost_budgets`.

        Raises:
            UserError: candidates do not fit or differ in their budget (all of them are named), or there are none.
        """
        selectors, costs, recoveries = self._given(search), costs or {}, self.other_recoveries()
        every = self.candidates is None and not recoveries
        return line_up(self.view, selectors, blocks, costs, every).each_recovered(recoveries)

    def _given(self, search: Selector | None) -> dict[str, Selector]:
        """The candidates of the recipe, by name."""
        if self.candidates is not None:
            return self.candidates
        if search is None:
            raise UserError(f"{self.view}: give candidates, or a search to compare the criteria with")
        return {"search": search}

    def __call__(
        self,
        task: Task,
        recover: Recover,
        trainer: Trainer,
        run_dir: Path | str,
        search: Selector | None = None,
        evaluate: Sequence[Metric] = (),
        elsewhere: Elsewhere | None = None,
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
            elsewhere: lets other processes compute results, which they keep in the same folder (see `worker`). By
                default this process does, or all of those that were started together.

        Raises:
            UserError: candidates do not fit the network or differ in their budget (all of them are named); one cannot
                decide, or not as previewed; or the folder holds something else.
            Interrupted: a signal arrived; the same call resumes.
        """
        folder = RunFolder(run_dir)
        check_folder(folder.path, self.view)
        costs = self._costs(search, task, trainer, folder)
        candidates = self.candidates_for(search, task.blocks, costs)
        selectors = candidates.selectors
        seeds, (num_random, num_seeds) = tuple(trainer.seed + i for i in range(self.seeds)), self.reference()
        allowed = compile_constraints(task.blocks, self.view, **candidates.settings(task.backbone.limits(task.teacher)))
        subsets = allowed.distinct(num_random, generator(trainer.seed, "comparison", "random subsets"))
        work = 2 * len(selectors) * len(seeds) + len(subsets) * num_seeds
        with ExitStack() as stack:

            def take() -> None:
                stack.enter_context(owned(folder.path, COMPARISON))
                if not is_comparison(folder.path):  # from here on it is
                    begun = {"part": "", "what": "beginning", "done": 0, "total": work}
                    write_json(folder / RESULT_CACHE / NOW, begun)

            on_main_process(take)
            on_main_process(lambda: save_costs(costs, task, trainer, folder.path))
            progress = stack.enter_context(trainer.track(self.view, work))
            cache = self._cache(task, recover, trainer, folder, progress, evaluate)
            teacher = cache.judge_teacher()
            pairs = [(name, candidates.recoveries.get(name, "")) for name in selectors]
            choices = [Entry(name, seed, (), recovery=recovery) for seed in seeds for name, recovery in pairs]
            cache.hand_out(elsewhere, choices, selectors)
            decided = [cache.decide(e, selectors[e.method]) for e in choices]
            for entry in decided:
                if problem := candidates.outside(entry.kept, task.blocks):
                    raise UserError(f"{self.view}: with seed {entry.seed} {entry.method} keeps {problem}")
            masks = [Entry("", seed, kept) for seed in seeds[:num_seeds] for kept in subsets]
            cache.hand_out(elsewhere, [*masks, *decided], selectors)
            results = ComparisonResults(
                view=self.view,
                blocks=tuple(task.blocks),
                budget=candidates.recorded,
                num_masks=allowed.num_masks,
                steps=self.recovery(recover).steps,
                seeds=seeds,
                teacher=teacher,
                learned=tuple(name for name, s in selectors.items() if s.learned() is not None),
                entries=cache.recover(decided, full=True),
                masks=cache.recover(masks),
                left_out=candidates.left_out,
                note=f"draws for each of {len(task.held_out)} held-out samples: {cache.held_out.draws}",
                recoveries={name: how.steps for name, how in self.other_recoveries().items()},
            )
            on_main_process(lambda: results.save(folder / COMPARISON_RESULTS))
        return results

    def worker(
        self,
        task: Task,
        recover: Recover,
        trainer: Trainer,
        run_dir: Path | str,
        search: Selector | None = None,
        evaluate: Sequence[Metric] = (),
    ) -> Callable[[Entry], None]:
        """Return what computes a result for another process, with the arguments of its call.

        It takes an entry as `elsewhere` hands it out: without blocks they are chosen, otherwise it is recovered.
        """
        folder = RunFolder(run_dir)
        candidates = self.candidates_for(search, task.blocks, self._costs(search, task, trainer, folder))
        with track(self.view, 0, main=False) as unseen:
            cache = self._cache(task, recover, trainer, folder, unseen, evaluate, helps=True)

        def compute(entry: Entry) -> None:
            if entry.kept:
                cache.recover([entry], full=entry.method != "")
            else:
                cache.decide(entry, candidates.selectors[entry.method])

        return compute

    def _cache(
        self,
        task: Task,
        recover: Recover,
        trainer: Trainer,
        folder: RunFolder,
        progress: Tracker,
        evaluate: Sequence[Metric],
        helps: bool = False,
    ) -> ResultCache:
        held_out = next((m for m in evaluate if isinstance(m, HeldOutLoss)), HeldOutLoss())
        columns, recoveries = self._columns(evaluate), {"": self.recovery(recover), **self.other_recoveries()}
        return ResultCache(task, recoveries, trainer, folder, progress, held_out, columns, helps)

    def _costs(
        self, search: Selector | None, task: Task, trainer: Trainer, folder: RunFolder
    ) -> dict[str, NetworkCosts]:
        """What the network costs, by name of the budgets; as it was measured before, if it was."""
        budgets = self.cost_budgets(search)
        return on_main_process(lambda: measure(budgets, task, trainer, folder.path)) if budgets else {}

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
        recoveries: by name, instead of the recipe's: each recovers what every candidate chooses, or the recipe's search
            alone. In a recipe they say what differs from `recover`, which random subsets keep.
    """

    random: int = 16
    recoveries: dict[str, Recover] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.random >= 0, "compare.random", self.random, "0 or more")
        fit = self.recoveries is None or (self.recoveries and not {"", RANDOM} & {n.strip() for n in self.recoveries})
        require(bool(fit), "compare.recoveries", list(self.recoveries or {}), f"one or more, none '{RANDOM}', or null")

    @override
    def other_recoveries(self) -> Mapping[str, Recover]:
        return self.recoveries or {}

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
        subset_seeds: with how many of the seeds the random subsets are recovered.
        steps: steps of every recovery, instead of the recipe's. The average of the weights is adapted: of
            `recover.ema` only 0 is kept, because another decay would still be at the first weights.
    """

    masks: int = 100
    subset_seeds: int = field(default=1, metadata={FORMERLY: "healings"})
    steps: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.masks >= 3, "audit.masks", self.masks, "at least 3")
        seeds = f"1 to audit.seeds ({self.seeds})"
        require(1 <= self.subset_seeds <= self.seeds, "audit.subset_seeds", self.subset_seeds, seeds)
        require(self.steps >= 1, "audit.steps", self.steps, "at least 1")

    @override
    def reference(self) -> tuple[int, int]:
        return self.masks, self.subset_seeds

    @override
    def recovery(self, recover: Recover) -> Recover:
        return recover.with_steps(self.steps)

    @override
    def _columns(self, evaluate: Sequence[Metric]) -> dict[str, Metric]:
        return {}
