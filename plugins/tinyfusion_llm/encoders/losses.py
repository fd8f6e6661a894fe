"""Losses of encoders: masked tokens, and embeddings of texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from tinyfusion_core.errors import require
from tinyfusion_core.protocols.backbone import Batch
from tinyfusion_core.protocols.loss import LossAdapter
from tinyfusion_core.runtime.seeding import Rng, to_device
from tinyfusion_llm.encoders.attention import attending
from tinyfusion_llm.hidden import IGNORED, Hidden, TokenLoss, run_to_head

Pooling = Literal["mean", "cls"]
_MASKED, _RANDOM = 0.8, 0.1
"""Of the chosen tokens the shares that become the mask token and a random one; the others stay (arXiv:1810.04805)."""


@dataclass(frozen=True, kw_only=True)
class MaskedToken(TokenLoss):
    """Cross-entropy of masked tokens in nats, averaged over those of a sample, as BERT is trained (arXiv:1810.04805).

    Of the tokens that count, a fixed share is chosen at random. Of these 80 % become the mask token, 10 % a random
    token, and 10 % stay. The distance for distillation is `divergence` of the distributions of teacher and student at
    a temperature, times its square, averaged over the chosen tokens.

    Args:
        fraction: share of the tokens that are chosen, at least one of each sample.
    """

    fraction: float = 0.15

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.fraction <= 1, "loss.fraction", self.fraction, "a share above 0, at most 1")

    @override
    def prepare(self, batch: Batch, rng: Rng) -> dict[str, Tensor]:
        """Choose tokens and mask them.

        Args:
            batch: `tokens` and `attention` (batch, tokens); `labels` (batch, tokens), the token itself where it may be
                chosen, else -100; `mask_token` (batch,), its id, and `last_token` (batch,), the largest one.
            rng: streams "masked tokens", "replaced tokens" and "random tokens".

        Returns:
            `tokens`, of which some are masked, and `attention`, both (batch, tokens); and for the K tokens that are
            chosen at most `places` and `targets` (batch, K), the label where fewer are chosen -100.
        """
        tokens, labels = batch["tokens"], batch["labels"]
        device, (num_rows, num_tokens) = tokens.device, tokens.shape
        most = self._number(torch.tensor(num_tokens)).item()
        counted = labels != IGNORED
        order = to_device(rng.uniform("masked tokens", num_rows, num_tokens), device).masked_fill(~counted, 1.0)
        places = order.argsort(dim=1)[:, :most]
        number = self._number(counted.sum(1)).minimum(counted.sum(1))
        chosen = torch.arange(places.shape[1], device=device) < number[:, None]
        plain = tokens.gather(1, places)
        share = to_device(rng.uniform("replaced tokens", *places.shape), device)
        random = to_device(rng.uniform("random tokens", *places.shape), device) * (1 + batch["last_token"][:, None])
        other = random.long().where(share < _MASKED + _RANDOM, plain)
        other = batch["mask_token"][:, None].to(plain).where(share < _MASKED, other).where(chosen, plain)
        return {
            "tokens": tokens.scatter(1, places, other),
            "attention": batch["attention"],
            "places": places,
            "targets": labels.gather(1, places).masked_fill(~chosen, IGNORED),
        }

    @override
    def prepare_clean(self, batch: Batch, rng: Rng) -> dict[str, Tensor]:
        """Return the tokens as they are, (batch, tokens); the first of each stand for those that are chosen."""
        tokens = batch["tokens"]
        places = torch.arange(int(self._number(torch.tensor(tokens.shape[1]))), device=tokens.device)
        places = places.expand(len(tokens), -1)
        targets = batch["labels"].gather(1, places)
        return {"tokens": tokens, "attention": batch["attention"], "places": places, "targets": targets}

    @override
    def predict(self, model: nn.Module, inputs: Batch) -> Hidden:
        """Return the final hidden states of the chosen tokens, (batch, K, channels); the head is run for one token."""
        tokens, places = inputs["tokens"], inputs["places"]
        found = attending(inputs["attention"], lambda mask: run_to_head(model, tokens, {"attention_mask": mask}, {}))
        at = places[..., None].expand(-1, -1, found.states.shape[-1])
        return found._replace(states=found.states.gather(1, at))

    @override
    def trivial(self, prediction: Hidden, inputs: Batch) -> Hidden:
        """Return a prediction that finds all tokens equally likely: of hidden states (batch, K, channels)."""
        return prediction._replace(head=lambda states: 0 * prediction.head(states))

    def _number(self, counted: Tensor) -> Tensor:
        """How many tokens are chosen of so many."""
        return (0.5 + self.fraction * counted.double()).floor().clamp(min=1).long()


@dataclass(frozen=True, kw_only=True)
class SentenceEmbedding(LossAdapter):
    """Squared distance of a text's embedding from its target, and of student and teacher (arXiv:2004.09813).

    An embedding is pooled from the final hidden states. Normalised to length 1, the squared distance is 2 (1 - cos).

    Args:
        pooling: the mean over a text's tokens, or the state of the first one.
        normalised: whether embeddings, targets too, are normalised.
    """

    pooling: Pooling = "mean"
    normalised: bool = True

    @override
    def prepare_clean(self, batch: Batch, rng: Rng) -> dict[str, Tensor]:
        return self.prepare(batch, rng)

    @override
    def predict(self, model: nn.Module, inputs: Batch) -> Tensor:
        """Return the embeddings, (batch, channels)."""
        return self._scaled(embedded(model, inputs, self.pooling))

    @override
    def loss(self, prediction: Tensor, inputs: Batch) -> Tensor:
        return self.distance(prediction, self._scaled(inputs["embedding"].to(prediction)), inputs)

    @override
    def distance(self, student: Tensor, teacher: Tensor, inputs: Batch) -> Tensor:
        return (student - teacher).square().sum(-1)

    def _scaled(self, embedding: Tensor) -> Tensor:
        return F.normalize(embedding, dim=-1) if self.normalised else embedding


def embedded(model: Any, inputs: Batch, pooling: Pooling) -> Tensor:
    """Return the embeddings of texts, (batch, channels), in float32 or wider.

    Args:
        model: an encoder.
        inputs: `tokens` and `attention`, (batch, tokens).
        pooling: how they are made of the final hidden states.
    """
    tokens, attention = inputs["tokens"], inputs["attention"]
    output = attending(attention, lambda mask: model(input_ids=tokens, attention_mask=mask))
    states: Tensor = output.last_hidden_state
    states = states.to(torch.promote_types(states.dtype, torch.float32))
    if pooling == "cls":
        return states[:, 0]
    share = attention / attention.sum(1, keepdim=True).clamp(min=1)
    return (states * share[..., None].to(states)).sum(1)
