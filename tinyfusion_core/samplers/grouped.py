"""The sampler of the TinyFusion paper: one option for every group of consecutive blocks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from ..errors import UserError, require
from ..runtime.seeding import Rng, to_device
from .base import BlockSampler, Draw, linear
from .patterns import Pattern, parse_pattern, split_groups


class GroupedSampler(BlockSampler):
    """N:M groups as in the paper: a categorical over the C(M, N) options of each group of consecutive blocks.

    Gumbel-softmax with a straight-through estimator, one mask per sample: the forward value is the hard
    option argmax(scaling * logits + G), the gradient that of softmax((scaling * logits + G) / tau)
    (TinyFusion, arXiv:2412.01199, section 3.2). The hard masks follow softmax(scaling * logits), whatever tau is.

    Args:
        lists: length of every block list, in execution order. Groups never cross from one list into the next.
        pattern: `[keep, of]` for all groups; a list of such pairs, one for each group; or a mapping from
            block list to either. `2:4` is read as the pair `[2, 4]`.
        tau: Gumbel temperature at the first and at the last step, linear in between.
        scaling: factor on the logits at the first and at the last step, linear in between. A small first value
            keeps all options open for longer; the paper uses 100 throughout.
        initial: initial value of all logits.
        estimator: "straight-through", as in the paper, or "reinmax" (arXiv:2304.08612), its second-order
            correction, which ignores `tau`.
        protect: blocks that must be kept, numbered over all lists.
        remove: blocks that must be removed.
    """

    def __init__(
        self,
        lists: Mapping[str, int],
        pattern: Pattern = (2, 4),
        tau: tuple[float, float] = (4.0, 0.1),
        scaling: tuple[float, float] = (10.0, 100.0),
        initial: float = 0.02,
        estimator: Literal["straight-through", "reinmax"] = "straight-through",
        protect: Sequence[int] = (),
        remove: Sequence[int] = (),
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
        stay = {**dict.fromkeys(remove, 0.0), **dict.fromkeys(protect, 1.0)}
        for g, ((keep, of), members) in enumerate(zip(self.groups, self.choices(), strict=True)):
            options = _options(keep, of)
            for i, block in enumerate(members):
                if block in stay:
                    options = options[options[:, i] == stay[block]]
            if not len(options):
                fixed = ", ".join(str(block) for block in members if block in stay)
                raise UserError(
                    f"search.pattern: group {g + 1} (blocks {members[0]} to {members[-1]}) cannot keep {keep} of {of}: "
                    f"too many of its blocks are protected or removed ({fixed})"
                )
            self.register_buffer(f"options_{g}", options, persistent=False)
            self.logits.append(nn.Parameter(torch.full((len(options),), initial)))

    @override
    def anneal(self, progress: float) -> dict[str, float]:
        self.tau = linear(self.tau_schedule, progress)
        self.scaling = linear(self.scaling_schedule, progress)
        return {"tau": self.tau, "scaling": self.scaling, **super().anneal(progress)}

    @override
    def sample(self, num_rows: int, rng: Rng) -> Draw:
        gumbel = rng.gumbel("mask", num_rows, sum(len(logits) for logits in self.logits))
        return self.relax(to_device(gumbel, self.logits[0].device))

    def relax(self, gumbel: Tensor) -> Draw:
        """Compute the straight-through draw for given Gumbel noise.

        Args:
            gumbel: (batch, options of all groups) noise, groups side by side.

        Returns:
            Masks (batch, num_blocks) and log-probabilities (batch,).
        """
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

    @override
    def marginals(self) -> Tensor:
        return torch.cat([p @ self._options(g) for g, p in enumerate(self._probabilities())])

    @override
    def mode(self) -> list[int]:
        return list(self.best(1)[0])

    @override
    def best(self, count: int) -> list[tuple[int, ...]]:
        found: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
        for scores, members, g in zip(self._scores(), self.choices(), itertools.count(), strict=False):
            # Of what is all but certain a probability would say nothing.
            top = scores.detach().log_softmax(0).sort(descending=True, stable=True)
            options = [
                (value, tuple(members[i] for i in self._options(g)[option].nonzero().flatten().tolist()))
                for value, option in zip(top.values[:count].tolist(), top.indices[:count].tolist(), strict=True)
            ]
            both = [(a + b, (*left, *right)) for a, left in found for b, right in options]
            found = sorted(both, key=lambda item: -item[0])[:count]
        return [kept for _, kept in found]

    @override
    def allows(self, kept: Sequence[int]) -> bool:
        for g, members in enumerate(self.choices()):
            mask = torch.tensor([float(block in kept) for block in members])
            if not (self._options(g).cpu() == mask).all(1).any():
                return False
        return set(kept) <= set(range(self.num_blocks))

    @override
    def entropy(self) -> float:
        return sum(float(torch.special.entr(p).sum()) for p in self._probabilities())

    @override
    def confidence(self) -> list[float]:
        return [float(p.max()) for p in self._probabilities()]

    @override
    def choices(self) -> list[list[int]]:
        ends = list(itertools.accumulate(of for _, of in self.groups))
        return [list(range(end - of, end)) for end, (_, of) in zip(ends, self.groups, strict=True)]

    @property
    @override
    def num_masks(self) -> int:
        return math.prod(len(logits) for logits in self.logits)

    def _options(self, g: int) -> Tensor:
        return self.get_buffer(f"options_{g}")

    def _scores(self) -> list[Tensor]:
        """(options,) unnormalised log-probabilities for each group."""
        prior = torch.split(self.prior_logits, [of for _, of in self.groups])
        return [
            self.scaling * logits + self._options(g) @ prior_M
            for g, (logits, prior_M) in enumerate(zip(self.logits, prior, strict=True))
        ]

    def _probabilities(self) -> list[Tensor]:
        return [scores.detach().softmax(0) for scores in self._scores()]


def _options(keep: int, of: int) -> Tensor:
    """(options, M) rows of zeros and ones: all ways to keep `keep` of `of` blocks, in lexicographic order."""
    rows = list(itertools.combinations(range(of), keep))
    out = torch.zeros(len(rows), of)
    for row, kept in zip(out, rows, strict=True):
        row[list(kept)] = 1
    return out


def _reinmax(scores_K: Tensor, hard_BK: Tensor) -> Tensor:
    """(batch, options) values whose gradient is that of ReinMax (Liu et al., arXiv:2304.08612, section 3).

    Twice the gradient of a softmax at the mean of draw and law, minus half of that at the law: a trapezoid in place of
    the Euler step of the straight-through estimator. Only the gradient is meaningful.
    """
    law = scores_K.detach().softmax(0)

    def linearised(p: Tensor) -> Tensor:
        return p * (scores_K - (p * scores_K).sum(-1, keepdim=True))

    return 2 * linearised((hard_BK + law) / 2) - linearised(law) / 2
