"""Checks of a sampler: what it reports about its distribution agrees with its draws."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import UserError
from ...runtime.seeding import generator
from ...samplers.base import BlockSampler, Draw
from ...samplers.constraints import Rules
from ..assertions import expect, global_states, seed_everything
from ..small_network import LISTS, NUM_KEPT
from ..subject import fixed_rng, made

MOST_BLOCKS = 12
"""With more blocks there are too many masks to enumerate."""

NUM_DRAWS = 2000
FREQUENCY = 0.06
"""Tolerance of a frequency among so many draws: at least five standard deviations."""


@dataclass(frozen=True)
class SamplerSubject:
    """A sampler to check.

    Args:
        sampler: an instance over a few blocks. The checks use copies with varied logits.
        num_kept: how many blocks its masks should keep; None if unknown.
    """

    sampler: BlockSampler
    num_kept: int | None

    @classmethod
    def of(cls, thing: Any) -> SamplerSubject:
        """Return the subject; of a class, `tiny(lists)`, or an instance that keeps five blocks of two lists of four."""
        sampler, told = made(thing, LISTS, keep=NUM_KEPT, rules=Rules(keep=NUM_KEPT))
        if sampler.num_blocks > MOST_BLOCKS:
            raise UserError(
                f"{type(sampler).__name__} is over {sampler.num_blocks} blocks; check one over {MOST_BLOCKS}"
            )
        return cls(sampler, NUM_KEPT if told else None)

    @property
    def name(self) -> str:
        """Name of its class, for messages."""
        return type(self.sampler).__name__

    def learned(self) -> BlockSampler:
        """Return a copy that prefers some masks to others."""
        sampler, source = copy.deepcopy(self.sampler), generator("conformance", "logits")
        with torch.no_grad():
            for p in sampler.parameters():
                p.add_(torch.randn(p.shape, generator=source).to(p) / 5)
        return sampler

    def obeys(self, kept: list[int]) -> bool:
        """Return whether a mask is within every known budget of the sampler."""
        budget = self.sampler.budget if self.num_kept is None else self.num_kept
        right = True
        if isinstance(budget, int):
            right = len(kept) == budget
        elif isinstance(budget, Mapping):
            names = [name for name, depth in self.sampler.lists.items() for _ in range(depth)]
            right = {name: [names[i] for i in kept].count(name) for name in budget} == dict(budget)
        return right and self.sampler.allows(kept)


def check_masks(subject: SamplerSubject) -> None:
    """Every drawn mask consists of zeros and ones and is within the budget; `allows` agrees with `num_masks`."""
    sampler = subject.learned()
    mask = _draw(sampler, 200).mask
    expect(bool(((mask == 0) | (mask == 1)).all()), f"{subject.name}.sample draws other numbers than 0 and 1")
    expect(mask.shape == (200, sampler.num_blocks), f"{subject.name}.sample(200, rng) has the shape {list(mask.shape)}")
    for kept in {_kept(row) for row in mask}:
        expect(subject.obeys(list(kept)), f"{subject.name} draws the mask {list(kept)}, which breaks its budget")
    every = itertools.product((False, True), repeat=sampler.num_blocks)
    allowed = sum(sampler.allows([i for i, stays in enumerate(stay) if stays]) for stay in every)
    expect(allowed == sampler.num_masks, f"{subject.name}.num_masks is {sampler.num_masks}, allows allows {allowed}")


def check_rows(subject: SamplerSubject) -> None:
    """Row i of a draw depends only on stream i, whatever the batch and the global generators."""
    sampler, sizes = subject.learned(), [2 * subject.sampler.masks_per_sample, 3 * subject.sampler.masks_per_sample]
    seed_everything(1)
    states = global_states()
    whole = _draw(sampler, sum(sizes))
    expect(states == global_states(), f"{subject.name}.sample draws from a global generator; draw from `rng`")
    seed_everything(2)
    parts = [sampler.sample(sizes[0], fixed_rng()), sampler.sample(sizes[1], fixed_rng(first=sizes[0]))]
    same = torch.equal(whole.mask, torch.cat([part.mask for part in parts]))
    expect(same, f"{subject.name}.sample draws a row otherwise in another batch; draw by row, as `rng.uniform` does")
    log_prob = torch.cat([part.log_prob for part in parts])
    alike = torch.allclose(whole.log_prob, log_prob, rtol=1e-5, atol=1e-5)
    expect(alike, f"{subject.name}.sample: the log_prob of a row depends on the others of its batch")


def check_marginals(subject: SamplerSubject) -> None:
    """`marginals` are probabilities that sum to the number of kept blocks and match the frequencies of draws."""
    sampler = subject.learned()
    marginals, name = sampler.marginals().detach().cpu().double(), f"{subject.name}.marginals"
    expect(marginals.shape == (sampler.num_blocks,), f"{name} has the shape {list(marginals.shape)}")
    expect(
        bool(((marginals >= -1e-6) & (marginals <= 1 + 1e-6)).all()), f"{name} is no probability: {marginals.tolist()}"
    )
    masks = _draw(sampler, NUM_DRAWS).mask.detach().cpu().double()
    sizes = masks.sum(1)
    if bool((sizes == sizes[0]).all()):
        total = float(marginals.sum())
        expect(abs(total - float(sizes[0])) < 1e-3, f"{name} sums to {total:.4g}, {int(sizes[0])} blocks are kept")
    off = (masks.mean(0) - marginals).abs()
    i = int(off.argmax())
    says, drawn = float(marginals[i]), float(masks[:, i].mean())
    expect(abs(says - drawn) <= FREQUENCY, f"{name} says {says:.3f} of block {i}, which {drawn:.3f} of the draws keep")


def check_mode(subject: SamplerSubject) -> None:
    """`mode` is within the budget and the first of `best`, which lists distinct masks, as many as there are."""
    sampler = subject.learned()
    mode, best = tuple(sampler.mode()), sampler.best(sampler.num_masks + 1)
    expect(subject.obeys(list(mode)), f"{subject.name}.mode keeps {list(mode)}, which breaks its budget")
    first = [sampler.best(1)[0], best[0]]
    expect(
        first == [mode, mode],
        f"{subject.name}.mode keeps {list(mode)}, best(1) {list(first[0])}, best(n) {list(first[1])}",
    )
    count = f"{subject.name}.best gives {len(set(best))} different masks of {sampler.num_masks} in {len(best)}"
    expect(len(best) == len(set(best)) == sampler.num_masks, count)
    broken = [list(kept) for kept in best if not subject.obeys(list(kept))]
    expect(not broken, f"{subject.name}.best gives {broken[:1]}, which breaks the budget")


def check_log_prob(subject: SamplerSubject) -> None:
    """Log-probabilities are finite, one per draw; over all distinct masks the probabilities sum to at most 1."""
    draw = _draw(subject.learned(), NUM_DRAWS)
    log_prob, name = draw.log_prob.detach(), f"{subject.name}.sample: log_prob"
    expect(log_prob.shape == (NUM_DRAWS,), f"{name} has the shape {list(log_prob.shape)} for {NUM_DRAWS} draws")
    expect(bool(log_prob.isfinite().all()), f"{name} is not finite")
    probability = {_kept(row): math.exp(value) for row, value in zip(draw.mask, log_prob.tolist(), strict=True)}
    total = sum(probability.values())
    expect(total <= 1 + 1e-3, f"{name} makes the probabilities of {len(probability)} masks sum to {total:.3g}")


def check_entropy(subject: SamplerSubject) -> None:
    """The entropy in nats is between 0 and that of the uniform distribution."""
    sampler = subject.learned()
    entropy, most = sampler.entropy(), math.log(sampler.num_masks)
    expect(-1e-6 <= entropy <= most + 1e-3, f"{subject.name}.entropy is {entropy:.4g}, of {sampler.num_masks} masks")


def check_confidence(subject: SamplerSubject) -> None:
    """`confidence` is a probability for each independent choice; the choices, if any, partition all blocks."""
    sampler = subject.learned()
    confidence, choices = sampler.confidence(), sampler.choices()
    expect(all(0 <= p <= 1 + 1e-6 for p in confidence), f"{subject.name}.confidence is no probability: {confidence}")
    wanted = max(1, len(choices))
    expect(len(confidence) == wanted, f"{subject.name}.confidence has {len(confidence)} numbers for {wanted} choice(s)")
    covered = sorted(itertools.chain(*choices)) if choices else list(range(sampler.num_blocks))
    expect(covered == list(range(sampler.num_blocks)), f"{subject.name}.choices are about the blocks {covered}")


def check_gradient(subject: SamplerSubject) -> None:
    """The surrogate has a finite, non-zero gradient to the logits."""
    sampler = subject.learned()
    draw = _draw(sampler, 16 * sampler.masks_per_sample)
    losses = draw.mask @ torch.linspace(1, 2, sampler.num_blocks).to(draw.mask)
    surrogate = sampler.surrogate(draw, losses)
    expect(surrogate.requires_grad, f"{subject.name}.surrogate has no gradient to the logits")
    surrogate.backward()  # type: ignore[no-untyped-call]
    gradients = [p.grad for p in sampler.parameters() if p.grad is not None]
    expect(
        all(bool(g.isfinite().all()) for g in gradients), f"{subject.name}.surrogate has a gradient that is not finite"
    )
    expect(any(bool(g.any()) for g in gradients), f"{subject.name}.surrogate has no gradient to the logits")


def check_anneal(subject: SamplerSubject) -> None:
    """Annealed to the last step it still draws masks within the budget; schedules depend only on the progress."""
    sampler = subject.learned()
    values = sampler.anneal(0.0)
    first = _draw(sampler, 20)
    values |= {f"{name} at the end": value for name, value in sampler.anneal(1.0).items()}
    expect(all(map(math.isfinite, values.values())), f"{subject.name}.anneal gives {values}")
    broken = [_kept(row) for row in _draw(sampler, 200).mask if not subject.obeys(list(_kept(row)))]
    expect(not broken, f"{subject.name} annealed to 1 draws {broken[:1]}, which breaks its budget")
    expect(
        bool(sampler.marginals().isfinite().all()), f"{subject.name} annealed to 1 has marginals that are not finite"
    )
    sampler.anneal(0.0)
    again = _draw(sampler, 20)
    expect(
        torch.equal(first.mask, again.mask) and torch.equal(first.log_prob, again.log_prob),
        f"{subject.name}.anneal(0) does not undo anneal(1); set what it moves from the progress alone",
    )


SAMPLER_CHECKS = (
    check_masks,
    check_rows,
    check_marginals,
    check_mode,
    check_log_prob,
    check_entropy,
    check_confidence,
    check_gradient,
    check_anneal,
)


def _draw(sampler: BlockSampler, num_rows: int) -> Draw:
    return sampler.sample(num_rows, fixed_rng())


def _kept(row: Tensor) -> tuple[int, ...]:
    return tuple(row.detach().nonzero().flatten().tolist())
