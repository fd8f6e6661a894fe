"""Short recoveries that a metric judges."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from ...errors import UserError
from ...evaluation.evaluate import measure
from ...evaluation.metrics import Metric
from ...protocols.undisturbed import evaluating
from .recoveries import ShortRecoveries

BETTER = {"lower": 1.0, "higher": -1.0}
"""What the values of a metric are multiplied by, so that less is better."""


@dataclass
class MeasuredRecoveries(ShortRecoveries):
    """Recovers masks as `ShortRecoveries` does; what it knows of each is one number, of which less is better.

    The metric is given the samples that judge as held-out ones: those that a run is reported on stay unseen.

    Attributes:
        metric: what measures; its first measurement counts.
        sign: what its values are multiplied by, 1 or -1.
        measures: what it is called, once it has measured.
    """

    metric: Metric = field(kw_only=True)
    sign: float = field(default=1.0, init=False)
    measures: str = field(default="", init=False)

    @override
    def _of_its_kind(self) -> dict[str, Any]:
        return {**super()._of_its_kind(), "metric": self.metric}

    @property
    @override
    def num_losses(self) -> int:
        return 1

    @override
    def judge(self, model: nn.Module) -> Tensor:
        """Return what the metric measures, (1,) in float64, of which less is better; infinite if it is not finite.

        Raises:
            UserError: the metric measures nothing here, or does not say which values are better.
        """
        device, name = self.quiet.accelerator.device, type(self.metric).__name__
        models = {"teacher": self.task.teacher, "student": model}
        models = {key: network.to(device) for key, network in models.items()}
        with evaluating(*models.values()):
            task = replace(self.task, model=self.task.teacher, held_out=self.judged)
            found = next(iter(measure(self.metric, task, models, self.quiet)), None)
        if found is None or found.better not in BETTER:
            raise UserError(f"search.metric: {name} has no first measurement of which less or more is better")
        self.sign, self.measures = BETTER[found.better], found.name
        value = found.values["student"]
        return torch.tensor([torch.inf if value is None else self.sign * value], dtype=torch.float64)
