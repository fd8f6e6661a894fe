"""What a run would do, worked out on the meta device: no weights, no data, no GPU minute."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from .backbone import block_lists, expand
from .decision import Decision
from .errors import UserError
from .evaluation import count_flops
from .pruning import remove_blocks
from .recipe import Recipe
from .recover import Recover
from .sampling import BlockSampler
from .search import Search


@dataclass
class Plan:
    """The plan of a run.

    Attributes:
        rows: what would happen, as (what, value).
        problems: what makes the run impossible.
        missing: files that the run will need and that are not there.
    """

    rows: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def attempt(self, work: Callable[[], None], failures: list[str]) -> None:
        try:
            work()
        except UserError as e:
            failures.append(str(e))


def make_plan(recipe: Recipe) -> Plan:
    """Plan a run; problems are collected, not raised."""
    plan = Plan()

    def network() -> None:
        config = recipe.backbone.config()
        with torch.device("meta"):
            model = recipe.backbone.construct(config)
        blocks = expand(model, recipe.backbone.blocks(model))
        lists = {name: len(members) for name, members in block_lists(blocks).items()}
        plan.rows.append(("network", f"{type(recipe.backbone).__name__}, {_counts(lists)}"))
        _size(plan, recipe, model, "before")
        if recipe.search is not None:
            sampler = recipe.search.preview(lists)
            _search(plan, recipe, sampler)
            pruned = copy.deepcopy(model)
            # Which blocks stay is not known yet; how many of each list is.
            sketch = Decision(blocks=tuple(blocks), kept=tuple(sampler.mode()), method="plan")
            remove_blocks(recipe.backbone, pruned, sketch.kept_by_list())
            _size(plan, recipe, pruned, "after")

    plan.attempt(network, plan.problems)
    for name, stage in (("train", recipe.train), ("recover", recipe.recover)):
        if stage is not None:
            plan.rows.append((name, _training(recipe, stage)))
    if recipe.recover is not None and recipe.search is None:
        plan.problems.append("recover: there is no search (or decision) before it, so nothing is pruned")
    if recipe.train is None:
        plan.attempt(lambda: _checkpoint(plan, recipe), plan.missing)

    def data() -> None:
        train, held_out = recipe.data.train(), recipe.data.held_out()
        plan.rows.append(
            ("data", f"{type(recipe.data).__name__}, {len(train):,} to train on, {len(held_out):,} held out")
        )

    plan.attempt(data, plan.missing)
    return plan


def _checkpoint(plan: Plan, recipe: Recipe) -> None:
    checkpoint = recipe.backbone.source().get("checkpoint")
    if checkpoint is None:
        raise UserError("backbone: names no checkpoint, and the recipe has no train stage to make one")
    plan.rows.append(("checkpoint", str(checkpoint)))


def _size(plan: Plan, recipe: Recipe, model: nn.Module, when: str) -> None:
    parameters = sum(p.numel() for p in model.parameters())
    flops = count_flops(recipe.backbone, recipe.loss, recipe.backbone.config(model))
    cost = f"{flops / 1e9:,.3f} GFLOP a sample" if isinstance(flops, int) else f"FLOPs {flops}"
    plan.rows.append((f"{when} pruning", f"{parameters:,} parameters, {cost}"))


def _search(plan: Plan, recipe: Recipe, sampler: BlockSampler) -> None:
    plan.rows.append(("keeps", f"{sampler.num_kept} of {sampler.num_blocks} blocks"))
    groups = sampler.choices()
    sizes = ", ".join(f"{g[0]}-{g[-1]}" if len(g) > 1 else str(g[0]) for g in groups)
    plan.rows.append(("groups", f"{len(groups)} (blocks {sizes}), {sampler.num_masks:,} possible masks"))
    if isinstance(recipe.search, Search):
        size = recipe.search.batch_size or recipe.trainer.batch_size
        update = type(recipe.search.update).__name__
        samples = f"{recipe.search.steps * size:,} samples"
        plan.rows.append(("search", f"{recipe.search.steps:,} steps of {size}, {samples}, weight update {update}"))


def _training(recipe: Recipe, stage: Recover) -> str:
    size = stage.batch_size or recipe.trainer.batch_size
    samples = f"{stage.steps * size:,} samples"
    return f"{stage.steps:,} steps of {size}, {samples}, {stage.schedule} schedule from {stage.lr:g}"


def _counts(lists: dict[str, int]) -> str:
    return ", ".join(f"{depth} blocks in '{name}'" for name, depth in lists.items())
