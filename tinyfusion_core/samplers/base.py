"""The interface of samplers: a distribution over block masks, differentiable in its logits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..runtime.seeding import Rng
from .demands import Budget, Spending


@dataclass(frozen=True)
class Draw:
    """Sampled masks.

    Attributes:
        mask: (batch, num_blocks) zeros and ones; carries the gradient to the logits if the estimator is pathwise.
        log_prob: (batch,) log-probability of each mask in nats, differentiable.
        host: the mask in main memory, (batch, num_blocks), if it was drawn there: it need not be read from a device.
        of: what the sampler keeps of its distribution for the surrogate.
    """

    mask: Tensor
    log_prob: Tensor
    host: Tensor | None = None
    of: Any = None


class BlockSampler(nn.Module, ABC):
    """A distribution over masks that keep a fixed budget of blocks; owns the gate logits.

    Args:
        lists: length of every block list, in execution order; the columns of a mask follow it.
    """

    #: Learning rate of the logits that suits them, unless a search says otherwise.
    lr_gates: ClassVar[float] = 1e-3
    #: Masks that every sample runs under; the rows of a draw come in runs of that many.
    masks_per_sample: int = 1
    #: How many blocks every mask keeps, of all or by block list, or what they may cost; None when groups say it, or
    #: nothing does.
    budget: Budget | Spending | None = None
    #: Whether `observe` is to be called.
    observes: bool = False

    def __init__(self, lists: Mapping[str, int]) -> None:
        super().__init__()
        self.lists = dict(lists)
        self.pattern: Any = None  # what a decision records of the budget, if it can be said as a pattern
        self.num_blocks = sum(lists.values())
        # A mask that somebody believes in, as signs, and how much at the first, at the last and at this step.
        self.register_buffer("preference", torch.zeros(self.num_blocks), persistent=False)
        self.prior_schedule, self.prior = (0.0, 0.0), 0.0

    def set_prior(self, kept: Sequence[int], prior: tuple[float, float]) -> None:
        """Add a prior: log-odds in favour of one mask, to which what the gates learn is added.

        Args:
            kept: the blocks that the mask keeps.
            prior: log-odds of these blocks, and minus those of the others, at the first and at the last step, linear in
                between.
        """
        self.get_buffer("preference").fill_(-1.0)[list(kept)] = 1.0
        self.prior_schedule, self.prior = prior, prior[0]

    @property
    def prior_logits(self) -> Tensor:
        """Prior log-odds of the blocks, (num_blocks,), before the gates have learned anything."""
        return self.prior * self.get_buffer("preference")

    def anneal(self, progress: float) -> dict[str, float]:
        """Set all schedules to a point of the search and return their values by name.

        Args:
            progress: 0 at the first step, 1 at the last.
        """
        self.prior = linear(self.prior_schedule, progress)
        return {"prior": self.prior} if any(self.prior_schedule) else {}

    @abstractmethod
    def sample(self, num_rows: int, rng: Rng) -> Draw:
        """Draw masks, each of which obeys the budget exactly: (batch, num_blocks).

        Args:
            num_rows: number of masks.
            rng: row i is drawn from its stream i.
        """

    def surrogate(self, draw: Draw, loss: Tensor) -> Tensor:
        """Return the scalar to minimise.

        By default the mean loss: the gradient flows through the mask. A score-function estimator adds `log_prob` times
        an advantage.

        Args:
            draw: the masks.
            loss: (batch,) losses under them.
        """
        return loss.mean()

    def observe(self, masks: Tensor, losses: Tensor) -> None:
        """Learn from a whole step, after its update; the same rows on every process.

        Args:
            masks: (batch, num_blocks) zeros and ones.
            losses: (batch,) losses under them.
        """

    @abstractmethod
    def marginals(self) -> Tensor:
        """Return the probability that each block is kept, (num_blocks,)."""

    @abstractmethod
    def mode(self) -> list[int]:
        """Return the kept blocks of the most probable mask."""

    @abstractmethod
    def best(self, count: int) -> list[tuple[int, ...]]:
        """Return the kept blocks of the most probable masks, best first; fewer than `count` if there are no more."""

    @abstractmethod
    def allows(self, kept: Sequence[int]) -> bool:
        """Return whether the mask that keeps these blocks is within the budget."""

    @abstractmethod
    def entropy(self) -> float:
        """Return the entropy of the distribution in nats."""

    @abstractmethod
    def confidence(self) -> list[float]:
        """Return the probability of the mode for each independent choice; a decision is as sure as the least."""

    def choices(self) -> list[list[int]]:
        """Return the blocks of each independent choice, in the order of `confidence`; empty if there is only one."""
        return []

    @property
    @abstractmethod
    def num_masks(self) -> int:
        """Size of the search space."""


def linear(ends: tuple[float, float], progress: float) -> float:
    """Interpolate linearly between two ends, at a progress from 0 to 1."""
    return ends[0] + (ends[1] - ends[0]) * progress
