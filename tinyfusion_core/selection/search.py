"""The learned search for the blocks whose removal fine-tuning recovers best (TinyFusion, arXiv:2412.01199)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor
from typing_extensions import override

from ..errors import UserError, require
from ..protocols.blocks.paths import list_lengths
from ..protocols.task import Task
from ..protocols.undisturbed import undisturbed
from ..pruning.decision import Decision, provenance
from ..pruning.gating import Gates
from ..pruning.weight_update import LoRA, WeightUpdate, of_stage, taken_along
from ..runtime.distributed import on_main_process
from ..runtime.run_folder import RunFolder
from ..runtime.seeding import seed_of
from ..samplers.base import BlockSampler
from ..samplers.constraints import Rules, build, check_keep, check_said, combined
from ..samplers.demands import Budget, Spending
from ..samplers.grouped import GroupedSampler
from ..samplers.patterns import Pattern, parse_pattern
from ..samplers.subset import ScoreFunction
from ..training.loop import Fit
from ..training.objective import Ema, Optimization, ema_decay
from ..training.recover import Recover
from ..training.starts.inherit import Inherit, leave
from ..training.trainer import Trainer
from .base import FOLLOWS, Decisive, Proposals, Selector, prepared
from .budget import CostBudget, check_bound, parse_budget
from .costs import NetworkCosts
from .learning.gated_loss import GatedLoss, Learned, check_learned, search_mode


@dataclass(frozen=True, kw_only=True)
class Search(Selector):
    """Learn the gate logits jointly with a weight update that approximates later fine-tuning.

    Args:
        pattern: keep N of M: `[2, 4]`, a list with a pair for each group, or a mapping by block list. Short for
            `sampler: GroupedSampler`.
        keep: how many blocks are kept, in total or by block list, anywhere. Short for `sampler: ScoreFunction`.
        budget: what the pruned network may cost at most: `0.5x` of its parameters, `{parameters: 400M}`,
            `{flops: 0.5x}` or `{latency_ms: 20}` of a forward pass, of `batch_size: 1` by default; measured. Short for
            `sampler: ScoreFunction` with costs; give one of the four.
        tau: with `pattern`: Gumbel temperature at the first and at the last step; default the sampler's.
        scaling: with `pattern`: factor on the gate logits at the first and at the last step; default the sampler's.
        sampler: any distribution over masks.
        protect: indices of blocks that must be kept; not with `sampler`.
        constraints: further rules for the masks. With `pattern` only `protect` and `remove`; with costs and a budget
            they replace all four.
        steps: optimizer updates.
        batch_size: samples per update; default the trainer's.
        warmup: fraction of the steps in which the weight update trains under the initial masks, before the gates learn
            from weights that have begun to adapt. The paper uses 0; the effect is in `benchmarks/RESULTS.md`.
        update: the co-trained weight update.
        lr_gates: learning rate of the gate logits, which have no weight decay; default the sampler's.
        lr: learning rate of the weight update; default 1 / steps but at most 1e-3, which is the paper's 1e-4 at 10,000
            steps. A short search must move the weights faster, or it finds what hurts least without recovery.
        weight_decay: weight decay of the weight update.
        clip: largest norm of the gradient of gates and weights.
        ema: decay of the average of the gate logits that decides; default 1 - 10 / steps, which is the paper's 0.999 at
            10,000 steps and lags as little in a short search.
        start: a criterion whose choice the search starts from, instead of a uniform distribution.
        prior: log-odds that the start gives to the blocks it keeps, and minus that to the others, at the first and at
            the last step, linear in between. What the gates learn is added: with a last prior of 0 they alone decide.
        dropped_values: fraction of the samples that drop a block and still run it, because a pathwise gradient needs
            its value; weighted to keep the gradient's mean. Less is faster and noisier; a score function needs none.
        confident: stop when the decision's confidence reaches this value, after the warm-up.
        keep_update: whether the run folder keeps what the weight update has made of the weights that stay, for a
            recovery with `start: Inherit`; in a recipe that start sets it.
    """

    pattern: Pattern | int | None = None
    keep: int | Mapping[str, int] | None = None
    tau: tuple[float, float] | None = None
    scaling: tuple[float, float] | None = None
    sampler: Callable[[Mapping[str, int]], BlockSampler] | None = None
    steps: int = 10_000
    batch_size: int | None = None
    warmup: float = 0.3
    update: WeightUpdate = LoRA()
    lr_gates: float | None = None
    lr: float | None = None
    weight_decay: float = 0.0
    clip: float = 1.0
    ema: float | None = None
    start: Selector | None = None
    prior: tuple[float, float] = (1.0, 1.0)
    dropped_values: float = 1.0
    confident: float | None = None
    protect: Sequence[int] | None = field(default=None, metadata={"neutral": None})
    constraints: Rules | None = field(default=None, metadata={"neutral": None})
    budget: str | float | dict[str, str | float] | None = field(default=None, metadata={"neutral": None})
    keep_update: bool = field(default=False, metadata={FOLLOWS: Inherit.is_start_of, "neutral": False})

    def __post_init__(self) -> None:
        ways = {"pattern": self.pattern, "keep": self.keep, "budget": self.budget, "sampler": self.sampler}
        check_said("search", self.constraints, ways)
        self._own_budget()
        if self.sampler is not None and (self.protect or self.constraints):
            raise UserError(
                "search: protect and constraints go with keep, pattern or budget; give a sampler rules of its own"
            )
        if self.pattern is not None and self.constraints is not None:
            across = sorted(self.constraints.given().keys() - {"protect", "remove"})
            if across:
                raise UserError(
                    f"search.constraints.{across[0]}: holds across the groups of a pattern, which choose each for "
                    "itself; use keep"
                )
        if self.pattern is None and self._shorthand():
            raise UserError(f"search.{next(iter(self._shorthand()))} goes with pattern; set it in the sampler")
        if self.keep_update and type(self.update).merged is WeightUpdate.merged:
            name = type(self.update).__name__
            raise UserError(f"search.update: {name} leaves nothing for recover.start: Inherit, or to judge masks with")
        for key, holds, expected in self._limits():
            require(holds, f"search.{key}", getattr(self, key), expected)
        if self.start is None and tuple(self.prior) != (1.0, 1.0):
            raise UserError("search.prior says how much a start counts; give search.start too")
        if self.pattern is not None:
            object.__setattr__(self, "pattern", parse_pattern(self.pattern))

    def _limits(self) -> Iterator[tuple[str, bool, str]]:
        """Name of every number, whether its value is allowed, and which values are."""
        yield "steps", self.steps >= 1, "at least 1"
        yield "batch_size", self.batch_size is None or self.batch_size >= 1, "at least 1"
        yield "warmup", 0 <= self.warmup < 1, "a fraction from 0 to below 1"
        yield "lr_gates", self.lr_gates is None or self.lr_gates > 0, "a rate above 0"
        yield "prior", min(self.prior) >= 0, "log-odds of 0 or more"
        yield "dropped_values", 0 < self.dropped_values <= 1, "a fraction above 0, at most 1"
        yield "confident", self.confident is None or 0 < self.confident < 1, "a probability"
        yield "lr", self.lr is None or self.lr >= 0, "a rate"
        yield "ema", self.ema is None or 0 <= self.ema < 1, "a decay from 0 to below 1"
        yield "clip", self.clip > 0, "a norm above 0"
        yield "weight_decay", self.weight_decay >= 0, "0 or more"

    @override
    def inputs(self) -> dict[str, str]:
        return {} if self.start is None else {f"start.{key}": value for key, value in self.start.inputs().items()}

    @override
    def preview(self, blocks: Sequence[str]) -> Decision:
        return self.preview_beside(blocks, {})

    def preview_beside(self, blocks: Sequence[str], others: Mapping[str, Selector]) -> Decision:
        """Preview; UserError unless other selectors, by key, keep as many blocks as the search."""
        sampler = self.make_sampler(list_lengths(blocks))
        decision = self._decision(sampler, blocks, {})
        for key, other in {**({"start": self.start} if self.start else {}), **others}.items():
            theirs, ours = len(other.preview(blocks).kept), len(decision.kept)
            if theirs != ours and (isinstance(sampler.budget, int | Mapping) or sampler.choices()):
                raise UserError(f"search.{key}: keeps {theirs} blocks, the search {ours}; give it the same number")
        return decision

    def make_sampler(self, lists: Mapping[str, int]) -> BlockSampler:
        """Return the initial distribution over masks, for block lists of these lengths."""
        check_bound(self.budget, "search")
        if self.sampler is not None:
            return self.sampler(lists)
        rules = combined(self.keep, self.protect or (), self.constraints)
        if self.pattern is not None:
            assert not isinstance(self.pattern, int)  # parse_pattern refuses numbers
            rules.check_shape(sum(lists.values()), "search.constraints")
            return GroupedSampler(lists, self.pattern, **self._shorthand(), protect=rules.protect, remove=rules.remove)
        if self.keep is not None:
            check_keep(self.keep, lists, "search.keep")
        build(rules, lists, "search.constraints")  # what is wrong with them is said under this key
        return ScoreFunction(lists, rules)

    @override
    def cost_budgets(self) -> Sequence[CostBudget]:
        return (*self._own_budget(), *(self.start.cost_budgets() if self.start else ()))

    @override
    def bound(self, costs: Mapping[str, NetworkCosts]) -> Self:
        how = replace(self, start=self.start.bound(costs)) if self.start else self
        for budget in self._own_budget():
            rules = combined(None, self.protect or (), self.constraints)
            return replace(how, budget=None, constraints=budget.rules(costs[budget.name], rules, "search"))
        return how

    def _own_budget(self) -> Sequence[CostBudget]:
        return () if self.budget is None else (parse_budget(self.budget, "search"),)

    @override
    def keeps(self, blocks: Sequence[str]) -> Budget | Spending | None:
        sampler = self.make_sampler(list_lengths(blocks))
        return super().keeps(blocks) if sampler.choices() else sampler.budget

    @override
    def learned(self) -> Search | None:
        return self

    @override
    def trainings(self, trainer: Trainer, processes: int) -> Sequence[Search | Recover]:
        return (self,)

    @override
    def decisive(self, trainer: Trainer) -> Decisive:
        return Decisive(trainer.with_batch_size(self.batch_size), but=("batch_size",))

    def _shorthand(self) -> dict[str, Any]:
        """The options of the grouped sampler that are given here."""
        given = {"tau": self.tau, "scaling": self.scaling}
        return {name: value for name, value in given.items() if value is not None}

    @override
    def __call__(self, task: Task, trainer: Trainer, run: RunFolder | None = None) -> Decision:
        return self.propose(task, trainer, run, 1).decision

    @override
    def propose(self, task: Task, trainer: Trainer, run: RunFolder | None, num: int) -> Proposals:
        """Search, and name the most probable masks. Afterwards the weights are what they were, bit for bit.

        Raises:
            UserError: the pattern does not fit the network, or the loss was not finite for too long.
            Interrupted: a signal arrived; the same call with the same run folder resumes.
        """
        if self.keep_update and run is None:
            raise UserError("search.keep_update: the weights are kept in a run folder; give it as run")
        how, costs = prepared(self, task, trainer, run)
        learned = how.learn(task, trainer, run)
        decision = how.decide(learned, task, trainer)
        left = on_main_process(lambda: leave(learned.weights, task, decision, run)) if run and self.keep_update else {}
        where = {**decision.provenance, **costs, **left}
        return Proposals(replace(decision, provenance=where), learned.sampler.best(num))

    def decide(self, learned: Learned, task: Task, trainer: Trainer) -> Decision:
        """Return the decision of what was learned; UserError if that is nothing."""
        if self.start is None:
            check_learned(self.make_sampler(task.lists), learned.sampler, learned.num_steps)
        taken = {"steps": learned.num_steps, "evaluations": learned.evaluations}
        return self._decision(learned.sampler, task.blocks, {**provenance(trainer.seed, task.source), **taken})

    def learn(self, task: Task, trainer: Trainer, run: RunFolder | None = None) -> Learned:
        """Run the search without the decision. Arguments as for a call."""
        trainer = trainer.with_batch_size(self.batch_size)
        rate = min(1e-3, 1 / self.steps) if self.lr is None else self.lr
        model = trainer.to_device(task.teacher)
        sampler, evaluations, kept = self.make_sampler(task.lists), 0, dict[str, Tensor]()
        if self.start is not None:
            first = self.start(task, trainer.quiet(), run and run.part("search", "start"))
            sampler.set_prior(first.kept, self.prior)
            evaluations = int(first.provenance.get("evaluations", 0))
        # AveragedModel begins with the values after the first step: no bias towards the initial ones.
        ema = Ema(sampler, ema_decay("search", self.steps, self.ema))
        averaged = ema.average.module
        assert isinstance(averaged, BlockSampler)
        with torch.random.fork_rng(), undisturbed(model), ExitStack() as stack:
            torch.manual_seed(seed_of(trainer.seed, "search", "update"))  # LoRA draws its initial values
            paths = task.backbone.block_paths(model)
            update = (
                taken_along(self.update, model, paths, kept) if self.keep_update else self.update.applied(model, paths)
            )
            weights = stack.enter_context(of_stage(update, "search"))
            # Only now: LoRA replaces a branch that is one linear layer.
            blocks, dims = [model.get_submodule(path) for path in task.blocks], task.batch_dim(model)
            stack.enter_context(trainer.transformed(blocks))
            gates = stack.enter_context(Gates(model, task.blocks, dims, task.streams, task.backbone.unneeded))
            search_mode(model, random=sampler.masks_per_sample == 1)
            objective = GatedLoss(
                model,
                task.loss,
                (sampler, averaged),
                gates,
                steps=self.steps,
                warmup=self.warmup if weights else 0.0,  # weights that do not move need none
                dropped_values=self.dropped_values,
                confident=self.confident,
            )
            groups = [
                {"params": [*sampler.parameters()], "lr": self.lr_gates or sampler.lr_gates, "weight_decay": 0.0},
                {"params": weights, "lr": rate, "weight_decay": self.weight_decay},
            ]
            optimization = Optimization(groups=groups, steps=self.steps, clip=self.clip, ema=ema)
            Fit(trainer, "search", objective, task.train, task.loss.prepare, optimization, run).run()
        if objective.num_steps == self.steps:  # else it stopped early, and is as sure as it was there
            averaged.anneal(1.0)
        evaluations += objective.num_steps * trainer.batch_size * sampler.masks_per_sample
        return Learned(averaged.cpu(), objective.num_steps, evaluations, kept)

    def _decision(self, sampler: BlockSampler, blocks: Sequence[str], record: Mapping[str, Any]) -> Decision:
        """The decision of a distribution over masks."""
        return Decision(
            blocks=tuple(blocks),
            kept=tuple(sampler.mode()),
            method=type(self).__name__,
            pattern=sampler.pattern,
            choices=tuple(map(tuple, sampler.choices())),
            confidences=tuple(sampler.confidence()),
            marginals=tuple(sampler.marginals().tolist()),
            provenance=record,
        )
