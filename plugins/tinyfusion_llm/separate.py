"""Whether a network keeps the documents of a sample apart, found by trying it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tinyfusion_core.errors import UserError, first_line

LENGTHS = (9, 15)
"""Tokens of the two documents that a network is tried on."""
LEAK, ERROR = 0.01, 0.1
"""What is taken for rounding, as parts of what a document does to the next one in a network that joins them.

A document that cannot be seen changes nothing at all, but for the rounding of experts. One that is read alone is
computed in other shapes, which in half precision changes more.
"""


@torch.no_grad()
def check_separate(model: nn.Module) -> None:
    """Check that positions which begin anew separate the documents of a sample, as attention does in transformers.

    Args:
        model: a language model in eval mode, with weights.

    Raises:
        UserError: tokens see the document before theirs, or its length.
    """
    first = LENGTHS[0]
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    tokens = torch.arange(sum(LENGTHS), device=embeddings.weight.device)[None]
    positions = torch.cat([torch.arange(num, device=tokens.device) for num in LENGTHS])[None]
    other = torch.where(torch.arange(tokens.shape[1], device=tokens.device) < first, tokens + 11, tokens)

    def read(tokens: Tensor, **given: Any) -> Tensor:
        """Logits of the second document, (tokens, vocabulary)."""
        logits: Tensor = model(input_ids=tokens % embeddings.num_embeddings, use_cache=False, **given).logits
        return logits[0, -LENGTHS[1] :].float()

    alone, joined = read(tokens[:, first:]), read(tokens)
    try:
        packed, beside = (read(each, position_ids=positions) for each in (tokens, other))
    except (TypeError, ValueError, RuntimeError) as e:
        raise _refusal(model, f"does not take positions: {first_line(e)}") from None
    effect = (joined - alone).abs().max()
    if (packed - beside).abs().max() > LEAK * effect:
        raise _refusal(model, "hands on what it has read of one to the next")
    if (packed - alone).abs().max() > ERROR * effect:
        raise _refusal(model, "does not begin anew with each")


def _refusal(model: Any, why: str) -> UserError:
    return UserError(
        f"backbone.separate: documents of a sample cannot be kept apart in a '{model.config.model_type}', which {why}; "
        "leave it out, in data too"
    )
