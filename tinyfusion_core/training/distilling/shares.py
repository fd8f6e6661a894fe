"""How much of the gradient each term of a distillation is."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ...protocols.backbone import Batch
from ...protocols.data import Samples
from ...protocols.loss import Prediction
from ...protocols.undisturbed import evaluating
from ...runtime.seeding import Rng
from ..trainer import Trainer

ROWS = 8
"""Samples that the terms are compared on."""
FEW = 0.01
"""A term that is a smaller part of the gradient hardly moves the weights."""


Compared = Callable[[Batch], tuple[Prediction, Mapping[str, Tensor]]]
"""Inputs, each (batch, ...) -> a prediction, and terms by name, each (batch,)."""


@dataclass
class Shares:
    """Compares the gradients of an objective's terms, always on the same samples and random draws.

    Attributes:
        inputs: the prepared samples, each (rows, ...), on the device.
        trainer: its precision.
        told: whether a term that hardly counts has been looked for.
    """

    inputs: Batch
    trainer: Trainer
    told: bool = field(default=False, init=False)

    @classmethod
    def on(cls, trainer: Trainer, data: Samples, prepare: Callable[[Batch, Rng], dict[str, Tensor]]) -> Shares:
        """Return what compares on the first samples of some data.

        Args:
            trainer: device, precision and seed.
            data: the samples to train on.
            prepare: turns a batch into inputs, each (batch, ...).
        """
        num = min(ROWS, trainer.micro_batch_size or ROWS, len(data))
        batch = data.__getitems__(list(range(num)))
        there = {name: t.to(trainer.accelerator.device) for name, t in batch.items()}
        return cls(prepare(there, Rng(trainer.seed, "shares of the gradient")), trainer)

    def of(self, model: nn.Module, weights: Mapping[str, float], compared: Compared) -> dict[str, float]:
        """Return every term's part of the sum of the norms of the terms' gradients; nothing if there is one term.

        The network is in eval mode meanwhile. At the first call it warns of terms that hardly count.

        Args:
            model: the network in training, on the device.
            weights: the weights of the terms.
            compared: runs it, and gives the terms, not yet weighted.
        """
        trained = [p for p in model.parameters() if p.requires_grad]
        with evaluating(model), torch.enable_grad():  # which restores buffers: whatever needs them is inside
            with self.trainer.accelerator.autocast():
                _, terms = compared(self.inputs)
                parts = {name: weight * terms[name].mean() for name, weight in weights.items() if weight}
            norms = {name: _norm(part, trained) for name, part in parts.items()}
        total = sum(norms.values())
        if len(norms) < 2 or not 0 < total < math.inf:
            return {}
        shares = {name: norm / total for name, norm in norms.items()}
        if not self.told:
            self._tell(shares)
        return shares

    def _tell(self, shares: Mapping[str, float]) -> None:
        self.told = True
        for name, share in shares.items():
            if 0 < share < FEW:  # none at all has a term that is at its minimum
                warnings.warn(
                    f"recover.kd: {NAMES[name]} makes the term '{name}' {share:.2%} of the gradient, so that it hardly "
                    "counts; raise it, or lower the others",
                    stacklevel=2,
                )


NAMES = {"kd": "alpha_kd", "gt": "alpha_gt", "feature": "beta"}
"""The settings that are the weights of the terms."""


def _norm(part: Tensor, trained: list[nn.Parameter]) -> float:
    if not part.requires_grad:
        return 0.0
    gradients = torch.autograd.grad(part, trained, retain_graph=True, allow_unused=True)
    return math.hypot(*(float(g.norm()) for g in gradients if g is not None))
