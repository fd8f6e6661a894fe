"""What a network of transformers reads, for trying it out."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from tinyfusion_core.errors import UserError
from tinyfusion_llm.layers.building import Settings, construct_as
from tinyfusion_llm.layers.edits import is_int
from tinyfusion_llm.layers.finding import vocabulary_of
from tinyfusion_llm.pretrained.reading import as_json

LENGTHS = {"input_ids": 2, "input_values": 2000}
"""Lengths of short sources, by the name of the argument: tokens, or samples of a waveform."""
_FRAMES = 64
"""As many frames of features, which have several names."""


class Source(NamedTuple):
    """What the encoder of a network reads of a sample.

    Attributes:
        name: the argument in which it is given.
        shape: its shape: tokens, samples of a waveform, or features and frames in either order.
        vocabulary: how many tokens the decoder reads.
    """

    name: str
    shape: Sequence[int]
    vocabulary: int


def short_inputs(model: Any) -> dict[str, Tensor]:
    """Return arguments of a network for one short sample, each (batch, ...), on its device.

    On the meta device a decoder is given its mask, since where there is none, values are looked at.
    """
    first = next(model.parameters())
    tokens = torch.zeros(1, 2, dtype=torch.long, device=first.device)
    masked = {"attention_mask": tokens.new_ones(1, 1, 2, 2, dtype=torch.bool)} if first.is_meta else {}
    if model.config.is_encoder_decoder:
        name = model.main_input_name
        source = source_of(type(model), as_json(model.config), LENGTHS.get(name, _FRAMES))
        dtype = torch.long if name == "input_ids" else first.dtype
        read = torch.zeros(1, *source.shape, dtype=dtype, device=first.device)
        return {name: read, "decoder_input_ids": tokens, **{f"decoder_{key}": mask for key, mask in masked.items()}}
    return {"input_ids": tokens, **masked}


def source_of(kind: Any, config: Settings, length: int) -> Source:
    """Return what the encoder of a network reads, found by trying shapes of its config's sizes on the meta device.

    Args:
        kind: class of the network, an encoder-decoder.
        config: its config.
        length: how many tokens, samples or frames are to be read; of some networks the config decides that.

    Raises:
        UserError: the encoder takes no such shape.
    """
    return _source_of(kind, json.dumps(config, sort_keys=True), length)


@lru_cache(maxsize=32)
def _source_of(kind: Any, config: str, length: int) -> Source:
    with unset_fake_temporarily():  # the sizes of samples are asked for where tensors are fake
        whole = construct_as(kind, json.loads(config)).eval()
        name, size = whole.main_input_name, vocabulary_of(whole)
        if name == "input_ids":
            return Source(name, (length,), size)
        for shape in _shapes(as_json(whole.config), length):  # with the sizes that are its defaults
            read = torch.zeros(1, *shape, dtype=whole.dtype, device="meta")
            try:
                with torch.no_grad(), torch.random.fork_rng():
                    whole.get_encoder()(**{name: read})
                return Source(name, shape, size)
            except Exception:  # of any family's code
                continue
    raise UserError(
        f"backbone.source_context: a '{whole.config.model_type}' reads no {length} samples or frames of any features "
        "that its config names; set another length"
    )


def _shapes(config: Settings, length: int) -> Iterator[Sequence[int]]:
    """Shapes to try: a waveform, or features of which the config says how many there are in a frame."""
    yield (length,)
    parts = [config, *(value for value in config.values() if isinstance(value, dict))]
    known = {(key, value) for part in parts for key, value in part.items() if is_int(value)}
    sizes = {value for key, value in known if re.search(r"mel|feat|channels", key)}
    for frames in (length, *(2 * value for key, value in known if key == "max_source_positions")):
        for size in sorted(sizes):
            yield from ((size, frames), (frames, size))
