"""What a student has kept of abilities that its recovery did not train."""

from __future__ import annotations

from dataclasses import dataclass, replace

from typing_extensions import override

from ..errors import UserError, require
from ..protocols.columns import checked, columns_of
from ..protocols.data import DataSource, Samples
from ..protocols.task import Task
from ..training.trainer import Trainer
from .metrics import HeldOutLoss, Measurement, Metric, Models


@dataclass(frozen=True, kw_only=True)
class Retention(Metric):
    """The held-out loss on other data than the recipe's, of every network: one row for each data set.

    A recovery on one data set may forget what the teacher can do on others, and the loss on its own does not show it.

    Args:
        data: data sets by name, with the columns of the recipe's; of each the held-out samples are taken.
        draws: passes over them, each with its own time steps and noise.
        batch_size: samples per batch.
    """

    data: dict[str, DataSource]
    draws: int = 4
    batch_size: int = 256
    together = True

    def __post_init__(self) -> None:
        require(len(self.data) > 0, "evaluate: Retention.data", self.data, "at least one data set, by name")
        for name in ("draws", "batch_size"):
            require(getattr(self, name) >= 1, f"evaluate: Retention.{name}", getattr(self, name), "at least 1")

    @override
    def check(self, data: DataSource) -> None:
        wanted = _shapes(data.held_out())
        for name, other in self.data.items():
            if (found := _shapes(other.held_out())) != wanted:
                raise UserError(
                    f"evaluate: Retention.data.{name}: its held-out samples have the columns {found}, those of data "
                    f"{wanted}; give data that the network reads in the same way"
                )

    @override
    def __call__(self, task: Task, models: Models, trainer: Trainer) -> list[Measurement]:
        loss, model, found = HeldOutLoss(self.draws, self.batch_size), next(iter(models.values())), []
        for name, data in self.data.items():
            columns = columns_of(task.backbone, model, data.conditions)
            samples = checked(data.held_out(), columns, f"'{name}' held-out")
            (own,) = loss(replace(task, held_out=samples, data=data), models, trainer)
            note = f"data that nothing was trained on here; {own.note}"
            found.append(Measurement(f"loss on {name}", own.values, better="lower", note=note))
        return found


def _shapes(samples: Samples) -> dict[str, list[int]]:
    """The shapes of one sample by column; nothing if there is none."""
    return {name: list(t.shape[1:]) for name, t in samples.__getitems__([0]).items()} if len(samples) else {}
