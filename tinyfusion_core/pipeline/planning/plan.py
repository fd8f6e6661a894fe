"""Plans a run or a comparison on the meta device, without weights, data or a GPU."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from ...comparison.study import Comparison
from ...dataloading.set_apart import num_set_apart
from ...errors import MissingFileError, UserError, about_a_recipe
from ...evaluation.metrics import Metric
from ...protocols.backbone import owner
from ...protocols.blocks.paths import list_lengths, word_for
from ...protocols.columns import checked, columns_of
from ...protocols.task import Task, check_loss_fits
from ...pruning.decision import Decision
from ...pruning.interop_formats import describe_clients
from ...pruning.removal import in_blocks, remove_blocks
from ...pruning.weight_update import of_stage
from ...runtime.stages import EVALUATE, SEARCH, Stage
from ...runtime.trackers import check_trackers
from ...samplers.demands import Spending
from ...selection.base import Selector, within
from ...selection.budget import measure
from ...training.recover import Recover
from ..recipe import Recipe
from .comparisons import plan_comparison
from .memory import search_needs, training_needs
from .of_search import from_search
from .training import Hardware, Plan, given, plan_memory, plan_training, prefix_of
from .wording import budget_text, num_rows, size_text, training_text

Part = Callable[[Plan, Recipe], None]


@about_a_recipe()
def make_plan(recipe: Recipe, comparisons: bool = False, hardware: Hardware | None = None) -> Plan:
    """Plan a run; problems are collected, not raised.

    Args:
        recipe: the recipe.
        comparisons: also plan `compare` and `audit`, if the recipe has sections for them.
        hardware: also plan how much memory every stage needs on it, which takes seconds.
    """
    stages = [stage for stage in (recipe.compare, recipe.audit) if stage is not None and comparisons]
    trackers: Part = lambda plan, recipe: check_trackers(recipe.trainer.trackers)  # noqa: E731
    parts: list[Part] = [_network, _stages, _checkpoint, _data, _metrics, trackers]
    return _make(Plan(hardware), recipe, [*parts, *(partial(plan_comparison, s) for s in stages)])


@about_a_recipe()
def make_comparison_plan(recipe: Recipe, stage: Comparison) -> Plan:
    """Plan a comparison; problems are collected, not raised."""
    return _make(Plan(), recipe, [_network, _checkpoint, _data, _metrics, partial(plan_comparison, stage)])


def _make(plan: Plan, recipe: Recipe, parts: Sequence[Part]) -> Plan:
    for part in parts:
        _collect(plan, partial(part, plan, recipe))
    return plan


def _collect(plan: Plan, part: Callable[[], None]) -> None:
    """Do a part of the planning; its error becomes a problem or a missing file of the plan."""
    try:
        part()
    except UserError as e:
        found = plan.missing if isinstance(e, MissingFileError) else plan.problems
        if str(e) not in found:  # of a network that cannot be built, more than one part says so
            found.append(str(e))
    except Exception:
        if not plan.problems:  # what a network that does not fit its loss does to later parts says nothing new
            raise


def _network(plan: Plan, recipe: Recipe) -> None:
    model = recipe.on_meta
    blocks = recipe.backbone.unit_paths(model)
    what = word_for(blocks)
    if len(blocks) < 2:
        raise UserError(f"{owner(recipe.backbone)}: the network has {len(blocks)} {what}; of 2 or more some can go")
    counts = ", ".join(f"{depth} {what} in '{name}'" for name, depth in list_lengths(blocks).items())
    plan.rows.append(("network", f"{type(recipe.backbone).__name__}, {counts}"))
    check_loss_fits(recipe.backbone, recipe.loss, model)
    if said := recipe.loss.remark(model):
        plan.rows.append(("objective", f"{type(recipe.loss).__name__}: {said}"))
    plan.rows.append(("before pruning", size_text(recipe, model)))


def _stages(plan: Plan, recipe: Recipe) -> None:
    teacher: nn.Module | None = None
    decision: Decision | None = None
    selector: Selector | None = None
    model = recipe.on_meta
    for stage in recipe.stages():
        try:
            if stage.name == SEARCH:
                teacher, selector, (decision, model) = model, stage.settings, _search(plan, recipe, stage, model)
            elif stage.name != EVALUATE and stage.settings is not None:
                if selector is not None:
                    taken = from_search(stage.settings, selector, recipe.backbone.unit_paths(model))
                    plan.rows += [(f"{prefix_of(stage)}{what}", said) for what, said in taken]
                plan_training(plan, recipe, stage, model, teacher, decision, prefix_of(stage))
        except UserError as e:
            raise type(e)(f"rounds.{stage.round}: {e}" if stage.round else str(e)) from e
    if recipe.recover is not None and recipe.search is None:
        plan.problems.append(
            "recover: there is no search before it, so nothing is pruned; add one, or set recover: null"
        )


def _search(plan: Plan, recipe: Recipe, stage: Stage, model: nn.Module) -> tuple[Decision, nn.Module]:
    """Plan a search. Returns a possible decision, and the network pruned by it."""
    prefix, blocks = prefix_of(stage), recipe.backbone.unit_paths(model)
    what = word_for(blocks)
    budgets = stage.settings.cost_budgets()
    costs = measure(budgets, Task.without_data(recipe.backbone, recipe.loss, model), recipe.trainer)
    for said in dict.fromkeys(budget.describe(costs[budget.name]) for budget in budgets):
        plan.rows.append((f"{prefix}budget", said))
    limits = recipe.backbone.limits(model)
    plan.rows += [(f"{prefix}limits", f"{name} {list(v)}, or nothing could save it") for name, v in limits.items()]
    selector: Selector = within(stage.settings.bound(costs), limits)
    decision, keeps = selector.preview(blocks), selector.keeps(blocks)
    how_many = f"{len(decision.kept)} of {len(blocks)} {what}"
    if isinstance(keeps, Spending):
        how_many = f"as many of {len(blocks)} {what} as the budget pays for"
    elif keeps is None:
        how_many = f"as few of {len(blocks)} {what} as it finds to be enough; planned for {len(decision.kept)}"
    plan.rows.append((f"{prefix}keeps", how_many))
    if (search := selector.learned()) is not None:
        sampler = search.make_sampler(list_lengths(blocks))
        masks = f"{sampler.num_masks:,} possible masks"
        if groups := sampler.choices():
            ranges = ", ".join(f"{g[0]}-{g[-1]}" for g in groups)
            plan.rows.append((f"{prefix}groups", f"{len(groups)} ({what} {ranges}), {masks}"))
        else:
            plan.rows.append((f"{prefix}masks", f"any within the budget, {masks}"))
        copies = f" under {sampler.masks_per_sample} masks each" if sampler.masks_per_sample > 1 else ""
        how = f"{budget_text(recipe, search)}{copies}, weight update {type(search.update).__name__}"
        plan.rows.append((f"{prefix}search", how))
        with of_stage(search.update.applied(copy.deepcopy(model), recipe.backbone.block_paths(model)), "search"):
            pass  # layers that it cannot adapt, or a missing package, are known before a teacher is trained
        needs = partial(search_needs, recipe.backbone, recipe.loss, model, search)
        plan_memory(plan, recipe, f"{prefix}search", search, needs)
    pruned = copy.deepcopy(model)
    remove_blocks(recipe.backbone, pruned, [blocks[i] for i in decision.removed])
    spread = given(decision) if len(list_lengths(blocks)) > 1 else ""  # lists whose blocks are not alike
    plan.rows.append((f"{prefix}after pruning", size_text(recipe, pruned) + spread))
    if clients := recipe.backbone.clients(model, pruned, decision.kept):
        stay = f"if {word_for(blocks)} {', '.join(map(str, decision.kept))} stay: "
        plan.rows.append((f"{prefix}other tools", stay + describe_clients(clients)))
    whole, _ = in_blocks(recipe.backbone, model, decision)
    _choosing(plan, recipe, stage, selector, pruned, teacher=model, decision=whole)
    return whole, pruned


def _choosing(plan: Plan, recipe: Recipe, stage: Stage, selector: Selector, pruned: nn.Module, **of: Any) -> None:
    """Plan the short recoveries of a selector, and what all of its trainings come to; `of` says how it was pruned."""
    prefix, blocks = prefix_of(stage), recipe.backbone.unit_paths(recipe.on_meta)
    trainings = selector.trainings(recipe.trainer, plan.hardware.devices if plan.hardware else 1)
    _ask(plan, recipe, selector.metrics())
    for short in (part for part in trainings if isinstance(part, Recover)):
        what = f"{prefix}short recoveries"
        plan.rows.append((what, training_text(recipe, short, **of)))
        needs = partial(training_needs, recipe.backbone, recipe.loss, pruned, short, **of)
        plan_memory(plan, recipe, what, short, needs)
    if len(trainings) > 1:
        rows = sum(num_rows(recipe, blocks, part) for part in trainings)
        recovery = recipe.each_round()[stage.round].recover
        beside = f"; the recovery {num_rows(recipe, blocks, recovery):,}" if recovery else ""
        plan.rows.append((f"{prefix}choosing", f"{rows:,} rows through the pruned network{beside}"))


def _checkpoint(plan: Plan, recipe: Recipe) -> None:
    source = recipe.backbone.source()
    if (recipe.train is None) == ("checkpoint" not in source):
        raise UserError(
            "backbone: names no checkpoint, and the recipe has no train stage to make one"
            if recipe.train is None
            else "train: begins with random weights, backbone.checkpoint would not be used; leave one of the two out"
        )
    if recipe.train is None:
        licence = source.get("licence", "unknown")
        hint = "; set backbone.licence for the model card" if licence == "unknown" else ""
        weights = f"; weights: {source['weights']}" if "weights" in source else ""
        plan.rows.append(("checkpoint", f"{source['checkpoint']} (licence: {licence}{hint}{weights})"))
        recipe.backbone.check_weights()


def _data(plan: Plan, recipe: Recipe) -> None:
    recipe.data.check_fits(recipe.backbone, recipe.loss)
    train, held_out, kind = recipe.data.train(), recipe.data.held_out(), type(recipe.data).__name__
    plan.rows.append(("data", f"{kind}, {len(train):,} to train on, {len(held_out):,} held out"))
    for stage in recipe.stages():
        judging = stage.settings.validation if isinstance(stage.settings, Recover) else None
        if judging is not None and (num := num_set_apart(train, judging.samples)) < judging.samples:
            key = f"{stage.name}.validation.samples"
            said = f"{num:,} samples, half of those to train on; {key} asks for more"
            plan.rows.append((f"{prefix_of(stage)}{stage.name}: judged on", said))
    columns = columns_of(recipe.backbone, recipe.on_meta, recipe.data.conditions)
    checked(train, columns, "training").__getitems__([0])
    if recipe.train is None:  # what a checkpoint was trained on; a fresh network learns from what there is
        columns.check_deviations(train, recipe.data.deviations)
    for samples in (train, held_out):
        columns.check_extremes(samples)


def _metrics(plan: Plan, recipe: Recipe) -> None:
    _collect(plan, partial(recipe.loss.check_sampling, recipe.backbone))
    _ask(plan, recipe, recipe.evaluate)


def _ask(plan: Plan, recipe: Recipe, metrics: Sequence[Metric]) -> None:
    """Ask metrics whether they can measure."""
    task = replace(Task.without_data(recipe.backbone, recipe.loss, recipe.on_meta), data=recipe.data)
    for metric in metrics:
        _collect(plan, partial(metric.check, recipe.data))
        _collect(plan, partial(metric.check_task, task))
