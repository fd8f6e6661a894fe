"""What a plugin says of a training objective."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.utils._pytree import tree_map

from ..errors import UserError
from ..runtime.seeding import Rng
from .backbone import Batch, owner

Prediction = Any
"""A tensor, or a tuple of tensors, whatever `predict` returns and `loss` takes."""


def has_values(x: Tensor) -> bool:
    """Whether a tensor can be looked into; what plans are made with has a shape alone."""
    return not (x.is_meta or is_fake(x))


class LossAdapter(ABC):
    """An objective, one number per sample.

    All randomness of the examples is drawn in `prepare`, so that teacher and student see the same inputs,
    and never from the global generator.
    """

    def prepare(self, batch: Batch, rng: Rng) -> dict[str, Tensor]:
        """Draw time steps, noise, dropped conditions: everything random about a batch. By default there is nothing.

        Args:
            batch: tensors with B rows, as the data gives them, on the device of the model.
            rng: the streams to draw from; row i of the batch is row i of the streams.

        Returns:
            What `predict`, `loss` and `distance` need, tensors with B rows on the same device.
        """
        return dict(batch)

    def prepare_clean(self, batch: Batch, rng: Rng) -> dict[str, Tensor]:
        """Inputs without noise, as the published block-influence script feeds them: for `predict` alone.

        Raises:
            UserError: this objective has none.
        """
        raise UserError(f"{type(self).__name__} has no inputs without noise; set reference to false")

    @abstractmethod
    def predict(self, model: nn.Module, inputs: Batch) -> Prediction:
        """Run the network on prepared inputs. The only method that calls the model."""

    @abstractmethod
    def loss(self, prediction: Prediction, inputs: Batch) -> Tensor:
        """(B,) training losses."""

    def distance(self, student: Prediction, teacher: Prediction, inputs: Batch) -> Tensor:
        """(B,) distances between two predictions on the same inputs, for distillation.

        Raises:
            UserError: this objective has none.
        """
        raise UserError(f"{owner(self)}: distance: not written, and distillation needs it; set recover.kd to null")

    def losses(self, model: nn.Module, inputs: Batch) -> Tensor:
        """(B,) training losses of a network, checked.

        Raises:
            UserError: `loss` gives no single number for every sample.
        """
        return self.per_sample(self.loss(self.predict(model, inputs), inputs), inputs)

    def per_sample(self, found: Tensor, inputs: Batch) -> Tensor:
        """What `loss` found, if it is one number for every sample. Raises UserError when it is not."""
        num_rows = len(next(iter(inputs.values())))
        if found.shape != (num_rows,):
            raise UserError(
                f"{owner(self)}: loss: returns the shape {list(found.shape)} for {num_rows} samples; return one number "
                f"for each, [{num_rows}]: the mean over everything but the batch"
            )
        return found

    def trivial(self, prediction: Prediction, inputs: Batch) -> Prediction | None:
        """What a network that has learned nothing would predict, in the place of `prediction`.

        A teacher whose held-out loss is not clearly below this one's is taken for a mistake. By default zeros: no
        noise, no velocity, all tokens alike. None when the objective has no such prediction: nothing is checked.
        """
        return tree_map(lambda x: torch.zeros_like(x) if isinstance(x, Tensor) else x, prediction)

    def sampling_options(self) -> frozenset[str]:
        """Names of the options that matter for `sample` alone: changing them spoils no training."""
        return frozenset()

    @property
    def generates(self) -> bool:
        """Whether `sample` can make examples."""
        return type(self).sample is not LossAdapter.sample

    @classmethod
    def tiny(cls) -> Self:
        """An instance that fits the tiny networks of the backbones it is for; for the conformance checks."""
        return cls()

    def sample(self, model: nn.Module, like: Tensor, conditions: Tensor, rng: Rng) -> Tensor:
        """Generate one example for every condition.

        Args:
            model: the network, in eval mode.
            like: (B, ...) tensor that gives shape, dtype and device of the examples.
            conditions: (B, ...) what the data have in the column `DataSource.conditions`: class labels, as a rule.
            rng: the streams to draw from.

        Raises:
            UserError: this objective cannot generate.
        """
        raise UserError(f"{type(self).__name__} cannot generate samples")
