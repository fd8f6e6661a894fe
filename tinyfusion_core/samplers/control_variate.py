"""A control variate for the score function: a model of the masked loss whose mean over the masks is known exactly."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import override

from .conditional_poisson import Subsets

PAIRS = 40
"""Largest number of blocks with a coefficient for every pair: 820 of them take some 10 ms of a step to fit."""


class ControlVariate(nn.Module):
    """A quadratic model of what a mask does to a sample's loss, by ridge regression on the steps so far.

    What the model explains is taken out of the losses before they weigh the masks, and the exact gradient of its mean
    is put back: the mean of the gradient stays as it is, and its variance falls by what is explained. That holds for
    any model that has not seen the losses that it is used on.

    Args:
        num_blocks: blocks of a mask; above `PAIRS` the model is linear.
        memory: steps that the regression reaches back: the weights change, and the losses with them.
        ridge: how many masks must contradict a coefficient of 0.
    """

    def __init__(self, num_blocks: int, memory: float = 100.0, ridge: float = 1.0) -> None:
        super().__init__()
        self.num_blocks, self.decay, self.ridge = num_blocks, 1 - 1 / memory, ridge
        paired = num_blocks if num_blocks <= PAIRS else 1
        self.first, self.second = torch.triu_indices(paired, paired, 1)
        size = num_blocks + len(self.first)
        # No buffers: they stay on the CPU, where the distribution is, and no average is taken of them.
        self.gram = torch.zeros(size, size, dtype=torch.float64)
        self.moment, self.weights = self.gram.new_zeros(size), self.gram.new_zeros(size)

    def observe(self, masks: Tensor, losses: Tensor) -> None:
        """Fit the model to the masks of one more step.

        Args:
            masks: (samples, masks of each, num_blocks) zeros and ones.
            losses: (samples, masks of each)
        """
        features = self._features(masks)
        # A sample's own level is none of the masks' doing.
        features = (features - features.mean(1, keepdim=True)).flatten(0, 1)
        self.gram.mul_(self.decay).addmm_(features.T, features)
        self.moment.mul_(self.decay).addmv_(features.T, losses.flatten().to(self.gram))
        self._solve()

    @override
    def forward(self, masks: Tensor) -> Tensor:
        """Predict how the losses of masks differ.

        Args:
            masks: (masks, num_blocks) zeros and ones.

        Returns:
            (masks,), float64, on the CPU.
        """
        return self._features(masks) @ self.weights

    def mean(self, subsets: Subsets) -> Tensor:
        """Return the mean prediction over a distribution, a scalar, differentiable in its log-odds."""
        pairs = self.gram.new_zeros(self.num_blocks, self.num_blocks)
        pairs[self.first, self.second] = self.weights[self.num_blocks :]
        return subsets.expectation(self.weights[: self.num_blocks], pairs)

    @override
    def get_extra_state(self) -> Tensor:
        """Return the regression as checkpoints hold it, (size + 1, size): sums of features, and of their losses."""
        return torch.cat([self.gram, self.moment[None]])

    @override
    def set_extra_state(self, state: Tensor) -> None:
        """Resume from a checkpoint.

        Args:
            state: (size + 1, size) what `get_extra_state` returned.
        """
        self.gram, self.moment = state[:-1].clone(), state[-1].clone()
        self._solve()

    def _solve(self) -> None:
        penalty = self.ridge * torch.eye(len(self.gram), dtype=self.gram.dtype)
        self.weights = torch.linalg.solve(self.gram + penalty, self.moment)

    def _features(self, masks: Tensor) -> Tensor:
        masks = masks.detach().to(self.gram)
        return torch.cat([masks, masks[..., self.first] * masks[..., self.second]], -1)
