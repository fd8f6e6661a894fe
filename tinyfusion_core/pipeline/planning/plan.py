"""Plans a run or a comparison on the meta device, without weights, data or a GPU."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from ...comparison.study import Comparison
from ...errors import MissingFileError, UserError, about_a_recipe
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
from ...selection.search import Search
from ...training.recover import Recover
from ...training.starts.fresh import check_fresh
from ...training.teacher_cache.samples import read_metadata
from ..recipe import Recipe
from .amounts import gigabytes
from .cached_teacher import cache_text, check_kept
from .depths import depths_text
from .memory import Needs, Setup, search_needs, training_needs
from .wording import budget_text, num_rows, size_text, training_text


@dataclass(frozen=True)
class Hardware:
    """The devices that a run is planned for.

    Attributes:
        devices: number of devices.
        memory: bytes of each; None: unknown.
    """

    devices: int = 1
    memory: float | None = None


@dataclass
class Plan:
    """The plan of a run or a comparison.

    Attributes:
        hardware: the devices it is made for; None: memory is not planned.
        rows: what would happen, as (what, value).
        problems: reasons why it cannot run.
        missing: files that it will need and that do not exist.
    """

    hardware: Hardware | None = None
    rows: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


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
    return _make(Plan(hardware), recipe, [*parts, *(partial(_comparison, s) for s in stages)])


@about_a_recipe()
def make_comparison_plan(recipe: Recipe, stage: Comparison) -> Plan:
    """Plan a comparison; problems are collected, not raised."""
    return _make(Plan(), recipe, [_network, _checkpoint, _data, _metrics, partial(_comparison, stage)])


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


def _network(plan: Plan, recipe: Recipe) -> None:
    model = recipe.on_meta
    blocks = recipe.backbone.unit_paths(model)
    what = word_for(blocks)
    if len(blocks) < 2:
        raise UserError(f"{owner(recipe.backbone)}: the network has {len(blocks)} {what}; of 2 or more some can go")
    counts = ", ".join(f"{depth} {what} in '{name}'" for name, depth in list_lengths(blocks).items())
    plan.rows.append(("network", f"{type(recipe.backbone).__name__}, {counts}"))
    check_loss_fits(recipe.backbone, recipe.loss, model)
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
                if selector is not None and stage.settings.depths:
                    told = depths_text(stage.settings.depths, selector, recipe.backbone.unit_paths(model))
                    plan.rows.append((f"{_prefix(stage)}depths", told))
                _train(plan, recipe, stage, model, teacher, decision)
        except UserError as e:
            raise type(e)(f"rounds.{stage.round}: {e}" if stage.round else str(e)) from e
    if recipe.recover is not None and recipe.search is None:
        plan.problems.append(
            "recover: there is no search before it, so nothing is pruned; add one, or set recover: null"
        )


def _search(plan: Plan, recipe: Recipe, stage: Stage, model: nn.Module) -> tuple[Decision, nn.Module]:
    """Plan a search. Returns a possible decision, and the network pruned by it."""
    prefix, blocks = _prefix(stage), recipe.backbone.unit_paths(model)
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
        _memory(plan, recipe, f"{prefix}search", search, needs)
    pruned = copy.deepcopy(model)
    remove_blocks(recipe.backbone, pruned, [blocks[i] for i in decision.removed])
    given = _given(decision) if len(list_lengths(blocks)) > 1 else ""  # lists whose blocks are not alike
    plan.rows.append((f"{prefix}after pruning", size_text(recipe, pruned) + given))
    if clients := recipe.backbone.clients(model, pruned, decision.kept):
        stay = f"if {word_for(blocks)} {', '.join(map(str, decision.kept))} stay: "
        plan.rows.append((f"{prefix}other tools", stay + describe_clients(clients)))
    whole, _ = in_blocks(recipe.backbone, model, decision)
    _choosing(plan, recipe, stage, selector, pruned, teacher=model, decision=whole)
    return whole, pruned


def _choosing(plan: Plan, recipe: Recipe, stage: Stage, selector: Selector, pruned: nn.Module, **of: Any) -> None:
    """Plan the short recoveries of a selector, and what all of its trainings come to; `of` says how it was pruned."""
    prefix, blocks, trainings = _prefix(stage), recipe.backbone.unit_paths(recipe.on_meta), selector.trainings()
    for short in (part for part in trainings if isinstance(part, Recover)):
        what = f"{prefix}short recoveries"
        plan.rows.append((what, training_text(recipe, short, **of)))
        _memory(plan, recipe, what, short, partial(training_needs, recipe.backbone, recipe.loss, pruned, short, **of))
    if len(trainings) > 1:
        rows = sum(num_rows(recipe, blocks, part) for part in trainings)
        recovery = recipe.each_round()[stage.round].recover
        beside = f"; the recovery {num_rows(recipe, blocks, recovery):,}" if recovery else ""
        plan.rows.append((f"{prefix}choosing", f"{rows:,} rows through the pruned network{beside}"))


def _train(
    plan: Plan, recipe: Recipe, stage: Stage, model: nn.Module, teacher: nn.Module | None, decision: Decision | None
) -> None:
    """Plan the training of a pruned network, or, without a teacher, of a fresh one."""
    prefix, how = _prefix(stage), stage.settings
    plan.rows.append((f"{prefix}{stage.name}", training_text(recipe, how, teacher, decision)))
    if how.kd is not None and decision is not None and (taps := how.kd.taps_for(decision)):
        table = ", ".join(f"{student} ↔ {teacher}" for student, teacher in taps)
        plan.rows.append((f"{prefix}taps", f"student ↔ teacher: {table}{_given(decision)}"))
    if decision is None:
        check_fresh(how)
    elif how.kd is not None and how.kd.cache is not None:
        plan.rows.append((f"{prefix}teacher cache", cache_text(recipe, stage, how.kd, decision)))
    with how.moving(model, recipe.backbone.block_paths(model), stage.key):
        pass
    needs = partial(training_needs, recipe.backbone, recipe.loss, model, how, teacher=teacher, decision=decision)
    _memory(plan, recipe, f"{prefix}{stage.name}", how, needs)


def _prefix(stage: Stage) -> str:
    """The beginning of its rows."""
    return f"{stage.round}: " if stage.round else ""


def _given(decision: Decision) -> str:
    """The condition of a row that depends on the kept blocks; empty with groups, which fix the number per list."""
    return "" if decision.choices else f", if {word_for(decision.blocks)} {', '.join(map(str, decision.kept))} stay"


def _memory(plan: Plan, recipe: Recipe, name: str, stage: Search | Recover, needs: Callable[[Setup], Needs]) -> None:
    """Plan the memory of a stage on every device."""
    if (hardware := plan.hardware) is None:
        return
    setup = Setup.of(recipe.trainer.with_batch_size(stage.batch_size), hardware.devices)
    found = needs(setup)
    plan.rows.append((f"{name}: memory", found.describe(setup)))
    total = found.total(setup.checkpointing)
    if hardware.memory is not None and total > hardware.memory:
        plan.problems.append(
            f"{name}: needs {gigabytes(total)} on every device, which has {gigabytes(hardware.memory)}; more devices "
            "with trainer.sharding: fsdp, a smaller trainer.micro_batch_size or activation_checkpointing help"
        )


def _comparison(stage: Comparison, plan: Plan, recipe: Recipe) -> None:
    if recipe.rounds:
        raise UserError(
            f"{stage.view}: takes one search and one recovery; write a recipe of the round you want to compare in"
        )
    if recipe.recover is None:
        raise UserError(f"{stage.view}: needs recover, to train what was pruned")
    if recipe.train is not None:
        raise UserError(
            f"{stage.view}: needs a trained network; `tinyfusion run` with this recipe trains one. Then go on from it: "
            "--train null --backbone.checkpoint RUN_DIR/teacher"
        )
    model = recipe.on_meta
    blocks = recipe.backbone.unit_paths(model)
    task = Task.without_data(recipe.backbone, recipe.loss, model)
    costs = measure(stage.cost_budgets(recipe.search), task, recipe.trainer)
    found = stage.candidates_for(recipe.search, blocks, costs)
    if (kd := recipe.recover.kd) is not None and kd.cache is not None:
        for selector in found.selectors.values():
            check_kept(recipe, kd, in_blocks(recipe.backbone, model, selector.bound(costs).preview(blocks))[0])
        read_metadata(Path(kd.cache.folder))
    plan.rows.append((stage.view, f"{len(found.selectors)} candidates that keep {found.said}, {stage.seeds} seeds"))


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


def _data(plan: Plan, recipe: Recipe) -> None:
    train, held_out, kind = recipe.data.train(), recipe.data.held_out(), type(recipe.data).__name__
    plan.rows.append(("data", f"{kind}, {len(train):,} to train on, {len(held_out):,} held out"))
    columns = columns_of(recipe.backbone, recipe.on_meta, recipe.data.conditions)
    checked(train, columns, "training").__getitems__([0])
    if recipe.train is None:  # what a checkpoint was trained on; a fresh network learns from what there is
        columns.check_deviations(train, recipe.data.deviations)
    for samples in (train, held_out):
        columns.check_extremes(samples)


def _metrics(plan: Plan, recipe: Recipe) -> None:
    for metric in recipe.evaluate:
        _collect(plan, partial(metric.check, recipe.data))
