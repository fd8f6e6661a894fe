"""Distributions over block masks, with gradients to their logits."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..errors import require
from ..runtime.seeding import Rng
from .patterns import Pattern, parse_pattern, split_groups


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
    #: How many blocks every mask keeps, of all or by block list; None when masks differ in it, or groups say it.
    budget: int | Mapping[str, int] | None = None

    def __init__(self, lists: Mapping[str, int]) -> None:
        super().__init__()
        self.lists = dict(lists)
        self.pattern: Any = None  # what a decision records of the budget, if it can be said as a pattern
        self.num_blocks = sum(lists.values())
        # A mask that somebody believes in, as signs, and how much at the first, at the last and at this step.
        self.register_buffer("preference", torch.zeros(self.num_blocks), persistent=False)
        self.prior_schedule, self.prior = (0.0, 0.0), 0.0

    def prefer(self, kept: Sequence[int], prior: tuple[float, float]) -> None:
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


class GroupedSampler(BlockSampler):
    """The paper's N:M groups: a categorical over the C(M, N) options of each group of consecutive blocks.

    Gumbel-softmax with a straight-through estimator, one mask per sample: the forward value is the hard
    option argmax(scaling * logits + G), the gradient that of softmax((scaling * logits + G) / tau)
    (TinyFusion, arXiv:2412.01199, section 3.2). The law of the hard masks is softmax(scaling * logits),
    whatever tau is.

    Args:
        lists: length of every block list, in execution order. Groups never straddle two lists.
        pattern: `[keep, of]` for all groups; a list of such pairs, one for each group; or a mapping from
            block list to either. `"2:4"` in quotes is understood.
        tau: Gumbel temperature at the first and at the last step, linear in between.
        scaling: factor on the logits at the first and at the last step, linear in between. A small one at first
            keeps all options in play for longer; the paper's is 100 throughout.
        initial: initial value of all logits.
        estimator: "straight-through", as the paper has it, or "reinmax" (arXiv 2304.08612), its second-order
            correction, which has no use for `tau`.
    """

    def __init__(
        self,
        lists: Mapping[str, int],
        pattern: Pattern = (2, 4),
        tau: tuple[float, float] = (4.0, 0.1),
        scaling: tuple[float, float] = (10.0, 100.0),
        initial: float = 0.02,
        estimator: Literal["straight-through", "reinmax"] = "straight-through",
    ) -> None:
        super().__init__(lists)
        require(min(tau) > 0, "search.tau", tau, "temperatures above 0")
        require(min(scaling) > 0, "search.scaling", scaling, "factors above 0")
        known = estimator in ("straight-through", "reinmax")
        require(known, "search.sampler.estimator", estimator, "straight-through or reinmax")
        self.pattern = parse_pattern(pattern)
        self.groups = split_groups(pattern, lists)
        self.estimator = estimator
        self.tau_schedule, self.scaling_schedule = tau, scaling
        self.tau, self.scaling = tau[0], scaling[0]
        self.logits = nn.ParameterList()
        for g, (keep, of) in enumerate(self.groups):
            options = _options(keep, of)
            self.register_buffer(f"options_{g}", options, persistent=False)
            self.logits.append(nn.Parameter(torch.full((len(options),), initial)))

    def anneal(self, progress: float) -> dict[str, float]:
        self.tau = linear(self.tau_schedule, progress)
        self.scaling = linear(self.scaling_schedule, progress)
        return {"tau": self.tau, "scaling": self.scaling, **super().anneal(progress)}

    def sample(self, num_rows: int, rng: Rng) -> Draw:
        gumbel = rng.gumbel("mask", num_rows, sum(len(logits) for logits in self.logits))
        return self.relax(gumbel.to(self.logits[0].device))

    def relax(self, gumbel: Tensor) -> Draw:
        """The straight-through draw for given (B, sum of K) Gumbel noise, groups side by side."""
        masks, log_prob = [], torch.zeros(len(gumbel), device=gumbel.device)
        # Under autocast the product with the options would round the gate gradients.
        with torch.autocast(gumbel.device.type, enabled=False):
            noise = torch.split(gumbel, [len(logits) for logits in self.logits], dim=1)
            for g, (scores_K, noise_BK) in enumerate(zip(self._scores(), noise, strict=True)):
                scores_BK = scores_K + noise_BK
                chosen_B = scores_BK.argmax(1)
                hard_BK = nn.functional.one_hot(chosen_B, len(scores_K)).to(scores_BK)
                if self.estimator == "reinmax":
                    soft_BK = _reinmax(scores_K, hard_BK)
                else:
                    soft_BK = (scores_BK / self.tau).softmax(1)
                soft_BM = soft_BK @ self._options(g)
                # The difference is exactly zero, so that the forward value is exactly 0 or 1.
                masks.append(hard_BK @ self._options(g) + (soft_BM - soft_BM.detach()))
                log_prob = log_prob + scores_K.log_softmax(0)[chosen_B]
        return Draw(torch.cat(masks, dim=1), log_prob)

    def marginals(self) -> Tensor:
        return torch.cat([p @ self._options(g) for g, p in enumerate(self._probabilities())])

    def mode(self) -> list[int]:
        kept, start = [], 0
        for g, p in enumerate(self._probabilities()):
            option = self._options(g)[int(p.argmax())]
            kept += [start + i for i in option.nonzero().flatten().tolist()]
            start += len(option)
        return kept

    def best(self, count: int) -> list[tuple[int, ...]]:
        found: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
        for scores, members, g in zip(self._scores(), self.choices(), itertools.count(), strict=False):
            # Of what is all but certain a probability would say nothing.
            top = scores.detach().log_softmax(0).topk(min(count, len(scores)))
            options = [
                (value, tuple(members[i] for i in self._options(g)[option].nonzero().flatten().tolist()))
                for value, option in zip(top.values.tolist(), top.indices.tolist(), strict=True)
            ]
            both = [(a + b, (*left, *right)) for a, left in found for b, right in options]
            found = sorted(both, key=lambda item: (-item[0], item[1]))[:count]
        return [kept for _, kept in found]

    def allows(self, kept: Sequence[int]) -> bool:
        counts = [len(set(members).intersection(kept)) for members in self.choices()]
        return counts == [keep for keep, _ in self.groups]

    def entropy(self) -> float:
        return sum(float(torch.special.entr(p).sum()) for p in self._probabilities())

    def confidence(self) -> list[float]:
        return [float(p.max()) for p in self._probabilities()]

    def choices(self) -> list[list[int]]:
        ends = list(itertools.accumulate(of for _, of in self.groups))
        return [list(range(end - of, end)) for end, (_, of) in zip(ends, self.groups, strict=True)]

    @property
    def num_masks(self) -> int:
        return math.prod(math.comb(of, keep) for keep, of in self.groups)

    def _options(self, g: int) -> Tensor:
        return self.get_buffer(f"options_{g}")

    def _scores(self) -> list[Tensor]:
        """(K,) unnormalised log-probabilities of each group's options."""
        return [
            self.scaling * logits + self._options(g) @ self.prior_logits[members]
            for g, (logits, members) in enumerate(zip(self.logits, self.choices(), strict=True))
        ]

    def _probabilities(self) -> list[Tensor]:
        return [scores.detach().softmax(0) for scores in self._scores()]


def _options(keep: int, of: int) -> Tensor:
    """(K, M) 0/1 rows, all ways to keep `keep` of `of` blocks, in lexicographic order."""
    rows = list(itertools.combinations(range(of), keep))
    out = torch.zeros(len(rows), of)
    for row, kept in zip(out, rows, strict=True):
        row[list(kept)] = 1
    return out


def _reinmax(scores_K: Tensor, hard_BK: Tensor) -> Tensor:
    """(B, K) whose gradient is ReinMax's: twice that of a softmax at the mean of draw and law, less half of the law's.

    Liu et al., "Bridging discrete and backpropagation" (arXiv 2304.08612, section 3): a trapezoid in the place of the
    straight-through estimator's Euler step. Only the gradient means anything.
    """
    law = scores_K.detach().softmax(0)

    def linearised(p: Tensor) -> Tensor:
        return p * (scores_K - (p * scores_K).sum(-1, keepdim=True))

    return 2 * linearised((hard_BK + law) / 2) - linearised(law) / 2


def linear(ends: tuple[float, float], progress: float) -> float:
    """The value at a progress from 0 to 1 between two ends."""
    return ends[0] + (ends[1] - ends[0]) * progress
