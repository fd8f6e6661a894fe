"""What a network of transformers reads, for trying it out."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tinyfusion_core.errors import UserError
from tinyfusion_llm.layers.building import Settings, construct_as
from tinyfusion_llm.pretrained.reading import as_json

SHORT = {"input_ids": 2, "input_values": 2000}
"""Lengths of short inputs, by name: of tokens, of a waveform; of frames of features `_FRAMES`."""
_FRAMES = 64


def short_inputs(model: Any) -> dict[str, Tensor]:
    """Return arguments of a network for one short sample, on its device: tokens, and what its encoder reads.

    On the meta device a decoder is given its mask, since where there is none, values are looked at.
    """
    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
    tokens = torch.zeros(1, 2, dtype=torch.long, device=device)
    if model.config.is_encoder_decoder:
        name = model.main_input_name
        shape = source_shape(model, SHORT.get(name, _FRAMES))
        kind = torch.long if name == "input_ids" else dtype
        return {name: torch.zeros(1, *shape, dtype=kind, device=device), "decoder_input_ids": tokens}
    if device.type == "meta":
        return {"input_ids": tokens, "attention_mask": torch.ones(1, 1, 2, 2, dtype=torch.bool, device=device)}
    return {"input_ids": tokens}


def source_shape(model: Any, length: int) -> Sequence[int]:
    """Return the shape of what the encoder reads of one sample: tokens, samples of a waveform, or frames of features.

    It is found by trying shapes of the config's sizes on the meta device.

    Args:
        model: an encoder-decoder; only its class and its config are looked at.
        length: how many tokens, samples or frames it is to be; of some networks the config decides that.

    Raises:
        UserError: the encoder takes no such shape.
    """
    if model.main_input_name == "input_ids":
        return (length,)
    kind: Any = type(model)
    return _source_shape(kind, json.dumps(as_json(model.config), sort_keys=True), length)


@lru_cache(maxsize=8)
def _source_shape(kind: Any, config: str, length: int) -> Sequence[int]:
    whole = construct_as(kind, json.loads(config)).eval()
    for shape in _shapes(json.loads(config), length):
        try:
            with torch.no_grad(), torch.random.fork_rng():
                whole.get_encoder()(**{whole.main_input_name: torch.zeros(1, *shape, device="meta", dtype=whole.dtype)})
            return shape
        except Exception:  # of any family's code
            continue
    raise UserError(
        f"backbone.source_context: the encoder of a '{whole.config.model_type}' reads no {length} samples or frames; "
        "set another length"
    )


def _shapes(config: Settings, length: int) -> Iterator[Sequence[int]]:
    """Shapes to try: a waveform, or features of which the config says how many there are in a frame."""
    yield (length,)
    sizes = {value for key, value in config.items() if isinstance(value, int) and re.search(r"mel|feat|channels", key)}
    for frames in (length, 2 * int(config.get("max_source_positions") or 0)):
        for size in sorted(sizes):
            yield from ((size, frames), (frames, size))
