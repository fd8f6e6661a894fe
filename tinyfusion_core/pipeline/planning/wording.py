"""What a plan says of networks and trainings."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ...evaluation.metrics import count_flops
from ...protocols.backbone import config_of
from ...protocols.blocks.paths import list_lengths
from ...protocols.task import Task
from ...pruning.decision import Decision
from ...selection.search import Search
from ...training.recover import Recover
from ...training.steps.optimizers import NamedOptimizer
from ...training.validation import Validation
from ..recipe import Recipe


def training_text(recipe: Recipe, stage: Recover, teacher: nn.Module | None, decision: Decision | None) -> str:
    """Return the start, steps, samples, schedule, distillation and what moves.

    Args:
        recipe: the recipe.
        stage: the training.
        teacher: the network that was pruned, on the meta device; None for a fresh one.
        decision: a possible one, in whole blocks.

    Raises:
        UserError: the network cannot be started as the training says.
    """
    start = ""
    if stage.start is not None and teacher is not None and decision is not None:
        start, _ = stage.start.planned(Task.without_data(recipe.backbone, recipe.loss, teacher), decision)
    if stage.steps == 0:
        return f"{start}, and no training"
    kd = "" if stage.kd is None else f", {type(stage.kd).__name__}"
    kd += f" on samples of its own in {stage.on_policy:.0%} of the steps" if stage.on_policy else ""
    kd += "" if stage.update is None else f", moves {type(stage.update).__name__}"
    kd += "" if stage.optimizer is None else f", by {NamedOptimizer(stage.optimizer).cls.__name__}"
    judged = "" if stage.validation is None else f", {_judged(stage.validation)}"
    over = "" if stage.horizon is None else f" over {stage.horizon:,} steps"
    begin = f"{start}, then " if start else ""
    return f"{begin}{budget_text(recipe, stage)}, {stage.schedule} schedule from {stage.lr:g}{over}{kd}{judged}"


def _judged(how: Validation) -> str:
    patience = "" if how.patience is None else f", until {how.patience:,} in a row are no better"
    until = "" if how.until is None else f", until the loss is {how.until}"
    return f"judged every {how.every:,} steps on {how.samples:,} training samples set apart{patience}{until}"


def size_text(recipe: Recipe, model: nn.Module) -> str:
    """Return parameters and FLOPs of a network on the meta device."""
    parameters = sum(p.numel() for p in model.parameters())
    flops = count_flops(recipe.backbone, recipe.loss, config_of(recipe.backbone, model))
    cost = f"{flops / 1e9:,.3f} GFLOP a sample" if isinstance(flops, int) else f"FLOPs {flops}"
    return f"{parameters:,} parameters, {cost}"


def budget_text(recipe: Recipe, stage: Search | Recover) -> str:
    """Return steps and samples of a training."""
    size = stage.batch_size or recipe.trainer.batch_size
    return f"{stage.steps:,} steps of {size}, {stage.steps * size:,} samples"


def num_rows(recipe: Recipe, blocks: Sequence[str], stage: Search | Recover) -> int:
    """Return how many samples a training runs through the network, each as often as it gets masks."""
    masks = stage.make_sampler(list_lengths(blocks)).masks_per_sample if isinstance(stage, Search) else 1
    return stage.steps * (stage.batch_size or recipe.trainer.batch_size) * masks
