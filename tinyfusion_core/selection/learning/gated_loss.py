"""The objective of a search: the loss of the network under sampled masks."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from ...errors import UserError, worded
from ...protocols.backbone import Batch
from ...protocols.loss import LossAdapter
from ...pruning.gating import Gates
from ...runtime.distributed import all_gather_object
from ...runtime.seeding import Rng
from ...samplers.base import BlockSampler
from ...training.objective import Objective

LONG, HARDLY = 100, 1e-3
"""Steps after which a search should have moved the probability of some block by so much."""


@dataclass(frozen=True)
class Learned:
    """The result of a search, before the decision.

    Attributes:
        sampler: the distribution, with the averaged gate logits.
        num_steps: steps that it took.
        evaluations: samples that the network was run on, including those of its start.
        weights: what the update has made of the weights, of any shape, by name, if that is kept.
    """

    sampler: BlockSampler
    num_steps: int
    evaluations: int
    weights: Mapping[str, Tensor] = field(default_factory=dict)


def value_weights(mask: Tensor, share: float, rng: Rng) -> Tensor | None:
    """Return weights for the values of dropped blocks, of which only a share is computed.

    Args:
        mask: (batch, num_blocks) zeros and ones.
        share: the fraction to compute.
        rng: random streams of this batch.

    Returns:
        (batch, num_blocks) weights in main memory, 0 or 1 / share; None if all values are needed, or none.
    """
    if share == 1 or not mask.requires_grad:
        return None
    return (rng.uniform("dropped values", *mask.shape) < share).to(mask.dtype) / share


def search_mode(model: nn.Module, random: bool) -> None:
    """Put a network in the mode that it is searched in.

    Batch norms take their running statistics: a block sees only the samples that keep it, one perhaps.

    Args:
        model: the network.
        random: whether it may draw at random, by dropout, stochastic depth, jitter of a router and whatever else it
            draws in training mode only; not where masks are to be compared on identical draws.
    """
    model.train(random)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


class GatedLoss(Objective):
    """Sample masks, run the gated network, return the sampler's surrogate loss.

    Args:
        model: the gated network, in training mode.
        loss: the objective.
        samplers: the trained distribution, and its average, which decides.
        gates: gates of the network's blocks.
        steps: steps of the search.
        warmup: fraction of them in which the gates do not learn.
        dropped_values: see `Search`.
        confident: the confidence at which the search stops; None: never.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: LossAdapter,
        samplers: tuple[BlockSampler, BlockSampler],
        gates: Gates,
        *,
        steps: int,
        warmup: float,
        dropped_values: float,
        confident: float | None,
    ) -> None:
        super().__init__()
        self.sampler, averaged = samplers
        self.model, self.steps, self.warmup = model, steps, warmup
        self.dropped_values, self.confident = dropped_values, confident
        self.blocks = [model.get_submodule(path) for path in gates.blocks]
        self.gates = list(self.sampler.parameters())
        # The average is not trained: in a tuple it is not registered, so that DDP does not wait for its gradients.
        self.unregistered = (loss, averaged, gates)
        self.num_steps = 0
        self.seen: list[tuple[Tensor, Tensor]] = []  # masks and losses of this step's passes
        self.temperatures: dict[str, float] = {}

    @override
    def forward(self, inputs: Batch, rng: Rng) -> tuple[Tensor, Tensor]:
        loss, _, gates = self.unregistered
        copies = self.sampler.masks_per_sample
        if copies > 1:  # on identical draws
            inputs = {name: value.repeat_interleave(copies, 0) for name, value in inputs.items()}
            rng = replace(rng, first=rng.first * copies)
        num_rows = len(next(iter(inputs.values())))
        draw = self.sampler.sample(num_rows, rng)
        mask = draw.mask if self.learning else draw.mask.detach()
        gates.set(mask, value_weights(mask, self.dropped_values, rng), draw.host)
        losses = loss.losses(self.model, inputs)
        if self.sampler.observes:
            # On their way while the step goes on, which ends with reading its report: then they are there.
            masks = draw.mask.detach().to("cpu", non_blocking=True) if draw.host is None else draw.host
            self.seen.append((masks, losses.detach().to("cpu", non_blocking=True)))
        if self.learning:
            return self.sampler.surrogate(draw, losses), losses.detach()
        # A zero gradient, never none: distributed processes wait for it.
        return losses.mean() + 0 * (draw.mask.sum() + draw.log_prob.sum()), losses.detach()

    @override
    def before_step(self, progress: float) -> None:
        self.num_steps = round(progress * (self.steps - 1)) + 1
        self.learning = progress >= self.warmup
        learned = max(0.0, (progress - self.warmup) / (1 - self.warmup))
        self.temperatures = self.sampler.anneal(learned)
        averaged = self.unregistered[1]
        averaged.anneal(learned)
        averaged.prior = averaged.prior_schedule[1]  # a start that fades has no say in the decision

    @override
    def after_step(self, finite: bool) -> None:
        if self.sampler.observes:
            passes, self.seen = [one for some in all_gather_object(self.seen) for one in some], []
            if finite:
                self.sampler.observe(*map(torch.cat, zip(*passes, strict=True)))

    @override
    def finished(self) -> bool:
        if self.confident is None or not self.learning:
            return False
        return min(self.unregistered[1].confidence()) >= self.confident

    @override
    def metrics(self) -> dict[str, Any]:
        averaged = self.unregistered[1]
        return {
            "decision": averaged.mode(),
            "marginals": [round(p, 5) for p in averaged.marginals().tolist()],
            "confidence": round(min(averaged.confidence()), 5),
            "entropy": round(averaged.entropy(), 5),
            **self.temperatures,
        }


def check_learned(before: BlockSampler, after: BlockSampler, steps: int) -> None:
    """Check that a search has changed its distribution over masks; warn if a long one hardly has.

    Args:
        before: the distribution at the beginning.
        after: the one at the end.
        steps: how many steps it took.

    Raises:
        UserError: after a single step every block is as likely to be kept as at the beginning.
    """
    moved = float((after.marginals() - before.marginals()).abs().max())
    if before.num_masks == 1:
        return
    if steps == 1 and moved < 1e-4:
        raise UserError(
            "search: after 1 step every block is as likely to be kept as at the beginning; set more search.steps"
        )
    # Noise alone moves the gates of a usual learning rate by more, unless their gradient is zero; short searches are
    # tests of a recipe.
    if steps >= LONG and moved < HARDLY:
        warnings.warn(
            worded(
                f"search: after {steps:,} steps no block is kept more or less often than at the beginning by more than "
                f"{moved:.1e}: its choice means little. Set a higher search.lr_gates or more "
                "search.steps, unless no block matters"
            ),
            stacklevel=2,
        )
