"""Plans a training: what it does, what it learns from, and the memory it needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from torch import nn

from ...protocols.blocks.paths import word_for
from ...pruning.decision import Decision
from ...runtime.stages import Stage
from ...selection.search import Search
from ...training.distilling.quantised import num_bytes, quantised
from ...training.recover import Recover
from ...training.starts.fresh import check_fresh
from ..recipe import Recipe
from .amounts import gigabytes
from .cached_teacher import cache_text
from .memory import Needs, Setup, training_needs
from .wording import training_text


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


def plan_training(
    plan: Plan,
    recipe: Recipe,
    stage: Stage,
    model: nn.Module,
    teacher: nn.Module | None,
    decision: Decision | None,
    prefix: str,
) -> None:
    """Plan the training of a pruned network, or, without a teacher, of a fresh one.

    Args:
        plan: gets the rows.
        recipe: the recipe.
        stage: the training.
        model: the network, on the meta device.
        teacher: what it was pruned from, on the meta device.
        decision: how it may be made, in whole blocks.
        prefix: the beginning of the rows' names.

    Raises:
        UserError: something does not go with something else.
    """
    how = stage.settings
    if how.kd is not None:
        how.kd.check_makes(recipe.loss)
    plan.rows.append((f"{prefix}{stage.name}", training_text(recipe, how, teacher, decision)))
    if how.kd is not None and decision is not None and (taps := how.kd.taps_for(decision)):
        table = ", ".join(f"{student} ↔ {teacher}" for student, teacher in taps)
        plan.rows.append((f"{prefix}taps", f"student ↔ teacher: {table}{given(decision)}"))
    if decision is None:
        check_fresh(how)
    elif how.kd is not None and how.kd.cache is not None:
        plan.rows.append((f"{prefix}teacher cache", cache_text(recipe, stage, how.kd, decision)))
    elif how.kd is not None and how.kd.quantise is not None and teacher is not None:
        whole, copy = (num_bytes(m.parameters()) for m in (teacher, quantised(teacher, how.kd.quantise)))
        plan.rows.append((f"{prefix}teacher", f"a quantised copy, {gigabytes(copy)} in place of {gigabytes(whole)}"))
    with how.moving(model, recipe.backbone.block_paths(model), stage.key):
        pass
    needs = partial(training_needs, recipe.backbone, recipe.loss, model, how, teacher=teacher, decision=decision)
    plan_memory(plan, recipe, f"{prefix}{stage.name}", how, needs)


def plan_memory(
    plan: Plan, recipe: Recipe, name: str, stage: Search | Recover, needs: Callable[[Setup], Needs]
) -> None:
    """Plan the memory of a stage on every device, if those are known.

    Args:
        plan: gets a row, and a problem if there is too little.
        recipe: the recipe.
        name: name of the row.
        stage: the training.
        needs: estimates what it needs.
    """
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


def prefix_of(stage: Stage) -> str:
    """The beginning of its rows."""
    return f"{stage.round}: " if stage.round else ""


def given(decision: Decision) -> str:
    """The condition of a row that depends on the kept blocks; empty with groups, which fix the number per list."""
    return "" if decision.choices else f", if {word_for(decision.blocks)} {', '.join(map(str, decision.kept))} stay"
