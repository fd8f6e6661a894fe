"""One call of a block, and running it for some of the samples."""

from __future__ import annotations

import inspect
from collections import UserDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_flatten_with_path, tree_unflatten

from ...errors import UserError
from .streams import Stream, Streams, streams_of


class Call:
    """One call of a block that can be repeated for a subset of its samples.

    Args:
        plain: the block's own forward.
        names: names of its positional parameters.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.
        batch_dim: argument -> batch dimension, or None if all samples share it.

    Attributes:
        changed: names of the arguments that a run has changed in place, the copies for some samples too.
        lost: names of mappings into whose copies for some samples a run has put something, which later blocks miss.
    """

    def __init__(
        self,
        plain: Callable[..., Any],
        names: Sequence[str],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        batch_dim: Callable[[str], int | None],
    ) -> None:
        self.plain, self.names, self.args, self.kwargs = plain, names, args, kwargs
        named, self.spec = leaves_of(names, args, kwargs)
        self.leaves, self.leaf_names = list(named.values()), list(named)
        self.changed: set[str] = set()
        self.lost: set[str] = set()
        self.dims = [batch_dim(name) if isinstance(v, Tensor) else None for name, v in named.items()]

    def stream(self, stream: Stream, path: str) -> Tensor:
        """Return a stream's tensor, (batch, ...), as it enters the block.

        Args:
            stream: the stream.
            path: of the block, for messages.

        Raises:
            UserError: the argument is missing, or is not a tensor.
        """
        name = stream.argument
        if isinstance(name, str) and "." in name and name in self.leaf_names:
            return stream.by_sample(self.leaves[self.leaf_names.index(name)])
        if isinstance(name, str) and name not in self.kwargs:
            if name not in self.names[: len(self.args)]:
                raise UserError(f"block '{path}' was called without its stream argument '{name}'; see 'streams'")
            name = list(self.names).index(name)
        # A stream named by position may still be passed by name.
        if isinstance(name, int) and name >= len(self.args):
            name = self.names[name]
        x = self.kwargs[name] if isinstance(name, str) else self.args[name]
        if not isinstance(x, Tensor):
            raise UserError(
                f"block '{path}': stream argument '{stream.argument}' is a {type(x).__name__}, not a tensor"
            )
        return stream.by_sample(x)

    def given(self, name: str) -> Any:
        """Return an argument, or a part of one, by its name; None if it was not given."""
        return dict(zip(self.leaf_names, self.leaves, strict=True)).get(name)

    def signature(self) -> tuple[Hashable, ...] | None:
        """Return what calls have in common whose outputs have one form, whatever the samples.

        These are names, types, shapes and plain values of the arguments; None if one is an object of another kind,
        which may be anything the next time.
        """
        if not all(isinstance(leaf, Tensor) or is_plain(leaf) for leaf in self.leaves):
            return None
        return tuple(
            (name, v.dtype, (*v.shape[:dim], *v.shape[dim + 1 :]) if dim is not None else v.shape)
            if isinstance(v, Tensor)
            else (name, type(v), v)
            for name, v, dim in zip(self.leaf_names, self.leaves, self.dims, strict=True)
        )

    def run(self, rows: Tensor) -> Any:
        """Run the block for some rows of the batch.

        Args:
            rows: (rows,) indices into the batch; all of them, in order, are run without copying.

        Returns:
            The block's output for these rows.
        """
        # An argument may hold several entries for each sample, such as one for each head.
        size = min((v.shape[d] for v, d in zip(self.leaves, self.dims, strict=True) if d is not None), default=-1)
        if len(rows) == size:
            some, args, kwargs = self.leaves, self.args, self.kwargs
        else:
            some = [v if d is None else _select(v, d, rows, size) for v, d in zip(self.leaves, self.dims, strict=True)]
            args, kwargs = tree_unflatten(some, self.spec)
        before = [version(v) for v in some]
        given = () if some is self.leaves else (*zip(self.names, args, strict=False), *kwargs.items())
        copies = {n: (v, len(v)) for n, v in given if isinstance(v, dict)}
        output = self.plain(*args, **kwargs)
        self.lost.update(n for n, (v, size) in copies.items() if len(v) != size)
        self.changed.update(n for n, v, old in zip(self.leaf_names, some, before, strict=True) if version(v) != old)
        return output


def _select(x: Tensor, dim: int, rows: Tensor, size: int) -> Tensor:
    """The entries of some samples along the batch dimension, of `size` samples with one or several entries each."""
    if x.shape[dim] == size:
        return x.index_select(dim, rows)
    return torch.unflatten(x, dim, (size, -1)).index_select(dim, rows).flatten(dim, dim + 1)


def version(leaf: Any) -> int:
    """Return how often a tensor has been changed in place; 0 for those of inference mode, which are not tracked.

    Args:
        leaf: a tensor of any shape, or something else.
    """
    return leaf._version if isinstance(leaf, Tensor) and not leaf.is_inference() else 0


def is_plain(leaf: Any) -> bool:
    """Return whether this is a value that nobody can change: None, a number, a text, a dtype or a device."""
    return leaf is None or isinstance(leaf, bool | int | float | str | torch.dtype | torch.device)


@dataclass(frozen=True)
class Passage:
    """A stream before and after a block.

    Attributes:
        path: path of the block.
        before: shape and dtype of the stream at the block's input.
        after: the same at its output.
    """

    path: str
    before: tuple[tuple[int, ...], torch.dtype]
    after: tuple[tuple[int, ...], torch.dtype]

    def __str__(self) -> str:
        before, after = (
            f"{list(shape)} {str(dtype).removeprefix('torch.')}" for shape, dtype in (self.before, self.after)
        )
        return (
            f"block '{self.path}' makes {after} of a stream of {before}, so it cannot be skipped; leave it out of "
            "'blocks', or correct 'streams'"
        )


def not_the_batch(path: str, found: int, batch: int) -> str:
    """Say that what should be the batch dimension of a block's stream is another one."""
    return (
        f"block '{path}' is given {found} along the dimension of its stream that should be the batch, for {batch} "
        "samples; say in 'streams' which one it is, as in Stream(batch_dim=1)"
    )


def entering(
    block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], streams: Streams, path: str
) -> list[tuple[Stream, Tensor]]:
    """Return the streams at a block's input, each (batch, ...), for use in forward hooks.

    Args:
        block: the block.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.
        streams: the declared streams of the backbone.
        path: path of the block.
    """
    call = Call(block.forward, positional_names(block.forward), args, kwargs, lambda leaf: None)
    return [(stream, call.stream(stream, path)) for stream in streams_of(streams, path)]


def items_of(output: Any, streams: Sequence[Stream]) -> dict[int | str, Any] | None:
    """Return the parts of a block's output by index or key, its streams by sample.

    Returns:
        The parts; None if the output is no tensor, tuple, list or mapping.
    """
    if isinstance(output, Tensor):
        items: dict[int | str, Any] = {0: output}
    elif isinstance(output, Mapping | tuple | list):
        items = dict(output if isinstance(output, Mapping) else enumerate(output))
    else:
        return None
    return items | {s.item: s.by_sample(x) for s in streams if isinstance(x := items.get(s.item), Tensor)}


def in_the_form_of(output: Any, items: Mapping[int | str, Any], streams: Sequence[Stream]) -> Any:
    """Return such parts in the form of a block's output: one tensor, or a mapping, tuple or list of its type."""
    items = {**items, **{s.item: s.as_given(items[s.item]) for s in streams}}
    if isinstance(output, Tensor):
        return items[0]
    if isinstance(output, Mapping):
        return type(output)(items)  # type: ignore[call-arg]
    values = list(items.values())
    return type(output)._make(values) if hasattr(output, "_make") else type(output)(values)


@contextmanager
def watched_streams(model: nn.Module, blocks: Sequence[str], streams: Streams) -> Iterator[list[Passage]]:
    """Record the shape and dtype of every stream before and after each block call while the context is open."""
    seen: list[Passage] = []

    def note(path: str, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        for stream, x in entering(block, args, kwargs, streams, path):
            y = stream.of(output)
            seen.append(Passage(path, (tuple(x.shape), x.dtype), (tuple(y.shape), y.dtype)))

    hooks = [model.get_submodule(path).register_forward_hook(partial(note, path), with_kwargs=True) for path in blocks]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def positional_names(function: Callable[..., Any]) -> list[str]:
    """Return the names of the positional parameters of a function, in order."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [name for name, p in inspect.signature(function).parameters.items() if p.kind in kinds]


def leaves_of(names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[dict[str, Any], TreeSpec]:
    """Return the leaves of a call by name (`x`, `rotary.0`), the same whether passed by position or by name."""
    paths, spec = tree_flatten_with_path(_opened((args, kwargs)))
    named: dict[str, Any] = {}
    for path, leaf in paths:
        # Each step of a path is a key of a mapping or an index of a sequence.
        steps: list[Any] = [getattr(step, "key", getattr(step, "idx", step)) for step in path]
        side, which, *inner = steps
        top = which if side else names[which] if which < len(names) else f"*{which}"
        named[".".join(map(str, [top, *inner]))] = leaf
    return named, spec


def _opened(tree: Any) -> Any:
    """The same with plain dicts in the place of what has their form, but hides its tensors from torch."""
    leaves, spec = tree_flatten(tree)
    if not any(isinstance(leaf, UserDict) for leaf in leaves):
        return tree
    return tree_unflatten([dict(leaf) if isinstance(leaf, UserDict) else leaf for leaf in leaves], spec)
