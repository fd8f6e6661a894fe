"""A control variate for the score function: a model of the masked loss whose mean over the masks is known exactly."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import override

from .conditional_poisson import Subsets


class ControlVariate(nn.Module):
    """What each kept block does to a sample's loss, by ridge regression on the steps so far.

    What the model explains is taken out of the losses before they weigh the masks, and the exact gradient of its mean
    is put back: the mean of the gradient stays as it is, and its variance falls by what is explained. That holds for
    any model that has not seen the losses that it is used on.

    Args:
        num_blocks: blocks of a mask.
        memory: steps that the regression reaches back: the weights change, and the losses with them.
        ridge: how many masks must contradict a coefficient of 0.
    """

    def __init__(self, num_blocks: int, memory: float = 100.0, ridge: float = 1.0) -> None:
        super().__init__()
        self.decay, self.penalty = 1 - 1 / memory, ridge * torch.eye(num_blocks, dtype=torch.float64)
        # No buffers: they stay on the CPU, where the distribution is, and no average is taken of them.
        self.gram, self.moment = torch.zeros_like(self.penalty), self.penalty.new_zeros(num_blocks)
        self.weights = self.moment

    def observe(self, masks: Tensor, losses: Tensor) -> None:
        """Fit the model to the masks of one more step.

        Args:
            masks: (samples, masks of each, num_blocks) zeros and ones.
            losses: (samples, masks of each)
        """
        masks = masks.detach().to(self.gram)
        # A sample's own level is none of the masks' doing.
        masks = (masks - masks.mean(1, keepdim=True)).flatten(0, 1)
        self.gram = self.decay * self.gram + masks.T @ masks
        self.moment = self.decay * self.moment + masks.T @ losses.flatten().to(self.gram)
        self.weights = torch.linalg.solve(self.gram + self.penalty, self.moment)

    @override
    def forward(self, masks: Tensor) -> Tensor:
        """Predict how the losses of masks differ.

        Args:
            masks: (masks, num_blocks) zeros and ones.

        Returns:
            (masks,), float64, on the CPU.
        """
        return masks.detach().to(self.weights) @ self.weights

    def mean(self, subsets: Subsets) -> Tensor:
        """Return the mean prediction over a distribution, a scalar, differentiable in its log-odds."""
        return subsets.marginals() @ self.weights

    @override
    def get_extra_state(self) -> Tensor:
        """Return the regression as checkpoints hold it, (rows, num_blocks): the sums, and what came of them."""
        return torch.cat([self.gram, self.moment[None], self.weights[None]])

    @override
    def set_extra_state(self, state: Tensor) -> None:
        """Resume from a checkpoint.

        Args:
            state: (rows, num_blocks), what `get_extra_state` has returned.
        """
        self.gram, self.moment, self.weights = state[:-2], state[-2], state[-1]
