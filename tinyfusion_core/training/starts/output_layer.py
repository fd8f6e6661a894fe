"""Finds the layers of a block whose outputs are added to the streams, perhaps times a gate, and what that gate is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ...protocols.blocks.streams import Stream
from ...protocols.undisturbed import replaced_forward

LARGE = 256.0
"""What a gate is told by: the stream that it is read off should be small beside it."""
EXACT = 1e-2
"""Largest error of what an output would do to the stream, as a fraction of that."""
SAME = 1e-3
"""Difference below which two gates are one."""


@dataclass(frozen=True)
class BlockCall:
    """A call of a block, which can be repeated with another output of one of its layers.

    Attributes:
        block: the block.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.
        output: what it gave.
        streams: the streams to look at, as one: their tokens follow each other.
    """

    block: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    streams: Sequence[Stream]

    @property
    def behind(self) -> Tensor:
        """The streams behind the block, (batch, tokens, channels)."""
        return self._read(self.output)

    def _read(self, output: Any) -> Tensor:
        return torch.cat([by_token(stream.of(output)) for stream in self.streams], dim=1)

    def exact(self) -> BlockCall:
        """Return the call in single precision: in less, a gate cannot be told from the stream that it is added to."""
        if all(p.dtype == torch.float32 for p in self.block.parameters()):
            return self
        args, kwargs = tree_map(_single, (self.args, self.kwargs))
        block = copy.deepcopy(self.block).float()
        return replace(self, block=block, args=args, kwargs=kwargs, output=block.forward(*args, **kwargs))

    def given(self, layer: str, output: Tensor) -> Tensor:
        """Return the streams behind the block, (batch, tokens, channels), if a layer gives the same for all it reads.

        Args:
            layer: path of the layer in the block.
            output: (channels,) what it gives.
        """
        module = self.block.get_submodule(layer)
        with replaced_forward(module, lambda x: output.expand(*x.shape[:-1], -1).clone()):
            return self._read(self.block.forward(*self.args, **self.kwargs))

    def of_layer(self, layer: str) -> Tensor:
        """Return what a layer gives, (batch, tokens, channels).

        Args:
            layer: path of the layer in the block.
        """
        found: list[Tensor] = []
        module = self.block.get_submodule(layer)
        plain: Callable[[Tensor], Tensor] = module.forward

        def forward(x: Tensor) -> Tensor:
            found.append(plain(x))
            return found[-1]

        with replaced_forward(module, forward):
            self.block.forward(*self.args, **self.kwargs)
        return by_token(self.streams[0].by_sample(found[0]))

    def without(self, layer: str) -> Tensor:
        """Return the streams behind the block, (batch, tokens, channels), if a layer gives zeros.

        Args:
            layer: path of the layer in the block.
        """
        return self.given(layer, torch.zeros(self.behind.shape[-1], device=self.behind.device))

    def gate(self, layer: str, without: Tensor) -> Tensor | None:
        """Return what a layer's output is multiplied by before it is added to the streams.

        Args:
            layer: path of the layer in the block.
            without: what `without` returned for it, (batch, tokens, channels).

        Returns:
            (batch, channels), exactly 1 where there is none; None if it differs between the tokens of a sample.
        """
        large = torch.full((without.shape[-1],), LARGE, device=without.device)
        gate = (self.given(layer, large) - without) / LARGE
        if not bool(((gate - gate[:, :1]).abs() <= SAME * gate.abs().amax().clamp(min=1)).all()):
            return None
        first = gate[:, 0]
        return torch.ones_like(first) if bool(((first - 1).abs() <= SAME).all()) else first


def output_layers(call: BlockCall) -> dict[str, Sequence[Stream]] | None:
    """Return the linear layers whose outputs are added to the streams, times a gate or not, and to which.

    Every linear layer of a stream's width is tried, the last first: the stream has to follow whatever the layer might
    give, channel by channel. Where a norm or another layer comes behind it, it does not. One layer may serve several
    streams, whose tokens it then has one after another.

    Args:
        call: a call of the block, in single precision.

    Returns:
        For the path of each layer, in its block, the streams in their order; None if a stream has no such layer.
    """
    serves: dict[str, list[Stream]] = {}
    for stream in call.streams:
        if (layer := _layer_for(replace(call, streams=[stream]))) is None:
            return None
        serves.setdefault(layer, []).append(stream)
    found: dict[str, Sequence[Stream]] = {}
    for layer, streams in serves.items():
        orders = (list(order) for order in permutations(streams))
        right = (order for order in orders if _is_added(replace(call, streams=order), layer))
        if (order := next(right, None)) is None:
            return None
        found[layer] = order
    return found


def _layer_for(call: BlockCall) -> str | None:
    """The layer that a stream follows."""
    plain = call.behind
    direction = torch.randn(plain.shape[-1], generator=torch.Generator().manual_seed(0)).to(plain.device)
    for layer in reversed(_layers_of(call.block, plain.shape[-1])):
        without = call.without(layer)
        gate = call.gate(layer, without)
        if gate is None or not bool(gate.any()):
            continue
        size = (plain - without).square().mean().sqrt()  # as large as what it gives
        if _alike(call.given(layer, size * direction) - without, (gate * size * direction)[:, None]):
            return layer
    return None


def _is_added(call: BlockCall, layer: str) -> bool:
    """Whether what a layer gives is what is added, token by token."""
    given, without = call.of_layer(layer), call.without(layer)
    gate, lacking = call.gate(layer, without), call.behind - without
    return gate is not None and given.shape == lacking.shape and _alike(lacking, gate[:, None] * given)


def _alike(found: Tensor, expected: Tensor) -> bool:
    return bool(((found - expected).abs() <= EXACT * expected.abs().amax()).all())


def by_token(x: Tensor) -> Tensor:
    """Return features, (batch, ..., channels), as (batch, tokens, channels)."""
    return x.reshape(len(x), -1, x.shape[-1])


def _layers_of(block: nn.Module, width: int) -> Sequence[str]:
    """Paths of the linear layers that give as many channels as the stream has."""
    named = block.named_modules()
    return [name for name, layer in named if isinstance(layer, nn.Linear) and layer.out_features == width]


def _single(leaf: Any) -> Any:
    return leaf.float() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
