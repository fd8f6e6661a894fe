"""The interface of metrics; size and held-out loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from ..errors import UserError, first_line, require
from ..parsing.settings import Settings
from ..protocols.backbone import Backbone, config_of, constructed
from ..protocols.data import DataSource
from ..protocols.loss import LossAdapter
from ..protocols.task import Task
from ..protocols.undisturbed import evaluating
from ..reporting.page import Figures
from ..runtime.distributed import batches, local_share, map_sharded
from ..runtime.run_folder import RunFolder
from ..runtime.seeding import Rng
from ..training.trainer import Trainer

Models = Mapping[str, nn.Module]
"""The networks to compare by name; the first is the reference (the teacher)."""


@dataclass(frozen=True)
class Measurement:
    """One row of the results table.

    Attributes:
        name: what was measured.
        values: the value for each model; None if it is not available.
        unit: unit of the values.
        better: `lower` or `higher`; empty if neither.
        note: how it was measured, or why a value is not available.
    """

    name: str
    values: dict[str, float | None] = field(default_factory=dict)
    unit: str = ""
    better: str = ""
    note: str = ""


class Metric(Settings, ABC):
    """A measurement of several networks. Subclasses are frozen dataclasses; their fields are the recipe's options.

    Attributes:
        together: whether all processes call it and share the work (see `map_sharded`). By default the main process
            measures alone and the others wait.
        standing: whether every run measures it without being asked; it returns nothing where it does not apply.
        exhibits: names of the files that `resume` writes to its folder for people to look at; a run moves them to the
            run folder.
    """

    together = False
    standing = False
    exhibits: tuple[str, ...] = ()

    @property
    def column(self) -> str | None:
        """Column name in comparisons, which take only the first measurement; by default the name of the class.

        None leaves the metric out of comparisons, because it does not depend on how well a network has recovered.
        """
        return type(self).__name__

    @abstractmethod
    def __call__(self, task: Task, models: Models, trainer: Trainer) -> list[Measurement]:
        """Measure the networks, which are in eval mode on the trainer's device.

        Args:
            task: objective and data.
            models: the networks by name.
            trainer: device, precision and seed.
        """

    def resume(self, task: Task, models: Models, trainer: Trainer, folder: Path) -> list[Measurement]:
        """Measure, resuming what an interrupted measurement has left in a folder that all processes see.

        By default nothing is left there. Arguments as for a call.
        """
        return self(task, models, trainer)

    def check(self, data: DataSource) -> None:
        """Check that the data have what this metric needs.

        Raises:
            UserError: they do not.
        """

    def check_task(self, task: Task) -> None:
        """Check that network and objective can do what this metric asks, before anything is spent. By default nothing.

        Args:
            task: its network is on the meta device, and its samples are the backbone's example; `data` is the source.

        Raises:
            UserError: they cannot.
        """

    def show(self, folder: RunFolder) -> list[Figures]:
        """Return sections of the report, drawn from the exhibits in a run folder. By default none."""
        return []


_COUNTED: dict[str, int | str] = {}
"""FLOPs that were counted in this process: plans, searches and metrics ask for the same networks again."""


@dataclass(frozen=True)
class Size(Metric):
    """Number of blocks, parameters, and floating-point operations of one forward pass for one sample."""

    column = None

    @override
    def __call__(self, task: Task, models: Models, trainer: Trainer) -> list[Measurement]:
        blocks: dict[str, float | None] = {}
        parameters: dict[str, float | None] = {}
        flops: dict[str, float | None] = {}
        note = "one forward pass, one sample; counted by torch"
        for name, model in models.items():
            blocks[name] = len(task.backbone.unit_paths(model))
            parameters[name] = sum(p.numel() for p in model.parameters())
            try:
                count = count_flops(task.backbone, task.loss, config_of(task.backbone, model))
            except UserError:  # a network of which no config is known
                count = _count_here(task, model)
            flops[name] = count if isinstance(count, int) else None
            note = note if isinstance(count, int) else count
        return [
            Measurement("branches" if task.backbone.units else "blocks", blocks),
            Measurement("parameters", parameters, better="lower"),
            Measurement("FLOPs", flops, unit="FLOP", better="lower", note=note),
        ]


def count_flops(backbone: Backbone, loss: LossAdapter, config: Mapping[str, Any]) -> int | str:
    """Count the floating-point operations of one prediction for one sample, two for a multiply-add.

    Counted on the meta device, where no fused CPU kernel hides the cost of attention.

    Returns:
        The count, or the reason why it is not available.
    """
    inputs = loss.prepare(backbone.example(1), Rng(0, "flops"))
    shapes = {name: tuple(t.shape) for name, t in inputs.items()}
    key = repr((type(backbone), config, loss, shapes))  # all that the count depends on
    if key not in _COUNTED:
        _COUNTED[key] = _count_flops(backbone, loss, config, inputs)
    return _COUNTED[key]


def _count_flops(
    backbone: Backbone, loss: LossAdapter, config: Mapping[str, Any], inputs: Mapping[str, Tensor]
) -> int | str:
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton

    try:
        with torch.device("meta"):
            model = constructed(backbone, config).eval().requires_grad_(False)  # torch's counter stumbles over weights
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            loss.predict(model, {name: t.to("meta") for name, t in inputs.items()})
    except (NotImplementedError, RuntimeError) as e:
        return f"cannot be counted on the meta device: {first_line(e)}"
    return int(counter.get_total_flops())


def _count_here(task: Task, model: nn.Module) -> int | str:
    """Count as `count_flops` does, in a forward pass of the network as it is."""
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton

    device = next(model.parameters()).device
    inputs = task.loss.prepare(task.backbone.example(1), Rng(0, "flops"))
    # As many operations on fused kernels, which the counter does not know on a CPU.
    plain, counter = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False)
    try:
        with evaluating(model), torch.no_grad(), plain, counter:
            task.loss.predict(model, {name: t.to(device) for name, t in inputs.items()})
    except Exception as e:  # code of somebody else's, under a mode that it may not know
        return f"cannot be counted: {next(iter(str(e).splitlines()), type(e).__name__)}"
    return int(counter.get_total_flops())


@dataclass(frozen=True)
class HeldOutLoss(Metric):
    """The training loss on held-out data, with random draws that are the same for every model and every run.

    Args:
        draws: passes over the held-out data, each with its own time steps and noise; one where nothing is drawn.
        batch_size: samples per batch.
    """

    draws: int = 4
    batch_size: int = 256
    together = True
    column = None  # the loss has columns of its own

    def __post_init__(self) -> None:
        require(self.draws >= 1, "evaluate: HeldOutLoss.draws", self.draws, "at least 1")
        require(self.batch_size >= 1, "evaluate: HeldOutLoss.batch_size", self.batch_size, "at least 1")

    @override
    def __call__(self, task: Task, models: Models, trainer: Trainer) -> list[Measurement]:
        num = len(task.held_out)
        draws = self.draws if self.draws == 1 or _draws(task, trainer, num) else 1
        parts = [(draw, rows) for draw in range(draws) for rows in batches(num, self.batch_size)]
        total = len(models) * sum(len(rows) for _, rows in local_share(parts))
        with trainer.track("held-out loss", total) as progress:

            def mean(model: nn.Module) -> float:
                def losses(part: tuple[int, range]) -> Tensor:
                    draw, rows = part
                    inputs = held_out_inputs(task, trainer, rows, num, draw)
                    with torch.no_grad(), trainer.accelerator.autocast():
                        found = task.loss.losses(model, inputs)
                    progress.advance(len(rows))
                    return found.float().cpu()

                return float(torch.cat(map_sharded(parts, losses)).double().mean())

            values: dict[str, float | None] = {name: mean(model) for name, model in models.items()}
        note = f"{draws} fixed draw{'s' if draws > 1 else ''} for each of {num} held-out samples"
        if any(name.endswith("pruned") for name in models):
            note += "; right after pruning it is the calibration loss"
        return [Measurement("held-out loss", values, better="lower", note=note)]


def _draws(task: Task, trainer: Trainer, num: int) -> bool:
    """Whether the objective draws anything for held-out samples."""
    first, second = (held_out_inputs(task, trainer, range(min(num, 8)), num, draw) for draw in (0, 1))
    return any(not torch.equal(t, second[name]) for name, t in first.items())


def held_out_inputs(task: Task, trainer: Trainer, rows: range, num: int, draw: int = 0) -> dict[str, Tensor]:
    """Prepare some of the first `num` held-out samples on the trainer's device; the same for every model and run.

    Returns:
        The inputs of the network and the objective by name, (batch, ...) each.
    """
    device = trainer.accelerator.device
    batch = task.held_out.__getitems__(list(rows))
    # Time steps spread evenly over the samples: a far smaller variance for the same mean.
    rng = Rng(0, "held out", draw, rows.start, strata=num)
    return task.loss.prepare({name: t.to(device) for name, t in batch.items()}, rng)
