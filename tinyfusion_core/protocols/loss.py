"""The interface of a training objective."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.utils._pytree import tree_leaves, tree_map, tree_structure, tree_unflatten
from typing_extensions import override

from ..errors import UserError, require
from ..parsing.settings import Settings
from ..runtime.files import NEUTRAL
from ..runtime.seeding import Rng
from .backbone import Backbone, Batch, owner

Prediction = Any
"""A tensor or a tuple of tensors: whatever `predict` returns and `loss` takes."""


def has_values(x: Tensor) -> bool:
    """Return whether a tensor of any shape holds data; the tensors of memory planning have a shape only."""
    return not (x.is_meta or is_fake(x))


def check_per_sample(found: Tensor, inputs: Batch, of: str) -> Tensor:
    """Check that losses have the shape (batch,), and return them.

    Args:
        found: the losses.
        inputs: what they were computed from, each (batch, ...).
        of: what computed them, for the message.

    Raises:
        UserError: they have another shape.
    """
    num_rows = len(next(iter(inputs.values())))
    if found.shape != (num_rows,):
        raise UserError(
            f"{of}: returns the shape {list(found.shape)} for {num_rows} samples; return one number for each, "
            f"[{num_rows}]: the mean over everything but the batch"
        )
    return found


class LossAdapter(Settings, ABC):
    """A training objective with one loss per sample.

    All randomness is drawn in `prepare`, so that teacher and student see the same inputs, and never from the global
    generator.
    """

    def prepare(self, batch: Batch, rng: Rng) -> dict[str, Tensor]:
        """Draw everything random about a batch: time steps, noise, dropped conditions. By default nothing.

        Args:
            batch: tensors by name as the data gives them, each (batch, ...), on the device of the model.
            rng: the streams to draw from; row i of the batch uses row i of the streams.

        Returns:
            What `predict`, `loss` and `distance` need: tensors by name, each (batch, ...), on the same device.
        """
        return dict(batch)

    def prepare_clean(self, batch: Batch, rng: Rng) -> dict[str, Tensor]:
        """Return inputs without noise, as in the reference code of block influence; for `predict` only.

        Args:
            batch: tensors by name, each (batch, ...).
            rng: the streams to draw from.

        Returns:
            Tensors by name, each (batch, ...).

        Raises:
            UserError: this objective has no such inputs.
        """
        raise UserError(f"{type(self).__name__} has no inputs without noise; set reference to false")

    @abstractmethod
    def predict(self, model: nn.Module, inputs: Batch) -> Prediction:
        """Run the network on prepared inputs. The only method that calls the model."""

    @abstractmethod
    def loss(self, prediction: Prediction, inputs: Batch) -> Tensor:
        """Compute the training loss of every sample, (batch,).

        Args:
            prediction: what `predict` returned.
            inputs: what `prepare` returned.
        """

    def distance(self, student: Prediction, teacher: Prediction, inputs: Batch) -> Tensor:
        """Compute the distance between two predictions on the same inputs, (batch,), for distillation.

        Args:
            student: prediction of the student.
            teacher: prediction of the teacher.
            inputs: what `prepare` returned.

        Raises:
            UserError: this objective has no distance.
        """
        raise UserError(f"{owner(self)}: distance: not written, and distillation needs it; leave kd out")

    def keep(self, teacher: Prediction, inputs: Batch) -> dict[str, Tensor]:
        """Return what a cache keeps of a teacher's prediction for `distance`: tensors by name, each (batch, ...).

        By default all of it. An objective whose predictions are large keeps less, and `kept` returns what its
        `distance` takes in place of a teacher's prediction.

        Args:
            teacher: prediction of the teacher.
            inputs: what `prepare` returned.

        Raises:
            UserError: it cannot be kept.
        """
        return {str(i): leaf for i, leaf in enumerate(tree_leaves(teacher))}

    def kept(self, columns: Batch, like: Prediction) -> Prediction:
        """Return the teacher's prediction, as `distance` takes it, from what was kept of it.

        Args:
            columns: what `keep` returned, each (batch, ...), in float32 if it had a floating point.
            like: prediction of the student on the same inputs.
        """
        return tree_unflatten([columns[str(i)] for i in range(len(columns))], tree_structure(like))

    def losses(self, model: nn.Module, inputs: Batch) -> Tensor:
        """Run a network and return the training loss of every sample, (batch,).

        Raises:
            UserError: `loss` does not return one number per sample.
        """
        return self.per_sample(self.loss(self.predict(model, inputs), inputs), inputs)

    def per_sample(self, found: Tensor, inputs: Batch) -> Tensor:
        """Check that `found`, the result of `loss`, has the shape (batch,), and return it.

        Raises:
            UserError: it has another shape.
        """
        return check_per_sample(found, inputs, f"{owner(self)}: loss")

    def trivial(self, prediction: Prediction, inputs: Batch) -> Prediction | None:
        """Return what an untrained network would predict, in the form of `prediction`.

        A teacher whose held-out loss is not clearly below the loss of this prediction is rejected as a mistake. By
        default zeros: no noise, no velocity, all tokens equally likely. None turns the check off.
        """
        return tree_map(lambda x: torch.zeros_like(x) if isinstance(x, Tensor) else x, prediction)

    def sampling_options(self) -> frozenset[str]:
        """Return the names of options that only matter to `sample`: changing them does not invalidate a training."""
        return frozenset()

    def check_sampling(self, backbone: Backbone) -> None:
        """Check what only sampling needs, such as files, before anything is spent. By default nothing is needed.

        Args:
            backbone: of the network that is pruned.

        Raises:
            UserError: something is missing, or does not fit.
        """
        return

    def remark(self, model: nn.Module) -> str:
        """Return what plans say of this objective for a network, such as what nobody has tested; by default nothing.

        Args:
            model: the network, on any device.
        """
        return ""

    @property
    def generates(self) -> bool:
        """Whether `sample` can generate examples."""
        return type(self).sample is not LossAdapter.sample

    @property
    def makes_data(self) -> bool:
        """Whether `generated` can make training samples."""
        return self.generates or type(self).generated is not LossAdapter.generated

    @classmethod
    def tiny(cls) -> Self:
        """Return an instance that fits the tiny networks of the backbones it is for; for the conformance checks."""
        return cls()

    def sample(self, model: nn.Module, like: Tensor, conditions: Tensor, rng: Rng) -> Tensor:
        """Generate one example for every condition.

        Args:
            model: the network, in eval mode.
            like: (batch, ...) tensor that gives shape, dtype and device of the examples.
            conditions: (batch, ...) values of the data's column `DataSource.conditions`: usually class labels.
            rng: the streams to draw from.

        Returns:
            (batch, ...) examples, the same shape as `like`.

        Raises:
            UserError: this objective cannot generate.
        """
        raise UserError(f"{type(self).__name__} cannot generate samples")

    def generated(self, model: nn.Module, batch: Batch, conditions: str, rng: Rng) -> dict[str, Tensor]:
        """Return training samples that a network makes, in the place of those of a batch.

        By default `x` is what `sample` generates for their conditions.

        Args:
            model: the network, in eval mode.
            batch: tensors by name in the shapes of the data, each (batch, ...), on the device of the model. Only
                conditions, and what a text begins with, have to be real.
            conditions: name of the column with the conditions of generation.
            rng: the streams to draw from, by row alone.

        Returns:
            Tensors by name as the data would have them, each (batch, ...).

        Raises:
            UserError: this objective cannot generate.
        """
        told = batch[conditions]
        return {"x": self.sample(model, batch["x"], told, rng), conditions: told}


@dataclass(frozen=True, kw_only=True)
class DiffusionLoss(LossAdapter):
    """An objective that takes samples at random times of a process, which it counts from 0 to 1.

    Args:
        time: distribution of times: "uniform", or "logit_normal", the sigmoid of a normal number (arXiv:2403.03206).
        mean: mean of the normal number.
        std: standard deviation of the normal number.
        times: the part of the process that is trained and judged, for networks that are experts of one.
        min_snr: weigh an error as that of the clean sample, times the signal-to-noise ratio, of which this is the most
            (arXiv:2303.09556 takes 5); null leaves errors as they are.
    """

    time: Literal["uniform", "logit_normal"] = field(default="uniform", metadata={NEUTRAL: "uniform"})
    mean: float = field(default=0.0, metadata={NEUTRAL: 0.0})
    std: float = field(default=1.0, metadata={NEUTRAL: 1.0})
    times: Sequence[float] = field(default=(0.0, 1.0), metadata={NEUTRAL: [0.0, 1.0]})
    min_snr: float | None = field(default=None, metadata={NEUTRAL: None})

    def __post_init__(self) -> None:
        require(self.std > 0, "loss.std", self.std, "a deviation above 0")
        fit = len(self.times) == 2 and 0 <= self.times[0] < self.times[1] <= 1
        require(fit, "loss.times", list(self.times), "[from, to] between 0 and 1")
        require(self.min_snr is None or self.min_snr > 0, "loss.min_snr", self.min_snr, "a ratio above 0, or null")

    @property
    @override
    def generates(self) -> bool:
        return super().generates and self.whole

    @property
    @override
    def makes_data(self) -> bool:
        return super().makes_data and self.whole

    @property
    def whole(self) -> bool:
        """Whether all of the process is trained: an expert of a part generates nothing alone."""
        return tuple(self.times) == (0.0, 1.0)

    def drawn(self, u: Tensor) -> Tensor:
        """Return times for uniform numbers of [0, 1), of any shape, which may be stratified."""
        low, high = map(self._share, self.times)
        u = low + (high - low) * u
        normal = math.sqrt(2) * torch.erfinv(2 * u - 1)
        return u if self.time == "uniform" else torch.sigmoid(self.mean + self.std * normal)

    def _share(self, t: float) -> float:
        """How probable an earlier time is in the whole process."""
        if self.time == "uniform" or t in (0, 1):
            return t
        return (1 + math.erf((math.log(t / (1 - t)) - self.mean) / self.std / math.sqrt(2))) / 2

    def weigh(self, errors: Tensor, signal: Tensor, noise: Tensor, clean: Tensor) -> Tensor:
        """Weigh squared errors by `min_snr`, if it is set.

        Args:
            errors: (batch,) mean squared errors of what the network predicts.
            signal: (batch,) how much of the clean sample is in the noisy one.
            noise: (batch,) how much of the noise.
            clean: (batch,) what an error of the prediction is multiplied by to be one of the clean sample.
        """
        ratio = (signal / noise.clamp(min=1e-12)).square().clamp(max=self.min_snr or math.inf)
        return errors if self.min_snr is None else errors * (ratio * clean.square()).to(errors)
