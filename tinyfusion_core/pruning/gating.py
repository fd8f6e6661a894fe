"""Run a model under a sampled block mask, one mask per sample, exactly and sparsely.

The dense formula `x + m * (f(x) - x)` evaluates every block for every sample with a graph. For a hard 0/1 mask its
gradients need far less: that to the mask is `<dL/dy, f(x) - x>` for every sample, and those to the input and to f's
weights go through f only where the block is kept. So kept samples run with a graph, dropped ones without.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from ..errors import UserError
from ..protocols.blocks.batch import BatchDim
from ..protocols.blocks.call import Call, in_the_form_of, is_plain, items_of, not_the_batch, positional_names
from ..protocols.blocks.paths import list_of
from ..protocols.blocks.rows import Rows, moved, split_rows
from ..protocols.blocks.streams import FIRST, Streams, Unneeded, streams_of
from ..protocols.undisturbed import replaced_forward
from ..runtime.seeding import to_device

Recall = Callable[[int, bool, Call, Callable[[], Any]], Any]
"""(block, whether it is kept, call, what computes its output) -> its output."""


class Gates:
    """Replace the `forward` of every block while the context is open.

    Set `mask` before each forward pass: a (batch, num_blocks) tensor of zeros and ones. A mask that requires grad
    receives the exact gradient of the dense formula; with one that does not, dropped samples are not computed at all.
    `None` runs the plain model. The mask stays in force until it is replaced, so that activation checkpointing finds it
    again: keep the context open around backward, and use non-reentrant checkpointing. Nothing in the model changes but
    `forward`, and closing the context, also by an exception, restores it. Do not copy or pickle the model meanwhile.

    With gradients, every call runs at least one sample of every block with the graph (a dropped one, with a zero
    gradient, if none keeps it): parameters get zero gradients, never None, and distributed processes stay in step.
    Without, a block that nobody keeps is run only until the form of its output is known.

    Args:
        model: the network.
        blocks: paths of the blocks, in the order of the mask's columns.
        batch_dim: which arguments carry the batch; see `probed_batch_dims` and `named_batch_dims`.
        streams: the blocks' residual streams, by block list where they differ.
        unneeded: outputs of blocks that are no stream: None, or handed on; see `Backbone.unneeded`.

    Attributes:
        recall: answers calls of blocks without gradients, where all samples have the same mask; see `Prefixes`.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[str],
        batch_dim: BatchDim,
        streams: Streams = FIRST,
        unneeded: Unneeded = (),
    ) -> None:
        self.blocks = list(blocks)
        self._modules = [model.get_submodule(path) for path in blocks]
        self._batch_dim = batch_dim
        self._streams = [list(streams_of(streams, path)) for path in blocks]
        self._unneeded = set(unneeded)
        given = [positional_names(module.forward) for module in self._modules]
        handed_on = unneeded.items() if isinstance(unneeded, Mapping) else ()
        self._carried = [{i: name for i, some in handed_on for name in some if name in names} for names in given]
        self._mask: Tensor | None = None
        self._weights: Tensor | None = None
        self.recall: Recall | None = None
        self._rows: Sequence[Rows] = []
        self._forms: dict[tuple[int, Hashable], Any] = {}
        self._open = ExitStack()

    @property
    def mask(self) -> Tensor | None:
        """The mask of the next forward pass, (batch, num_blocks), one row per sample; see `set`."""
        return self._mask

    @mask.setter
    def mask(self, mask: Tensor | None) -> None:
        self.set(mask)

    def set(self, mask: Tensor | None, weights: Tensor | None = None, host: Tensor | None = None) -> None:
        """Set the mask, and weights for the part of its gradient that comes from dropped samples.

        A dropped sample whose weight is zero is not run at all; with weights of mean one that do not depend on the
        values, the mask's gradient keeps its mean.

        Args:
            mask: (batch, num_blocks) zeros and ones, or None to run the plain model.
            weights: (batch, num_blocks), in main memory or where the mask is; None means ones.
            host: the mask in main memory, (batch, num_blocks); None: it is copied there, which waits for the device.

        Raises:
            ValueError: the mask has another shape, or values other than 0 and 1.
        """
        if mask is not None:
            # One copy to the host for all blocks, instead of one synchronisation per block.
            hard = mask.detach().cpu() if host is None else host
            if hard.ndim != 2 or hard.shape[1] != len(self.blocks):
                raise ValueError(f"mask must be (B, {len(self.blocks)}), got {tuple(hard.shape)}")
            if not bool(((hard == 0) | (hard == 1)).all()):
                raise ValueError("mask must hold zeros and ones only")
            used = torch.ones_like(hard) if weights is None else weights.cpu()
            rows = [split_rows(*columns) for columns in zip(hard.unbind(1), used.unbind(1), strict=True)]
            self._rows = moved(rows, mask.device)
            weights = None if weights is None else to_device(weights, mask.device)
        self._mask, self._weights = mask, weights

    def __enter__(self) -> Gates:
        for j, block in enumerate(self._modules):
            self._open.enter_context(replaced_forward(block, self._gated(j, block.forward)))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._open.close()
        self._mask = None

    def _gated(self, j: int, plain: Callable[..., Any]) -> Callable[..., Any]:
        names = positional_names(plain)

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._mask is None:
                return plain(*args, **kwargs)
            call = Call(plain, names, args, kwargs, lambda leaf: self._batch_dim(self.blocks[j], leaf))
            compute = partial(self._sparse, j, call, self._mask[:, j])
            if self.recall is None or torch.is_grad_enabled():
                return compute()
            return self.recall(j, len(self._rows[j][0]) > 0, call, compute)

        return forward

    def _sparse(self, j: int, call: Call, mask: Tensor) -> Any:
        inputs = self._inputs(j, call, len(mask))
        kept, run, rest = self._rows[j]
        learning = mask.requires_grad and torch.is_grad_enabled()
        # First with the graph: older torch keeps what autocast has cast under no_grad, and its gradients are lost.
        output = call.run(run) if torch.is_grad_enabled() else self._of_no_graph(j, call, kept, run)
        if len(kept) == len(mask) and not learning:
            return output
        value = None
        if learning and len(rest):
            with torch.no_grad():
                value = self._items(j, call.run(rest))
        if unable := call.changed | (call.lost if len(kept) else set()):
            changed = ", ".join(sorted(unable))
            raise UserError(f"block '{self.blocks[j]}' changes its input in place ({changed}), which no gate can undo")
        items = self._items(j, output)
        self._check_items(j, items, inputs, partly=len(run) < len(mask))
        weight = None if self._weights is None else self._weights[:, j]
        entered = {stream.item: x for stream, x in zip(self._streams[j], inputs, strict=True)}
        entered |= dict(self._handed_on(j, call, items, len(mask), nobody=not len(kept)))
        for i, x in entered.items():
            items[i] = _Merge.apply(x, items[i], value[i] if value else None, mask, kept, run, rest, weight)
        return in_the_form_of(output, items, self._streams[j])

    def _of_no_graph(self, j: int, call: Call, kept: Tensor, run: Tensor) -> Any:
        """A block's output; if nobody keeps the block and a call like this has been seen, one of no rows."""
        like = (j, call.signature())
        if not len(kept) and like in self._forms:
            return self._forms[like]
        output = call.run(run)
        if like[1] is not None and not call.changed and (form := self._form(j, call, output)) is not None:
            self._forms[like] = form
        return output

    def _form(self, j: int, call: Call, output: Any) -> Any:
        """A block's output with the streams of no rows; None if more than streams and plain values is in it."""
        streams, carried = {stream.item for stream in self._streams[j]}, self._carried[j]
        for i, item in (items := items_of(output, self._streams[j]) or {}).items():
            if i in streams | carried.keys() and isinstance(item, Tensor):
                if i in carried and call.given(carried[i]) is None and self._shared(j, carried[i], None):
                    return None  # it makes this for all
                items[i] = item.new_empty(0, *item.shape[1:])
            elif i in self._unneeded:
                items[i] = None
            elif not is_plain(item):
                return None
        return in_the_form_of(output, items, self._streams[j]) if streams <= items.keys() else None

    def _handed_on(self, j: int, call: Call, items: Any, num_rows: int, nobody: bool) -> Iterator[tuple[Any, Tensor]]:
        """What a skipped block hands on beside its streams; what all samples share is put into its output."""
        for i, name in self._carried[j].items():
            item, given = items.get(i), call.given(name)  # the first block is given none
            if isinstance(item, Tensor) and self._shared(j, name, given):
                items[i] = given if nobody and given is not None else item
            elif isinstance(item, Tensor):
                yield i, item.new_zeros(num_rows, *item.shape[1:]) if given is None else given

    def _shared(self, j: int, name: str, given: Any) -> bool:
        """Whether what a block hands on under this name is one for all samples, as who is given it shows."""
        k = j if given is not None else j + 1
        if k == len(self.blocks) or list_of(self.blocks[k]) != list_of(self.blocks[j]):
            return True  # nobody is given it
        return name in self._carried[k].values() and self._batch_dim(self.blocks[k], name) is None

    def _inputs(self, j: int, call: Call, num_rows: int) -> list[Tensor]:
        """What a skipped block gives: the incoming streams. Raises UserError unless they have so many samples."""
        inputs = [call.stream(stream, self.blocks[j]) for stream in self._streams[j]]
        if inputs[0].shape[0] != num_rows:
            raise UserError(not_the_batch(self.blocks[j], inputs[0].shape[0], num_rows))
        return [torch.zeros_like(x) if s.added else x for s, x in zip(self._streams[j], inputs, strict=True)]

    def _check_items(self, j: int, items: Mapping[int | str, Any], inputs: Sequence[Tensor], partly: bool) -> None:
        """Raise UserError if a block's output cannot be merged with its input.

        A stream must keep its shape; and if the block ran for only a part of the samples, a tensor that is not a
        declared stream has unknown rows.
        """
        declared = [stream.item for stream in self._streams[j]]
        for i, x in zip(declared, inputs, strict=True):
            if not isinstance(items.get(i), Tensor):
                raise UserError(f"block '{self.blocks[j]}' returns no tensor at {i!r}; see 'streams'")
            if items[i].shape[1:] != x.shape[1:]:
                raise UserError(
                    f"block '{self.blocks[j]}' makes {list(items[i].shape[1:])} of a stream of {list(x.shape[1:])} a "
                    "sample, so it cannot be skipped; leave it out of 'blocks'"
                )
        for i, item in items.items():
            told = i in declared or i in self._carried[j]
            if partly and not told and any(isinstance(leaf, Tensor) for leaf in tree_leaves(item)):
                raise UserError(
                    f"block '{self.blocks[j]}' returns a tensor at {i!r} that is no declared stream; name it "
                    "in 'streams', or in 'unneeded' if the network does without it"
                )

    def _items(self, j: int, output: Any) -> dict[int | str, Any]:
        """The parts of a block's output, without those that nobody needs."""
        items = items_of(output, self._streams[j])
        if items is None:
            kind = type(output).__name__
            raise UserError(f"block '{self.blocks[j]}' returns a {kind}; gating takes a tensor, a tuple or a mapping")
        dropped = self._unneeded - self._carried[j].keys()
        return {i: None if i in dropped else item for i, item in items.items()}


class _Merge(torch.autograd.Function):
    """y = f(x) where kept, x where dropped; the gradient to the mask is <dL/dy, f(x) - x> everywhere.

    `ran` is f's output for the rows `run` (the kept rows, or one dropped row if none is kept), `value` its output for
    the other dropped rows that are needed, without a graph. Only f(x) - x is saved.
    """

    @staticmethod
    @override
    def forward(
        ctx: Any,
        x: Tensor,
        ran: Tensor,
        value: Tensor | None,
        mask: Tensor,
        kept: Tensor,
        run: Tensor,
        rest: Tensor,
        weight: Tensor | None,
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
                    change = f - x.index_select(0, rows)
                    if weight is not None:
                        change = change * weight.index_select(0, rows).view(-1, *[1] * (x.ndim - 1)).to(change)
                    delta.index_copy_(0, rows, change)
        ctx.save_for_backward(delta, kept)
        ctx.dtypes, ctx.ran_shape = (x.dtype, mask.dtype), ran.shape
        return out

    @staticmethod
    @once_differentiable
    @override
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        delta, kept = ctx.saved_tensors
        x_dtype, mask_dtype = ctx.dtypes
        if len(kept) == len(grad):
            grad_x, grad_ran = None, grad
        else:
            grad_x = grad.index_fill(0, kept, 0).to(x_dtype)
            # The dropped row that ran in place of kept ones gets zeros, and so do the weights.
            grad_ran = grad.index_select(0, kept) if len(kept) else grad.new_zeros(ctx.ran_shape)
        # Gates are float32 where the stream has less.
        precise = torch.promote_types(grad.dtype, torch.float32)
        grad_mask = None if delta is None else (delta.to(precise) * grad).flatten(1).sum(1).to(mask_dtype)
        return grad_x, grad_ran, None, grad_mask, None, None, None, None
