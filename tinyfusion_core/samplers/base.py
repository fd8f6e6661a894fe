"""A distribution over block masks, with gradients to its logits: what every sampler is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..runtime.seeding import Rng
from .constraints import Budget, Spending


@dataclass(frozen=True)
class Draw:
    """Sampled masks.

    Attributes:
        mask: (B, N) zeros and ones; carries the gradient to the logits when the estimator is pathwise.
        log_prob: (B,) log-probability of each draw in nats, differentiable.
    """

    mask: Tensor
    log_prob: Tensor


class BlockSampler(nn.Module, ABC):
    """A distribution over masks that keep a fixed budget of blocks; owns the gate logits.

    Args:
        lists: length of every block list, in execution order; the N columns of a mask follow it.
    """

    #: Learning rate of the logits that suits them, unless a search says otherwise.
    lr_gates: ClassVar[float] = 1e-3
    #: Masks that every sample runs under; the rows of a draw come in runs of that many.
    masks_per_sample: int = 1
    #: How many blocks every mask keeps, of all or by block list, or what they may cost; None when groups say it, or
    #: nothing does.
    budget: Budget | Spending | None = None

    def __init__(self, lists: Mapping[str, int]) -> None:
        super().__init__()
        self.lists = dict(lists)
        self.pattern: Any = None  # what a decision records of the budget, if it can be said as a pattern
        self.num_blocks = sum(lists.values())
        # A mask that somebody believes in, as signs, and how much at the first, at the last and at this step.
        self.register_buffer("preference", torch.zeros(self.num_blocks), persistent=False)
        self.prior_schedule, self.prior = (0.0, 0.0), 0.0

    def set_prior(self, kept: Sequence[int], prior: tuple[float, float]) -> None:
        """Believe in a mask: what the gates learn is added to its log-odds.

        Args:
            kept: the blocks that it keeps.
            prior: log-odds that these have, and minus that the others, at the first and at the last step, linear in
                between.
        """
        self.get_buffer("preference").fill_(-1.0)[list(kept)] = 1.0
        self.prior_schedule, self.prior = prior, prior[0]

    @property
    def prior_logits(self) -> Tensor:
        """(N,) log-odds of the blocks before the gates have learned anything."""
        return self.prior * self.get_buffer("preference")

    def anneal(self, progress: float) -> dict[str, float]:
        """Move schedules to a point of the search, 0 at the first step and 1 at the last; returns them by name."""
        self.prior = linear(self.prior_schedule, progress)
        return {"prior": self.prior} if any(self.prior_schedule) else {}

    @abstractmethod
    def sample(self, num_rows: int, rng: Rng) -> Draw:
        """Draw B masks, row i from stream i of `rng`; each obeys the budget exactly."""

    def surrogate(self, draw: Draw, loss: Tensor) -> Tensor:
        """The scalar to minimise, given the (B,) losses under the drawn masks.

        By default their mean: the gradient travels through the mask. A score-function estimator adds
        `log_prob` times an advantage.
        """
        return loss.mean()

    @abstractmethod
    def marginals(self) -> Tensor:
        """(N,) probability that each block is kept."""

    @abstractmethod
    def mode(self) -> list[int]:
        """Indices of the kept blocks in the most probable mask."""

    @abstractmethod
    def best(self, count: int) -> list[tuple[int, ...]]:
        """The kept blocks of the most probable masks, best first; fewer when there are no more."""

    @abstractmethod
    def allows(self, kept: Sequence[int]) -> bool:
        """Whether the mask that keeps these blocks is within the budget."""

    @abstractmethod
    def entropy(self) -> float:
        """Entropy of the distribution in nats."""

    @abstractmethod
    def confidence(self) -> list[float]:
        """Probability of the mode, for each independent choice; a decision is as sure as the least of them."""

    @abstractmethod
    def choices(self) -> list[list[int]]:
        """The blocks that each independent choice is about, in the order of `confidence`; none when it is one."""

    @property
    @abstractmethod
    def num_masks(self) -> int:
        """Size of the search space."""


def linear(ends: tuple[float, float], progress: float) -> float:
    """The value at a progress from 0 to 1 between two ends."""
    return ends[0] + (ends[1] - ends[0]) * progress
