"""The exact conditional Poisson distribution over the masks that obey some rules.

Every block is kept with odds exp(theta), independently, given that the mask obeys the rules. With "keep k of n" this
is the k-subset distribution of Chen, Dempster and Liu ("Weighted finite population sampling to maximize entropy",
Biometrika 1994), used by SIMPLE (arXiv:2210.01941) and by Pervez et al. (ICLR 2023). Everything is computed by
dynamic programming over the automaton of the rules, in log-space and float64: fast compared with a training step, and
exact for logits of any size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from .automaton import Automaton


@dataclass(frozen=True)
class Subsets:
    """The distribution with log-odds theta over the masks of an automaton.

    Methods share intermediate results, so all their outputs must go through one backward pass.

    Args:
        automaton: the masks.
        theta: (num_blocks,) log-odds, float64 on the CPU; everything is differentiable in them.
    """

    automaton: Automaton
    theta: Tensor

    def log_partition(self) -> Tensor:
        """Return the log of the sum of exp(theta . mask) over all masks, a scalar."""
        return self._sums[0][0]

    def marginals(self) -> Tensor:
        """Return the probability that each block is kept, (num_blocks,): the gradient of the log-partition."""
        return self._marginals

    @cached_property
    def _marginals(self) -> Tensor:
        with torch.enable_grad():
            known = self if self.theta.requires_grad else self.differentiable()
            (out,) = torch.autograd.grad(known.log_partition(), known.theta, create_graph=self.theta.requires_grad)
        return out

    def differentiable(self) -> Subsets:
        """Return the same distribution, of which gradients to the log-odds are taken here."""
        return Subsets(self.automaton, self.theta.detach().requires_grad_())

    def log_prob(self, masks: Tensor) -> Tensor:
        """Compute log-probabilities in nats.

        Args:
            masks: (masks, num_blocks) zeros and ones; each mask must obey the rules.

        Returns:
            (masks,)
        """
        return masks.to(self.theta) @ self.theta - self.log_partition()

    def entropy(self) -> Tensor:
        """Return the entropy in nats, a scalar: log-partition minus marginals . theta."""
        return self.log_partition() - self.marginals() @ self.theta

    def covariance(self, values: Tensor) -> Tensor:
        """Return the covariance of every block with what a mask is worth: the gradient of marginals . values.

        Args:
            values: (num_blocks,) what each kept block is worth, float64.

        Returns:
            (num_blocks,)
        """
        with torch.enable_grad():
            known = self if self.theta.requires_grad else self.differentiable()
            (out,) = torch.autograd.grad(known.marginals(), known.theta, values, retain_graph=True)
        return out

    def divergence(self, other: Subsets) -> Tensor:
        """Return KL(self || other) in nats, a scalar; both over the same automaton."""
        mean = self.marginals() @ (self.theta - other.theta)
        return mean - self.log_partition() + other.log_partition()

    def sample(self, uniform: Tensor) -> Tensor:
        """Draw masks; each row depends on its own random numbers only.

        Args:
            uniform: (masks, num_blocks) numbers in [0, 1).

        Returns:
            (masks, num_blocks) zeros and ones, float64.
        """
        return self._walk(len(uniform), self._sums, lambda i, odds: uniform[:, i] < odds.sigmoid())

    def mode(self) -> Tensor:
        """Return the most probable mask, (num_blocks,); among equal ones that with the earlier blocks."""
        return self._walk(1, self._values(torch.maximum), lambda i, odds: odds >= 0)[0]

    def best(self, count: int) -> list[tuple[float, tuple[int, ...]]]:
        """Return the most probable masks, best first, as (log-probability in nats, kept blocks)."""
        values: list[list[tuple[float, tuple[int, ...]]]] = [[(0.0, ())] for _ in range(self.automaton.num_ends)]
        theta = self.theta.detach().tolist()
        for i in reversed(range(self.automaton.num_blocks)):
            tables = self.automaton.drop[i].tolist(), self.automaton.keep[i].tolist()
            values.append([])  # forbidden
            before = []
            for drop, keep in zip(*tables, strict=True):
                both = values[drop] + [(value + theta[i], (i, *rest)) for value, rest in values[keep]]
                before.append(sorted(both, key=_order)[:count])
            values = before
        total = float(self.log_partition().detach())
        return [(value - total, kept) for value, kept in values[0]]

    @cached_property
    def _sums(self) -> list[Tensor]:
        """For every block and state before it: the log of the sum of exp(theta . mask) over all continuations."""
        return self._values(_log_sum)

    def _values(self, combine: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        """For every block and state before it: `combine` over all continuations; the last entry is zeros."""
        values = [self.theta.new_zeros(self.automaton.num_ends)]
        for i in reversed(range(self.automaton.num_blocks)):
            drop, keep = self._ways(i, values[-1])
            # No infinity may enter what is differentiated twice: where one way is forbidden, only the other counts.
            free = drop.isfinite() & keep.isfinite()
            combined = combine(torch.where(free, drop, 0), torch.where(free, keep, 0))
            values.append(torch.where(free, combined, torch.where(drop.isfinite(), drop, keep)))
        return values[::-1]

    def _ways(self, i: int, after: Tensor) -> tuple[Tensor, Tensor]:
        """For every state before block i: the value of dropping it and of keeping it, -inf where forbidden."""
        after = torch.cat([after, after.new_tensor([-torch.inf])])
        return after[self.automaton.drop[i]], self.theta[i] + after[self.automaton.keep[i]]

    def _walk(
        self,
        num_rows: int,
        values: Sequence[Tensor],
        decide: Callable[[int, Tensor], Tensor],
    ) -> Tensor:
        """Walk through the automaton, deciding by the log-odds (masks,) of keeping each block given those before it.

        `values` holds, for every block and state before it, the value of all continuations.
        """
        with torch.no_grad():
            state = torch.zeros(num_rows, dtype=torch.long)
            masks = self.theta.new_zeros(num_rows, self.automaton.num_blocks)
            for i in range(self.automaton.num_blocks):
                drop, keep = self._ways(i, values[i + 1])
                kept = decide(i, (keep - drop)[state])
                state = torch.where(kept, self.automaton.keep[i][state], self.automaton.drop[i][state])
                masks[:, i] = kept
        return masks


def _log_sum(a: Tensor, b: Tensor) -> Tensor:
    """log(exp(a) + exp(b)), twice differentiable for any finite values."""
    return a + nn.functional.softplus(b - a, threshold=50)


def _order(item: tuple[float, tuple[int, ...]]) -> tuple[float, tuple[float, ...]]:
    """Best first; among equal masks the one with the earlier blocks, then the one with more blocks."""
    value, kept = item
    return -value, (*kept, math.inf)
