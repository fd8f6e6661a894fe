"""Records the attention maps of blocks while a network runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from ...errors import UserError
from ..undisturbed import replaced_forward


@contextmanager
def attention_maps(model: nn.Module, paths: Sequence[str]) -> Iterator[list[list[Tensor]]]:
    """Record the attention of these blocks while the context is open: for every path, the map of each call.

    What calls torch's `scaled_dot_product_attention` is seen, as transformers, diffusers and timm do. A map is computed
    from the queries and keys once more, since fast attention does not keep it.

    Yields:
        The logarithms of the weights, (rows, heads, queries, keys) in float32, -inf where a key is masked out. A query
        that sees no key looks everywhere alike.

    Raises:
        UserError: a block calls no such attention.
    """
    maps: list[list[Tensor]] = [[] for _ in paths]

    def watched(plain: Callable[..., Any], found: list[Tensor]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            with _Calls() as calls:
                output = plain(*args, **kwargs)
            # Only now: a block that is checkpointed must keep the same tensors when it is computed again.
            found[:] = [attention_map(*call, **how) for call, how in calls.seen]
            return output

        return forward

    with ExitStack() as stack:
        for path, found in zip(paths, maps, strict=True):
            block = model.get_submodule(path)
            stack.enter_context(replaced_forward(block, watched(block.forward, found)))
        yield maps
    for path, found in zip(paths, maps, strict=True):
        if not found:
            raise UserError(
                f"'{path}' does not call torch's scaled_dot_product_attention, whose maps are compared: leave out "
                "trainer.compile, have transformers take attn_implementation: sdpa, or distil with AttentionKD"
            )


class _Calls(TorchFunctionMode):
    """Keeps what attention is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is scaled_dot_product_attention:
            self.seen.append((args, dict(kwargs or {})))
        return func(*args, **(kwargs or {}))


def attention_map(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return the logarithms of the weights that `scaled_dot_product_attention` gives the values, before dropout.

    Args:
        query: (rows, ..., queries, channels).
        key: (rows, ..., keys, channels).
        value: not looked at.
        attn_mask: what broadcasts to (rows, ..., queries, keys): booleans, true where a key is seen, or what is added.
        dropout_p: not looked at.
        is_causal: whether a query sees the keys up to its own place alone.
        scale: factor of the products; default 1 / sqrt(channels).
        enable_gqa: whether several heads of the queries share one of the keys.

    Returns:
        (rows, ..., queries, keys) in float32.
    """
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
    with torch.autocast(query.device.type, enabled=False):
        products = query.float() @ key.float().transpose(-2, -1)
    scores = products * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        scores = scores.masked_fill(scores.new_ones(scores.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
    if attn_mask is not None:
        seen = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -math.inf) if seen else scores + attn_mask
    blind = scores.isneginf().all(-1, keepdim=True)  # rows of padding, whose softmax is not a number
    return scores.masked_fill(blind, 0.0).log_softmax(-1)
