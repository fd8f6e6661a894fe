"""The interface of a training objective."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.utils._pytree import tree_leaves, tree_map, tree_structure, tree_unflatten

from ..errors import UserError
from ..parsing.settings import Settings
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

    def own_samples(self, model: nn.Module, batch: Batch, conditions: str, rng: Rng) -> dict[str, Tensor]:
        """Return what a student makes itself in the place of a batch, to be compared with its teacher on it.

        By default what `generated` returns. Where that keeps a part of the data, `distance` should leave that part out.

        Args:
            model: the student, in eval mode.
            batch: tensors by name as the data give them, each (batch, ...), on the device of the student.
            conditions: name of the column with the conditions of generation.
            rng: the streams to draw from, by row alone.

        Returns:
            Tensors by name as the data would have them, each (batch, ...).

        Raises:
            UserError: this objective cannot generate.
        """
        return self.generated(model, batch, conditions, rng)
