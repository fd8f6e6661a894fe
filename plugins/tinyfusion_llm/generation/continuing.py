"""Texts continued by a language model, token by token."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tinyfusion_core.errors import require
from tinyfusion_core.protocols.backbone import Batch
from tinyfusion_llm.pretrained.reading import transformers


def prompt_lengths(batch: Batch, counted: Tensor, usual: int, encoded: Container[str] = ()) -> Tensor:
    """Return how many of its first tokens each text keeps, (batch,): those that no loss counts.

    Args:
        batch: `tokens` (batch, T), and what else the data have.
        counted: (batch, T), whether a loss counts a token.
        usual: how many are kept where all count.
        encoded: further columns, which an encoder reads.

    Raises:
        UserError: the data have other columns than those of text, as images have, or nothing would be left to write.
    """
    further = sorted(name for name in batch.keys() - {"tokens", "labels", "positions"} if name not in encoded)
    require(not further, "data: columns beside the text", further, "none, since texts alone are continued")
    uncounted, size = (counted.cumsum(1) == 0).sum(1), counted.shape[1]
    told = uncounted > 1  # the first one of a separate document never counts
    fit = usual < size or bool(told.all())
    require(fit, "loss.prompt_tokens", usual, f"fewer than the {size} tokens of a text, so that some are written")
    return uncounted.where(told, usual).clamp(max=size)


def continued(
    model: Any,
    tokens: Tensor,
    kept: Tensor,
    draw: Callable[[int, Tensor], Tensor],
    encoded: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Continue texts, by the library's own `generate`: every family has its caches there.

    Nothing of the model's generation config but its special tokens is used: its temperature or penalties for repetition
    would be another distribution than the one that it predicts.

    Args:
        model: the network, in eval mode.
        tokens: (batch, T) texts.
        kept: (batch,) how many tokens of each are kept, at least 1.
        draw: the number of a new token, counted from 0, and logits (batch, vocabulary) -> tokens (batch,).
        encoded: of an encoder-decoder, the arguments of its encoder, each (batch, ...).

    Returns:
        Texts (batch, T), and which of their tokens belong to them (batch, T): those up to an end-of-text token. The
        others are filled in.
    """
    length, shortest = tokens.shape[1], int(kept.min())
    if shortest == length:
        return tokens, torch.ones_like(tokens, dtype=torch.bool)
    own = model.generation_config
    ends = own.eos_token_id if own.eos_token_id is not None else model.config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    filler = next((number for number in (own.pad_token_id, *ends) if number is not None), 0)
    new = torch.arange(length, device=tokens.device) - kept[:, None]
    if encoded is None:  # beginnings of unequal length end at the same place
        begins = int(kept.max()) - kept
        place = torch.arange(int(kept.max()), device=tokens.device) - begins[:, None]
        beginning = tokens.gather(1, place.clamp(min=0)).where(place >= 0, filler)
        inputs = {"input_ids": beginning, "attention_mask": (place >= 0).long()}
    else:  # the shortest beginning is given, and what the others have beyond it is said again
        begins, beginning = torch.zeros_like(kept), tokens[:, :shortest]
        inputs = {"decoder_input_ids": beginning, **encoded}

    def forced(so_far: Tensor, logits: Tensor) -> Tensor:
        number = so_far.shape[1] - beginning.shape[1]
        chosen = draw(number, logits)
        if encoded is not None:
            chosen = chosen.where(new[:, shortest + number] >= 0, tokens[:, shortest + number])
        return torch.full_like(logits, -torch.inf).scatter(1, chosen[:, None], 0.0)

    library = transformers("loss: NextToken")
    model.generation_config = library.GenerationConfig(
        max_new_tokens=length - shortest,
        eos_token_id=ends or None,
        pad_token_id=filler,
        decoder_start_token_id=None if encoded is None else int(tokens[0, 0]),
    )
    generate = model.generate if encoded is None else partial(library.GenerationMixin.generate, model)
    try:
        made = generate(**inputs, logits_processor=[forced])
    finally:
        model.generation_config = own
    at = begins[:, None] + torch.arange(length, device=tokens.device)
    found = made.gather(1, at.clamp(max=made.shape[1] - 1)).where(new >= 0, tokens)
    ended = torch.isin(found, torch.tensor(ends, device=tokens.device, dtype=found.dtype)) & (new >= 0)
    written = (ended.cumsum(1) - ended.long()) == 0
    return found.where(written, filler), written


def drawn(logits: Tensor, u: Tensor, top_p: float) -> Tensor:
    """Draw a token for each row, (batch,), of the most probable ones that have `top_p` together (arXiv:1904.09751).

    Args:
        logits: (batch, vocabulary).
        u: (batch,) uniform numbers in [0, 1).
        top_p: above 0; 1 draws of all.
    """
    p = logits.double().softmax(-1)
    if top_p < 1:
        largest = p.sort(dim=-1, descending=True).values
        num = ((largest.cumsum(-1) - largest) < top_p).sum(-1, keepdim=True)
        p = p.masked_fill(p < largest.gather(-1, num - 1), 0)
    below = p.cumsum(-1)
    return (below <= u[:, None] * below[:, -1:]).sum(-1)
