"""What a block hands on, as the return statement of its forward names it."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Sequence

from torch import nn

from tinyfusion_core.errors import UserError
from tinyfusion_core.protocols.blocks.streams import Stream

HANDED_ON: dict[str, Sequence[str]] = {"Cosmos3VLTextMoTDecoderLayer": ("und_seq", "gen_seq")}
"""Arguments that blocks hand on, by class, in the order of their outputs; where the return statement does not say."""


def streams_of_block(block: nn.Module) -> tuple[Stream, ...]:
    """Return the residual streams of a block, in the order of its arguments.

    A block that returns `encoder_hidden_states, hidden_states` hands on the arguments of these names. One that returns
    a single expression hands on its first argument. Of several return statements the shortest counts: the others give
    out more on demand.

    Raises:
        UserError: it returns several tensors of other names, and `HANDED_ON` does not name it.
    """
    kind = type(block)
    arguments = list(inspect.signature(kind.forward).parameters)[1:]
    names = HANDED_ON[kind.__name__] if kind.__name__ in HANDED_ON else _returned(kind, arguments)
    return streams_in(names, sorted(names, key=arguments.index))


def streams_in(outputs: Sequence[str], order: Sequence[str] | None = None) -> tuple[Stream, ...]:
    """Return the streams of a block whose outputs are these arguments; a single one is its output, or the first."""
    if len(outputs) == 1:
        return (Stream(outputs[0]),)
    return tuple(Stream(name, outputs.index(name)) for name in order or outputs)


def _returned(kind: type[nn.Module], arguments: Sequence[str]) -> Sequence[str]:
    """The arguments that a block returns, in this order."""
    unknown = UserError(
        f"backbone: what {kind.__name__} hands on cannot be read from its source; name it in backbone.lists: for every "
        "list of blocks the arguments that they return, in this order"
    )
    try:
        source = textwrap.dedent(inspect.getsource(kind.forward))
    except OSError:
        raise unknown from None
    returns = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Return) and node.value]
    if not returns:
        raise unknown
    parts = min((value.elts if isinstance(value, ast.Tuple) else [value] for value in returns), key=len)
    names = [part.id if isinstance(part, ast.Name) else "" for part in parts]
    if set(names) <= set(arguments) and len(set(names)) == len(names):
        return names
    tuples = "tuple" in str(inspect.signature(kind.forward).return_annotation).lower()
    if len(names) > 1 or tuples:
        raise unknown
    return arguments[:1]
