"""Run a model under a sampled block mask, one mask per sample, exactly and sparsely.

The dense formula `x + m * (f(x) - x)` evaluates every block for every sample with a graph. For a hard 0/1
mask its gradients need far less: the gradient to the mask is `<dL/dy, f(x) - x>` for every sample, and the
gradient to the input and to f's weights goes through f only where the block is kept. So kept samples run
with a graph, dropped ones without, and a small autograd function puts both together.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import TreeSpec, tree_flatten_with_path, tree_leaves, tree_unflatten

from .backbone import Stream
from .errors import UserError

BatchDim = Callable[[str, str], "int | None"]
"""(block path, argument) -> the argument's batch dimension, or None when all samples share it."""


class Gates:
    """Take over the `forward` of every block while the context is open.

    Set `mask` before each forward pass: a (B, N) tensor of zeros and ones, one column per block, one row per
    sample. A mask that requires grad receives the exact gradient of the dense formula; with one that does
    not, dropped samples are not computed at all. `None` runs the plain model. The mask stays in force
    until it is replaced, so that activation checkpointing finds it again: keep the context open around
    backward, and use non-reentrant checkpointing. Nothing in the model changes but `forward`, and
    closing the context, also by an exception, leaves no trace. Do not copy or pickle the model meanwhile.

    Every call runs at least one sample of every block with the graph (a dropped one, with a zero gradient,
    when none keeps it): parameters get zero gradients, never None, and distributed processes stay in step.

    Args:
        model: the network.
        blocks: paths of the N blocks, in the order of the mask's columns.
        streams: the blocks' residual streams.
        batch_dim: which arguments carry the batch; see `probed_batch_dims` and `named_batch_dims`.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[str],
        batch_dim: BatchDim,
        streams: Sequence[Stream] = (Stream(),),
    ) -> None:
        self.blocks = list(blocks)
        self._modules = [model.get_submodule(path) for path in blocks]
        self._batch_dim, self._streams = batch_dim, list(streams)
        self._mask: Tensor | None = None
        self._rows: list[tuple[Tensor, Tensor]] = []
        self._before: list[tuple[nn.Module, Any]] = []

    @property
    def mask(self) -> Tensor | None:
        return self._mask

    @mask.setter
    def mask(self, mask: Tensor | None) -> None:
        if mask is not None:
            # One copy to the host for all blocks, instead of one synchronisation per block.
            hard = mask.detach().cpu()
            if hard.ndim != 2 or hard.shape[1] != len(self.blocks):
                raise ValueError(f"mask must be (B, {len(self.blocks)}), got {tuple(hard.shape)}")
            if not bool(((hard == 0) | (hard == 1)).all()):
                raise ValueError("mask must hold zeros and ones only")
            rows = [(column.nonzero().flatten(), (column == 0).nonzero().flatten()) for column in hard.unbind(1)]
            self._rows = [(kept.to(mask.device), dropped.to(mask.device)) for kept, dropped in rows]
        self._mask = mask

    def __enter__(self) -> Gates:
        for j, block in enumerate(self._modules):
            self._before.append((block, block.__dict__.get("forward")))
            block.forward = self._gated(j, block.forward)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for block, before in self._before:
            if before is None:
                del block.__dict__["forward"]
            else:  # somebody else had taken it over already
                block.__dict__["forward"] = before
        self._before.clear()
        self._mask = None

    def _gated(self, j: int, plain: Callable[..., Any]) -> Callable[..., Any]:
        names = _positional_names(plain)

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._mask is None:
                return plain(*args, **kwargs)
            call = _Call(plain, names, args, kwargs, lambda leaf: self._batch_dim(self.blocks[j], leaf))
            return self._sparse(j, call, self._mask[:, j])

        return forward

    def _sparse(self, j: int, call: _Call, mask: Tensor) -> Any:
        inputs = [call.stream(stream, self.blocks[j]) for stream in self._streams]
        if inputs[0].shape[0] != len(mask):
            raise ValueError(
                f"block '{self.blocks[j]}' got {inputs[0].shape[0]} samples, the mask has {len(mask)} rows"
            )
        kept, dropped = self._rows[j]
        # Attention code cannot take zero samples, and every parameter needs a gradient on every process.
        run, rest = (kept, dropped) if len(kept) else (dropped[:1], dropped[1:])
        learning = mask.requires_grad and torch.is_grad_enabled()
        versions = [x._version for x in inputs]
        # First with the graph: older torch keeps what autocast has cast under no_grad, and its gradients are lost.
        output = call.run(run)
        if len(kept) == len(mask) and not learning:
            return output
        value = None
        if learning and len(rest):
            with torch.no_grad():
                value = self._items(j, call.run(rest))
        if versions != [x._version for x in inputs]:
            raise UserError(f"block '{self.blocks[j]}' changes its input in place, which gating cannot undo")
        items = self._items(j, output)
        merged = [stream.output or 0 for stream in self._streams]
        for i, item in enumerate(items):
            if i not in merged and len(run) < len(mask) and any(isinstance(v, Tensor) for v in tree_leaves(item)):
                raise UserError(
                    f"block '{self.blocks[j]}' returns a tensor at index {i} that is no declared stream; "
                    "name it in Backbone.streams"
                )
        for i, x in zip(merged, inputs, strict=True):
            items[i] = _Merge.apply(x, items[i], value[i] if value else None, mask, kept, run, rest)
        if isinstance(output, Tensor):
            return items[0]
        return type(output)._make(items) if hasattr(output, "_make") else type(output)(items)

    def _items(self, j: int, output: Any) -> list[Any]:
        if isinstance(output, Tensor):
            return [output]
        if isinstance(output, (tuple, list)):
            return list(output)
        raise UserError(f"block '{self.blocks[j]}' returns a {type(output).__name__}; gating takes a tensor or a tuple")


class _Merge(torch.autograd.Function):
    """y = f(x) where kept, x where dropped; the mask's gradient is <dL/dy, f(x) - x> everywhere.

    `ran` are f's outputs for the rows `run` (the kept rows, or one dropped row when none is kept), `value`
    those of the other dropped rows, without a graph. Only f(x) - x is saved, neither of the two.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        ran: Tensor,
        value: Tensor | None,
        mask: Tensor,
        kept: Tensor,
        run: Tensor,
        rest: Tensor,
    ) -> Tensor:
        if len(kept) == len(x):
            out = ran.detach()  # not a view: the model may go on with it in place
        else:
            out = x.to(ran.dtype, copy=True)
            if len(kept):
                out.index_copy_(0, kept, ran)
        delta = None
        if ctx.needs_input_grad[3]:
            delta = out - x
            for rows, f in ((rest, value), (run, None if len(kept) else ran)):
                if f is not None:
                    delta.index_copy_(0, rows, f - x.index_select(0, rows))
        ctx.save_for_backward(delta, kept)
        ctx.dtypes, ctx.ran_shape = (x.dtype, mask.dtype), ran.shape
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        delta, kept = ctx.saved_tensors
        x_dtype, mask_dtype = ctx.dtypes
        if len(kept) == len(grad):
            grad_x, grad_ran = None, grad
        else:
            grad_x = grad.index_fill(0, kept, 0).to(x_dtype)
            # The dropped row that ran in place of kept ones gets zeros, and so do the weights.
            grad_ran = grad.index_select(0, kept) if len(kept) else grad.new_zeros(ctx.ran_shape)
        # Gates are float32 whatever the stream is.
        grad_mask = None if delta is None else (delta.float() * grad).flatten(1).sum(1).to(mask_dtype)
        return grad_x, grad_ran, None, grad_mask, None, None, None


class _Call:
    """One call of a block, which can be repeated for some of its samples."""

    def __init__(
        self,
        plain: Callable[..., Any],
        names: Sequence[str],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        batch_dim: Callable[[str], int | None],
    ) -> None:
        self.plain, self.names, self.args, self.kwargs = plain, names, args, kwargs
        leaves, self.spec = _leaves(names, args, kwargs)
        self.leaves = list(leaves.values())
        self.dims = [batch_dim(name) if isinstance(v, Tensor) else None for name, v in leaves.items()]

    def stream(self, stream: Stream, path: str) -> Tensor:
        """The stream's tensor as it enters the block."""
        name = stream.argument
        if isinstance(name, str) and name not in self.kwargs:
            if name not in self.names[: len(self.args)]:
                raise UserError(f"block '{path}' was called without its stream argument '{name}'; see Backbone.streams")
            name = list(self.names).index(name)
        # A stream named by position may still be passed by name.
        if isinstance(name, int) and name >= len(self.args):
            name = self.names[name]
        x = self.kwargs[name] if isinstance(name, str) else self.args[name]
        if not isinstance(x, Tensor):
            raise UserError(
                f"block '{path}': stream argument '{stream.argument}' is a {type(x).__name__}, not a tensor"
            )
        return x

    def run(self, rows: Tensor) -> Any:
        """The block's output for these rows; for all of them in their order, without copying."""
        sizes = [v.shape[d] for v, d in zip(self.leaves, self.dims, strict=True) if d is not None]
        if sizes and len(rows) == sizes[0]:
            return self.plain(*self.args, **self.kwargs)
        some = [v if d is None else v.index_select(d, rows) for v, d in zip(self.leaves, self.dims, strict=True)]
        args, kwargs = tree_unflatten(some, self.spec)
        return self.plain(*args, **kwargs)


def named_batch_dims(names: Mapping[str, int]) -> BatchDim:
    """Batch dimensions as a plugin states them, by argument (`x`) or part of one (`rotary.0`); others are shared."""
    return lambda path, leaf: names.get(leaf, names.get(leaf.partition(".")[0]))


def probed_batch_dims(model: nn.Module, blocks: Sequence[str], run: Callable[[int], object]) -> BatchDim:
    """Find the batch dimensions by running the model at two batch sizes and comparing shapes.

    One size would not do: 16 tokens and a batch of 16 look alike.

    Args:
        model: the network.
        blocks: paths of the blocks.
        run: runs the model on that many samples.

    Raises:
        UserError: a dimension grows with the batch but is not one entry per sample.
    """
    sizes = (2, 3)
    seen: dict[int, dict[tuple[str, str], torch.Size]] = {}
    for size in sizes:
        shapes = seen[size] = {}
        hooks = [_record_shapes(model.get_submodule(path), path, shapes) for path in blocks]
        try:
            with torch.no_grad():
                run(size)
        finally:
            for hook in hooks:
                hook.remove()
    first, second = (seen[size] for size in sizes)
    dims: dict[tuple[str, str], int | None] = {}
    for key, shape in first.items():
        other = second.get(key, shape)
        changed = [d for d, (a, b) in enumerate(zip(shape, other, strict=False)) if a != b]
        if len(shape) != len(other) or len(changed) > 1 or any((shape[d], other[d]) != sizes for d in changed):
            raise UserError(
                f"block '{key[0]}', argument '{key[1]}': {list(shape)} for a batch of 2 and {list(other)} for 3 "
                "is not one entry per sample; name the batch arguments in Backbone.batched"
            )
        dims[key] = changed[0] if changed else None

    def batch_dim(path: str, leaf: str) -> int | None:
        try:
            return dims[path, leaf]
        except KeyError:
            raise UserError(
                f"block '{path}' was called with an argument '{leaf}' that did not occur while probing; "
                "name the batch arguments in Backbone.batched"
            ) from None

    return batch_dim


def _record_shapes(block: nn.Module, path: str, shapes: dict[tuple[str, str], torch.Size]) -> Any:
    names = _positional_names(block.forward)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        leaves, _ = _leaves(names, args, kwargs)
        shapes.update({(path, name): v.shape for name, v in leaves.items() if isinstance(v, Tensor)})

    return block.register_forward_pre_hook(hook, with_kwargs=True)


def _positional_names(function: Callable[..., Any]) -> list[str]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [name for name, p in inspect.signature(function).parameters.items() if p.kind in kinds]


def _leaves(names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[dict[str, Any], TreeSpec]:
    """The leaves of a call by name (`x`, `rotary.0`), the same whether passed by position or by name."""
    paths, spec = tree_flatten_with_path((args, kwargs))
    named: dict[str, Any] = {}
    for path, leaf in paths:
        # Each step of a path is a key of a mapping or an index of a sequence.
        steps: list[Any] = [getattr(step, "key", getattr(step, "idx", step)) for step in path]
        side, which, *inner = steps
        top = which if side else names[which] if which < len(names) else f"*{which}"
        named[".".join(map(str, [top, *inner]))] = leaf
    return named, spec
