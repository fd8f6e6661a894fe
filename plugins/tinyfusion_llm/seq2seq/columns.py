"""What the encoder of a network reads, as columns of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tinyfusion_core.errors import UserError
from tinyfusion_core.protocols.loss import has_values

SOURCE, FEATURES, MASK = "source", "features", "source_mask"
"""Columns: token ids (batch, S); or a waveform or features (batch, ...); which of them the encoder sees (batch, S)."""

ENCODED = (SOURCE, FEATURES, MASK)
"""All of them."""


def encoder_inputs(model: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the arguments in which an encoder-decoder is given what its encoder reads.

    Args:
        model: the network.
        batch: its columns, each (batch, ...), among others.

    Returns:
        By name, each (batch, ...). Where there are no values transformers cannot look for padding: it is given a mask
        for the decoder, and none for the encoder.

    Raises:
        UserError: there is no such column.
    """
    name = model.main_input_name
    column = SOURCE if name == "input_ids" else FEATURES
    if column not in batch:
        found = ", ".join(sorted(batch))
        raise UserError(
            f"data: no column '{column}', which the encoder of a '{model.config.model_type}' reads (found: {found}); "
            "take data that have it, such as TextPairs for texts"
        )
    read = batch[column]
    given = {name: read.to(model.dtype) if read.is_floating_point() else read}
    if not has_values(read):
        tokens = batch["tokens"]
        given["decoder_attention_mask"] = tokens.new_ones(len(tokens), 1, *2 * tokens.shape[1:], dtype=torch.bool)
    elif MASK in batch:
        given["attention_mask"] = batch[MASK]
    return given
