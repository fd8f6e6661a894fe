"""Which dimension of what layers hand on counts the samples."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from tinyfusion_core.protocols.blocks.streams import Stream
from tinyfusion_llm.layers.building import Settings, class_of, construct_as
from tinyfusion_llm.layers.inputs import short_inputs
from tinyfusion_llm.layers.stacks import find_stacks
from tinyfusion_llm.pretrained.reading import Autos

_SAMPLES = 7
"""A number that is no other size of such a short input."""


def layer_streams(config: Settings, autos: Autos) -> Mapping[str, Sequence[Stream]]:
    """Return the stream of every list of layers of a network: their first argument, and their output.

    Most networks hand on the samples first. Some put tokens before them, and Gemma 3n its copies of the stream.

    Args:
        config: the network's config.
        autos: auto classes of transformers, one of which builds it.
    """
    return _layer_streams(class_of(config, autos), json.dumps(config, sort_keys=True))


@lru_cache(maxsize=8)
def _layer_streams(kind: Any, config: str) -> Mapping[str, Sequence[Stream]]:
    with unset_fake_temporarily():
        model = construct_as(kind, json.loads(config)).eval()
        return {stack.path: (Stream(batch_dim=_batch_dim(model, f"{stack.path}.0")),) for stack in find_stacks(model)}


class _Reached(Exception):
    """The layer has been called."""


def _batch_dim(model: nn.Module, path: str) -> int:
    """The dimension of a layer's first argument that counts the samples; the first if the network does not run so."""

    def reached(layer: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0].shape)
        raise _Reached

    seen: list[torch.Size] = []
    hook = model.get_submodule(path).register_forward_pre_hook(reached)
    try:
        with torch.no_grad(), torch.random.fork_rng():
            model(**{name: _repeated(x) for name, x in short_inputs(model).items()}, use_cache=False)
    except Exception:  # `_Reached`, or of any family's code
        pass
    finally:
        hook.remove()
    return seen[0].index(_SAMPLES) if seen and seen[0].count(_SAMPLES) == 1 else 0


def _repeated(x: Tensor) -> Tensor:
    return x.expand(_SAMPLES, *x.shape[1:])
