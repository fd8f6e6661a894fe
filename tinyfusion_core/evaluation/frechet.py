"""Fréchet distance between generated and real examples, in the data set's feature space."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from ..errors import UserError, require
from ..protocols.backbone import owner
from ..protocols.data import DataSource, FeatureSpace
from ..protocols.task import Task
from ..runtime.distributed import batches, local_share, map_sharded
from ..runtime.files import NEUTRAL
from ..training.trainer import Trainer
from . import DISTANCE
from .generation import sample_rows, training_conditions
from .metrics import Measurement, Metric, Models


@dataclass(frozen=True)
class Frechet(Metric):
    """Fréchet distance between generated and real examples, and the accuracy of generated classes.

    Conditions are class labels, (n,) integers. Unless `features` is given, the feature space is the data set's own, so
    the distance is not comparable with FID.

    Args:
        num_samples: examples to generate with each model, from the same noise and conditions.
        batch_size: examples per batch.
        features: feature space of the comparison; by default the data set's own.
    """

    num_samples: int = 1000
    batch_size: int = 250
    features: FeatureSpace | None = field(default=None, metadata={NEUTRAL: None})
    together = True
    column: ClassVar[str | None] = DISTANCE

    def __post_init__(self) -> None:
        require(self.num_samples >= 2, f"{self._key}.num_samples", self.num_samples, "at least 2")
        require(self.batch_size >= 1, f"{self._key}.batch_size", self.batch_size, "at least 1")

    @property
    def _key(self) -> str:
        return f"evaluate: {type(self).__name__}"

    @override
    def check(self, data: DataSource) -> None:
        if self.features is None and data.feature_space() is None:
            raise UserError(
                f"{self._key} needs a feature space, and {type(data).__name__} has none; name one (features) or leave "
                "it out"
            )

    @override
    def check_task(self, task: Task) -> None:
        if not task.loss.generates:
            raise UserError(f"{self._key} generates examples, and loss: {owner(task.loss)} cannot; leave it out")

    @override
    def __call__(self, task: Task, models: Models, trainer: Trainer) -> list[Measurement]:
        return self.against(self.real(task), task, models, trainer)

    def real(self, task: Task) -> Any:
        """Return the statistics of the features of the training data, for `against`. A collective call."""
        from torch_fidelity.metric_fid import fid_features_to_statistics

        space = self._space(task)

        def features(rows: range) -> Tensor:
            return space(task.train.__getitems__(list(rows))["x"])[0].cpu()

        return fid_features_to_statistics(torch.cat(map_sharded(batches(len(task.train), self.batch_size), features)))

    def against(self, reference: Any, task: Task, models: Models, trainer: Trainer) -> list[Measurement]:
        """Measure networks against the statistics of real examples. A collective call.

        Args:
            reference: what `real` returned.
            task: objective and data.
            models: the networks.
            trainer: device, precision and seed.

        Returns:
            Two rows, the distance and the accuracy.

        Raises:
            UserError: the conditions of the data are no classes.
        """
        from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

        space, classes = self._space(task), training_conditions(task, range(self.num_samples))
        if classes.ndim != 1 or classes.is_floating_point():
            raise UserError(
                f"{self._key}: the data's `{task.conditions}` are no classes, one number each; leave it out"
            )
        distances: dict[str, float | None] = {}
        accuracies: dict[str, float | None] = {}
        for name, model in models.items():
            features, right = self._features(task, model, trainer, space, classes, name)
            distances[name] = accuracies[name] = None
            if torch.isfinite(features).all():  # a network that has diverged has neither
                distance = fid_statistics_to_metric(fid_features_to_statistics(features), reference, verbose=False)
                distances[name] = float(distance["frechet_inception_distance"])
                accuracies[name] = float(right.float().mean())
        note = self._how(task)
        return [
            Measurement(DISTANCE, distances, better="lower", note=note),
            Measurement("conditional accuracy", accuracies, better="higher", note=note),
        ]

    def _space(self, task: Task) -> FeatureSpace:
        space = task.feature_space if self.features is None else self.features
        if space is None:
            raise UserError(f"{type(self).__name__}: the task has no feature_space")
        return space

    def _how(self, task: Task) -> str:
        """How the distance is measured, for notes."""
        return f"{self.num_samples} samples; features: {self._space(task).name}"

    def _features(
        self, task: Task, model: nn.Module, trainer: Trainer, space: FeatureSpace, classes: Tensor, name: str
    ) -> tuple[Tensor, Tensor]:
        """Features (n, features) of generated examples, and whether each shows its class, (n,); both on the CPU."""
        parts = batches(self.num_samples, self.batch_size)
        with trainer.track(f"samples of {name}", sum(map(len, local_share(parts)))) as progress:

            def work(rows: range) -> tuple[Tensor, Tensor]:
                some = classes[rows.start : rows.stop]
                features, logits = space(sample_rows(task, model, trainer, rows, some))
                progress.advance(len(rows))
                return features.cpu(), logits.argmax(1).cpu() == some

            features, right = zip(*map_sharded(parts, work), strict=True)
        return torch.cat(features), torch.cat(right)
