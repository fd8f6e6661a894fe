"""What a run or a comparison would do, worked out on the meta device: it needs no weights, no data and no GPU."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..comparison.study import Comparison
from ..errors import MissingFileError, UserError
from ..evaluation.metrics import count_flops
from ..protocols.backbone import list_lengths, owner
from ..protocols.block_call import watched_streams
from ..pruning.prune import remove_blocks
from ..runtime.seeding import Rng
from ..runtime.trackers import check_trackers
from ..samplers.constraints import spoken
from ..selection.search import Search
from ..training.recover import Recover
from .memory import Needs, Setup, gigabytes, search_needs, training_needs
from .recipe import Recipe
from .schema import Round


@dataclass
class Plan:
    """The plan of a run, or of a comparison.

    Attributes:
        rows: what would happen, as (what, value).
        problems: what makes it impossible.
        missing: files that it will need and that are not there.
    """

    rows: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


Part = Callable[[Plan, Recipe], None]


@dataclass(frozen=True)
class Hardware:
    """What a run is planned for.

    Attributes:
        devices: how many.
        memory: bytes of each; None: not known.
    """

    devices: int = 1
    memory: float | None = None


def make_plan(recipe: Recipe, comparisons: bool = False, hardware: Hardware | None = None) -> Plan:
    """Plan a run; problems are collected, not raised.

    Args:
        recipe: what to do.
        comparisons: plan too what `compare` and `audit` would do, if the recipe has sections for them.
        hardware: plan too how much memory every stage needs on it, which takes seconds.
    """
    stages = [stage for stage in (recipe.compare, recipe.audit) if stage is not None and comparisons]
    parts: list[Part] = [_network, partial(_stages, hardware), _checkpoint, _data, _metrics, _trackers]
    return _make(recipe, [*parts, *(partial(_comparison, s) for s in stages)])


def make_comparison_plan(recipe: Recipe, stage: Comparison) -> Plan:
    """Plan a comparison in the same way."""
    return _make(recipe, [_network, _checkpoint, _data, _metrics, partial(_comparison, stage)])


def _make(recipe: Recipe, parts: Sequence[Part]) -> Plan:
    plan = Plan()
    for part in parts:
        _collect(plan, partial(part, plan, recipe))
    return plan


def _collect(plan: Plan, part: Callable[[], None]) -> None:
    """Do a part of the planning; what it raises becomes a finding."""
    try:
        part()
    except UserError as e:
        found = plan.missing if isinstance(e, MissingFileError) else plan.problems
        if str(e) not in found:  # of a network that cannot be built, more than one part says so
            found.append(str(e))


def _network(plan: Plan, recipe: Recipe) -> None:
    model, blocks = _on_meta(recipe)
    counts = ", ".join(f"{depth} blocks in '{name}'" for name, depth in list_lengths(blocks).items())
    plan.rows.append(("network", f"{type(recipe.backbone).__name__}, {counts}"))
    _fit_together(recipe, model)
    plan.rows.append(("before pruning", _size(recipe, model)))


def _stages(hardware: Hardware | None, plan: Plan, recipe: Recipe) -> None:
    model, _ = _on_meta(recipe)
    if recipe.train is not None:
        plan.rows.append(("train", _training(recipe, recipe.train)))
        needs = partial(training_needs, recipe.backbone, recipe.loss, model, recipe.train)
        _memory(plan, recipe, hardware, "train", recipe.train, needs)
    if recipe.train is not None and recipe.train.kd is not None:
        plan.problems.append("train.kd: a fresh network has no teacher to learn from; distillation goes with recover")
    if recipe.recover is not None and recipe.search is None:
        plan.problems.append(
            "recover: there is no search before it, so nothing is pruned; add one, or set recover: null"
        )
    for name, step in recipe.each_round().items():
        try:
            model = _round(plan, recipe, hardware, f"{name}: " if name else "", step, model)
        except UserError as e:
            raise UserError(f"rounds.{name}: {e}" if name else str(e)) from e


def _round(
    plan: Plan, recipe: Recipe, hardware: Hardware | None, prefix: str, step: Round, model: nn.Module
) -> nn.Module:
    """Plan one search and recovery; returns the pruned network."""
    blocks = recipe.backbone.block_paths(model)
    decision = step.search.preview(blocks)
    # Groups say how many blocks of which list stay, whichever they are.
    given = "" if decision.choices else f", if blocks {', '.join(map(str, decision.kept))} stay"
    plan.rows.append((f"{prefix}keeps", f"{len(decision.kept)} of {len(blocks)} blocks"))
    if (search := step.search.learned()) is not None:
        sampler = search.make_sampler(list_lengths(blocks))
        if sampler.budget is None and not sampler.choices():
            plan.rows[-1] = (f"{prefix}keeps", f"as many of {len(blocks)} blocks as the budget pays for")
        masks = f"{sampler.num_masks:,} possible masks"
        if groups := sampler.choices():
            ranges = ", ".join(f"{g[0]}-{g[-1]}" for g in groups)
            plan.rows.append((f"{prefix}groups", f"{len(groups)} (blocks {ranges}), {masks}"))
        else:
            plan.rows.append((f"{prefix}masks", f"any within the budget, {masks}"))
        copies = f" under {sampler.masks_per_sample} masks each" if sampler.masks_per_sample > 1 else ""
        update = type(search.update).__name__
        plan.rows.append((f"{prefix}search", f"{_budget(recipe, search)}{copies}, weight update {update}"))
        needed = partial(search_needs, recipe.backbone, recipe.loss, model, search)
        _memory(plan, recipe, hardware, f"{prefix}search", search, needed)
    pruned = copy.deepcopy(model)
    remove_blocks(recipe.backbone, pruned, [blocks[i] for i in decision.removed])
    several = len(list_lengths(blocks)) > 1  # whose blocks are not alike
    plan.rows.append((f"{prefix}after pruning", _size(recipe, pruned) + given * several))
    if step.recover is not None:
        plan.rows.append((f"{prefix}recover", _training(recipe, step.recover)))
        if step.recover.kd is not None and (taps := step.recover.kd.taps_for(decision)):
            table = ", ".join(f"{student} ↔ {teacher}" for student, teacher in taps)
            plan.rows.append((f"{prefix}taps", f"student ↔ teacher: {table}{given}"))
        needs = partial(
            training_needs, recipe.backbone, recipe.loss, pruned, step.recover, teacher=model, decision=decision
        )
        _memory(plan, recipe, hardware, f"{prefix}recover", step.recover, needs)
    return pruned


def _memory(
    plan: Plan,
    recipe: Recipe,
    hardware: Hardware | None,
    name: str,
    stage: Search | Recover,
    needs: Callable[[Setup], Needs],
) -> None:
    """Plan what a stage needs of every device's memory."""
    if hardware is None:
        return
    trainer = recipe.trainer.with_batch_size(stage.batch_size)
    trainer.split(hardware.devices)  # raises when it cannot be
    setup = Setup(
        batch_size=trainer.batch_size,
        devices=hardware.devices,
        sharding=trainer.sharding,
        micro_batch_size=trainer.micro_batch_size,
        checkpointing=trainer.activation_checkpointing,
        precision=trainer.precision,
    )
    found = needs(setup)
    plan.rows.append((f"{name}: memory", found.describe(setup)))
    total = found.total(setup.checkpointing)
    if hardware.memory is not None and total > hardware.memory:
        plan.problems.append(
            f"{name}: needs {gigabytes(total)} on every device, which has {gigabytes(hardware.memory)}; take more "
            "devices with trainer.sharding: fsdp, a smaller trainer.micro_batch_size, or "
            "trainer.activation_checkpointing"
        )


def _comparison(stage: Comparison, plan: Plan, recipe: Recipe) -> None:
    if recipe.rounds:
        raise UserError(
            f"{stage.view}: takes one search and one recovery; write a recipe of the round you want to compare in"
        )
    if recipe.recover is None:
        raise UserError(f"{stage.view}: needs recover, to heal what was pruned")
    if recipe.train is not None:
        raise UserError(
            f"{stage.view}: needs a trained network; run the recipe's train stage first, give the checkpoint to the "
            "backbone and set train: null"
        )
    lineup = stage.lineup(recipe.search, _on_meta(recipe)[1])
    counts = f"{len(lineup.candidates)} candidates that keep {spoken(lineup.budget)} blocks, {stage.seeds} seeds"
    plan.rows.append((stage.view, counts))


def _on_meta(recipe: Recipe) -> tuple[nn.Module, list[str]]:
    """The network and the paths of its blocks."""
    with torch.device("meta"):
        model = recipe.backbone.construct(recipe.backbone.config())
    return model, recipe.backbone.block_paths(model)


def _training(recipe: Recipe, stage: Recover) -> str:
    kd = "" if stage.kd is None else f", {type(stage.kd).__name__}"
    return f"{_budget(recipe, stage)}, {stage.schedule} schedule from {stage.lr:g}{kd}"


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
        plan.rows.append(("checkpoint", f"{source['checkpoint']} (licence: {licence}{hint})"))


def _data(plan: Plan, recipe: Recipe) -> None:
    train, held_out = recipe.data.train(), recipe.data.held_out()
    counts = f"{len(train):,} to train on, {len(held_out):,} held out"
    plan.rows.append(("data", f"{type(recipe.data).__name__}, {counts}"))
    sample = train.__getitems__([0])
    for name, example in recipe.backbone.example(1).items():
        if name not in sample or sample[name].shape != example.shape:
            found = list(sample[name].shape[1:]) if name in sample else "missing"
            raise UserError(f"data: '{name}' of a sample is {found}, the network takes {list(example.shape[1:])}")


def _metrics(plan: Plan, recipe: Recipe) -> None:
    for metric in recipe.evaluate:
        _collect(plan, partial(metric.check, recipe.data))


def _trackers(plan: Plan, recipe: Recipe) -> None:
    check_trackers(recipe.trainer.trackers)


def _fit_together(recipe: Recipe, model: nn.Module) -> None:
    """Raise UserError when the loss cannot take what the network gives."""
    inputs = recipe.loss.prepare(recipe.backbone.example(2), Rng(0, "plan"))
    blocks = recipe.backbone.block_paths(model)
    try:
        with torch.no_grad():
            on_meta = {name: t.to("meta") for name, t in inputs.items()}
            with watched_streams(model, blocks, recipe.backbone.streams) as seen:
                prediction = recipe.loss.predict(model.eval(), on_meta)
            for passage in seen:
                if passage.before[0] != passage.after[0]:
                    raise UserError(f"{owner(recipe.backbone)}: blocks: {passage}")
            if all(isinstance(leaf, Tensor) for leaf in tree_leaves(prediction)):
                # The loss on zeros of the prediction's shape: the meta device cannot look values up in tables.
                prediction, on_meta = tree_map(lambda x: torch.zeros(x.shape), prediction), inputs
            recipe.loss.per_sample(recipe.loss.loss(prediction, on_meta), on_meta)
    except NotImplementedError:
        return  # an operation without a meta kernel: the run itself will tell
    except RuntimeError as e:
        raise UserError(
            f"loss: {type(recipe.loss).__name__} does not fit the network ({str(e).splitlines()[0]}); "
            "compare their options"
        ) from None


def _size(recipe: Recipe, model: nn.Module) -> str:
    parameters = sum(p.numel() for p in model.parameters())
    flops = count_flops(recipe.backbone, recipe.loss, recipe.backbone.config(model))
    cost = f"{flops / 1e9:,.3f} GFLOP a sample" if isinstance(flops, int) else f"FLOPs {flops}"
    return f"{parameters:,} parameters, {cost}"


def _budget(recipe: Recipe, stage: Search | Recover) -> str:
    size = stage.batch_size or recipe.trainer.batch_size
    return f"{stage.steps:,} steps of {size}, {stage.steps * size:,} samples"
