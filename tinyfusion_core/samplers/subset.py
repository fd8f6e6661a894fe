"""Samplers over all masks that obey the rules, without groups."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from ..errors import require
from ..runtime.seeding import Rng, to_device
from .base import BlockSampler, Draw, linear
from .conditional_poisson import Subsets
from .constraints import Rules, build
from .control_variate import ControlVariate


class SubsetSampler(BlockSampler):
    """The conditional Poisson distribution over all masks that obey the rules; one gate logit per block.

    Args:
        lists: length of every block list, in execution order.
        rules: what every mask obeys: `{keep: 14}`.
    """

    lr_gates = 0.05

    def __init__(self, lists: Mapping[str, int], rules: Rules) -> None:
        super().__init__(lists)
        self.automaton = build(rules, lists)
        self.budget = rules.spending if rules.keep is None else rules.keep
        self.logits = nn.Parameter(torch.zeros(self.num_blocks))

    @override
    def marginals(self) -> Tensor:
        return self._subsets(learning=False).marginals()

    @override
    def mode(self) -> list[int]:
        return self._subsets(learning=False).mode().nonzero().flatten().tolist()

    @override
    def best(self, count: int) -> list[tuple[int, ...]]:
        return [kept for _, kept in self._subsets(learning=False).best(count)]

    @override
    def allows(self, kept: Sequence[int]) -> bool:
        return self.automaton.accepts(kept)

    @override
    def entropy(self) -> float:
        return float(self._subsets(learning=False).entropy())

    @override
    def confidence(self) -> list[float]:
        subsets = self._subsets(learning=False)
        return [float(subsets.log_prob(subsets.mode()[None]).exp())]

    @property
    @override
    def num_masks(self) -> int:
        return self.automaton.num_masks

    def _subsets(self, learning: bool = True) -> Subsets:
        """On the CPU: a hundred tiny steps would be dominated by a GPU's launch times."""
        logits = self.logits if learning else self.logits.detach()
        return Subsets(self.automaton, (logits + self.prior_logits).double().cpu())

    def _masks(self, subsets: Subsets, num_rows: int, rng: Rng) -> Tensor:
        return subsets.sample(rng.uniform("mask", num_rows, self.num_blocks))


class ExactK(SubsetSampler):
    """Any mask that obeys the rules, straight through the exact marginals (SIMPLE, arXiv:2210.01941).

    The forward value is a hard mask, the gradient that of the marginals. It is biased where the loss is not linear in
    the gates; `ScoreFunction` is not.

    Args:
        lists: length of every block list, in execution order.
        rules: what every mask obeys: `{keep: 14}`.
    """

    @override
    def sample(self, num_rows: int, rng: Rng) -> Draw:
        subsets = self._subsets()
        masks, soft = self._masks(subsets, num_rows, rng), subsets.marginals()
        through = (masks + (soft - soft.detach())).to(self.logits)
        return Draw(through, subsets.log_prob(masks).to(self.logits), masks)


@dataclass(frozen=True)
class _Terms:
    """What the surrogate of a draw needs beside its log-probabilities, on the device of the logits."""

    entropy: Tensor | None  # a scalar, differentiable in the logits
    predicted: Tensor | None  # (masks,) losses of the masks by the model of the loss
    mean: Tensor | None  # its mean over the distribution, a scalar, differentiable in the logits


class ScoreFunction(SubsetSampler):
    """Any mask that obeys the rules, by the score function with a leave-one-out baseline.

    The baseline is that of Kool et al. ("Buy 4 REINFORCE samples, get a baseline for free!", 2019); Wijk et al.
    (arXiv:2407.16058) have used it to search subsets.

    Every sample runs under several masks, with identical random draws; a mask's log-probability is weighted by how much
    lower its loss is than the mean of the others. Unbiased, needs no gradient through the blocks, and does not run
    dropped blocks at all. Dropout is off, because it would differ between the masks of a sample.

    Args:
        lists: length of every block list, in execution order.
        rules: what every mask obeys: `{keep: 14}`.
        masks: masks per sample; a step costs that many times the batch.
        entropy: weight of the entropy, in units of the mean difference between the losses of a sample's masks, at the
            first and at the last step, linear in between: how long the search stays open.
        control: whether a model of the loss, fitted as the search goes, takes out what it can explain: less noise.
    """

    neutral: ClassVar[Mapping[str, Any]] = {"control": False}

    def __init__(
        self,
        lists: Mapping[str, int],
        rules: Rules,
        masks: int = 4,
        entropy: tuple[float, float] = (0.3, 0.0),
        control: bool = False,
    ) -> None:
        super().__init__(lists, rules)
        require(2 <= masks <= 1000, "search.sampler.masks", masks, "2 to 1,000")
        require(min(entropy) >= 0, "search.sampler.entropy", entropy, "weights of 0 or more")
        self.masks_per_sample = masks
        self.entropy_schedule, self.entropy_weight = entropy, entropy[0]
        self.control = ControlVariate(self.num_blocks) if control else None
        self.observes = control

    @override
    def anneal(self, progress: float) -> dict[str, float]:
        self.entropy_weight = linear(self.entropy_schedule, progress)
        weight = {"entropy weight": self.entropy_weight} if max(self.entropy_schedule) else {}
        return {**weight, **super().anneal(progress)}

    @override
    def sample(self, num_rows: int, rng: Rng) -> Draw:
        subsets = self._subsets(learning=False).differentiable()
        masks = self._masks(subsets, num_rows, rng)
        log_prob = self._linear(subsets.log_prob(masks), masks - subsets.marginals())
        return Draw(to_device(masks, log_prob.device, log_prob.dtype), log_prob, masks, self._terms(subsets, masks))

    @override
    def surrogate(self, draw: Draw, loss: Tensor) -> Tensor:
        terms: _Terms = draw.of or self._terms(self._subsets(learning=False).differentiable(), draw.mask)
        losses = loss.detach().float()
        advantage = self._advantage(losses)
        unexplained = advantage if terms.predicted is None else self._advantage(losses - terms.predicted)
        total = (unexplained * draw.log_prob).mean()
        if terms.mean is not None:
            total = total + terms.mean
        if terms.entropy is not None:
            total = total - self.entropy_weight * advantage.abs().mean() * terms.entropy
        # The weights see the plain mean; both parts reach disjoint parameters.
        return loss.mean() + total

    def _terms(self, subsets: Subsets, masks: Tensor) -> _Terms:
        """What the surrogate needs of the distribution that (masks, num_blocks) masks are drawn from."""
        entropy = predicted = mean = None
        if self.entropy_weight:
            entropy = self._linear(subsets.entropy(), -subsets.covariance(subsets.theta))
        if self.control is not None:
            predicted = to_device(self.control(masks), self.logits.device, torch.float32)
            mean = self._linear(self.control.mean(subsets), subsets.covariance(self.control.weights))
        return _Terms(entropy, predicted, mean)

    def _linear(self, value: Tensor, gradient: Tensor) -> Tensor:
        """Values with their gradient to the logits, (..., num_blocks), on the device of these.

        What depends on the logits is computed in main memory, gradients too, before a device is busy with the network:
        a graph that reaches into main memory would let it wait there for the backward pass.
        """
        value, gradient = (to_device(t.detach(), self.logits.device, self.logits.dtype) for t in (value, gradient))
        # No matrix product: under autocast it would round the gradient.
        return value + (gradient * (self.logits - self.logits.detach())).sum(-1)

    @override
    def observe(self, masks: Tensor, losses: Tensor) -> None:
        if self.control is not None:
            copies = self.masks_per_sample
            self.control.observe(masks.view(-1, copies, self.num_blocks), losses.view(-1, copies))

    def _advantage(self, losses: Tensor) -> Tensor:
        """How much more each mask loses than the others of its sample do on average: (batch,)."""
        losses = losses.view(-1, self.masks_per_sample)
        others = (losses.sum(1, keepdim=True) - losses) / (self.masks_per_sample - 1)
        return (losses - others).flatten()


class GumbelTopK(BlockSampler):
    """The k blocks with the highest perturbed logits, relaxed by k softmaxes (arXiv:1901.10517): a baseline.

    Its marginals have no closed form: they are estimated from 2,000 fixed draws, which bounds the reported entropy by
    ln 2000. The log-probability is that of the order in which the blocks were drawn.

    Args:
        lists: length of every block list, in execution order.
        keep: how many blocks are kept in total.
        tau: temperature of the relaxation at the first and at the last step, linear in between.
    """

    lr_gates = 0.05
    _NUM_DRAWS = 2000

    def __init__(self, lists: Mapping[str, int], keep: int, tau: tuple[float, float] = (1.0, 0.1)) -> None:
        super().__init__(lists)
        right = type(keep) is int and 1 <= keep <= self.num_blocks
        require(right, "search.sampler.keep", keep, f"1 to {self.num_blocks} blocks, of all lists together")
        require(min(tau) > 0, "search.sampler.tau", tau, "temperatures above 0")
        self.keep = self.budget = keep
        self.tau_schedule, self.tau = tau, tau[0]
        self.logits = nn.Parameter(torch.zeros(self.num_blocks))

    @override
    def anneal(self, progress: float) -> dict[str, float]:
        self.tau = linear(self.tau_schedule, progress)
        return {"tau": self.tau, **super().anneal(progress)}

    @override
    def sample(self, num_rows: int, rng: Rng) -> Draw:
        gumbel = to_device(rng.gumbel("mask", num_rows, self.num_blocks), self.logits.device)
        scores = self.logits + self.prior_logits + gumbel
        order = scores.topk(self.keep, dim=1).indices
        hard = torch.zeros_like(scores).scatter(1, order, 1.0)
        soft, left = torch.zeros_like(scores), scores / self.tau
        for _ in range(self.keep):
            share = left.softmax(1)
            soft = soft + share
            left = left + (1 - share).clamp(min=1e-6).log() / self.tau
        return Draw(hard + (soft - soft.detach()), self._log_prob(order))

    def _log_prob(self, order: Tensor) -> Tensor:
        """Log-probability of drawing these blocks one after the other (Plackett-Luce)."""
        logits = self.logits + self.prior_logits
        chosen = logits[order]
        taken = torch.zeros(len(order), self.num_blocks, device=order.device).scatter(1, order, 1.0).bool()
        rest = logits.expand(len(order), -1).masked_fill(taken, -torch.inf).logsumexp(1, keepdim=True)
        later = chosen.flip(1).logcumsumexp(1).flip(1)
        return (chosen - torch.logaddexp(later, rest)).sum(1)

    @override
    def marginals(self) -> Tensor:
        return self._fixed_draws().mean(0)

    @override
    def mode(self) -> list[int]:
        return sorted((self.logits.detach() + self.prior_logits).topk(self.keep).indices.tolist())

    @override
    def best(self, count: int) -> list[tuple[int, ...]]:
        masks, counts = torch.unique(self._fixed_draws(), dim=0, return_counts=True)
        order = counts.argsort(descending=True, stable=True)
        found = [tuple(masks[i].nonzero().flatten().tolist()) for i in order.tolist()]
        # Masks that were never drawn follow in the order of their logits' sums.
        logits = (self.logits.detach() + self.prior_logits).double().cpu()
        unseen = Subsets(build(Rules(keep=self.keep), self.lists), logits).best(count)
        ranked = dict.fromkeys([tuple(self.mode()), *found, *(kept for _, kept in unseen)])
        return list(ranked)[:count]

    @override
    def allows(self, kept: Sequence[int]) -> bool:
        return len(kept) == self.keep

    @override
    def entropy(self) -> float:
        counts = torch.unique(self._fixed_draws(), dim=0, return_counts=True)[1]
        return float(torch.special.entr(counts / counts.sum()).sum())

    @override
    def confidence(self) -> list[float]:
        mode = torch.zeros(self.num_blocks)
        mode[self.mode()] = 1
        return [float((self._fixed_draws() == mode).all(1).float().mean())]

    @property
    @override
    def num_masks(self) -> int:
        return math.comb(self.num_blocks, self.keep)

    def _fixed_draws(self) -> Tensor:
        noise = Rng(0, "report").gumbel("mask", self._NUM_DRAWS, self.num_blocks)
        order = ((self.logits.detach() + self.prior_logits).cpu() + noise).topk(self.keep, dim=1).indices
        return torch.zeros_like(noise).scatter(1, order, 1.0)
