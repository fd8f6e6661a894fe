"""A docstring says the shapes of the tensors that a function takes or returns."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from places import ROOT

MODULES = [path for top in ("tinyfusion_core", "plugins") for path in sorted((ROOT / top).rglob("*.py"))]
FIRST = (
    r"\.\.\.|batch|2?B|[nNKTG]|rows|masks|samples|processes|num_blocks|images|grid \* grid|1 \+ terms|\d|last - first"
    r"|channels|rank"
)
SHAPE = re.compile(
    rf"\((?:{FIRST})(?: or \d)?,[^()]*\)"  # (batch, tokens, channels), (batch,), (..., channels)
    r"|\bscalar\b|\bany shape\b|\b(?:the|of) same shape\b|\bthe shape of\b",
)
CALLED = ("__call__", "__getitems__")
Function = ast.FunctionDef | ast.AsyncFunctionDef


def public_functions(body: list[ast.stmt], of: ast.ClassDef | None = None) -> Iterator[tuple[Function, str]]:
    """Public functions and methods without a docstring to inherit, and what is written about them."""
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_functions(node.body, node)
        elif isinstance(node, Function) and (not node.name.startswith("_") or node.name in CALLED):
            about = ast.get_docstring(node)
            if node.name in ("forward", *CALLED) and of is not None:
                about = "\n".join(filter(None, [ast.get_docstring(of), about]))
            if ast.get_docstring(node) is not None or not inherits(node, of):
                yield node, about or ""


def inherits(function: Function, of: ast.ClassDef | None) -> bool:
    """Whether its docstring is another's: of a method of ours that it overrides, not of torch's; of a getter."""
    marks = {ast.unparse(mark).rpartition(".")[2] for mark in function.decorator_list}
    bases = {ast.unparse(base).rpartition(".")[2] for base in (of.bases if of else ())}
    return "setter" in marks or ("override" in marks and (function.name != "forward" or "Module" not in bases))


def takes_tensors(function: Function) -> bool:
    """Whether a tensor is in its signature."""
    given = function.args
    arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    types = [argument.annotation for argument in arguments if argument is not None] + [function.returns]
    return any(re.search(r"\bTensor\b", ast.unparse(kind)) for kind in types if kind is not None)


def without_shapes(source: str) -> list[str]:
    """Public functions with a tensor in the signature and no shape in the docstring."""
    found = public_functions(ast.parse(source).body)
    return [function.name for function, about in found if takes_tensors(function) and not SHAPE.search(about)]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_shapes_are_said(path: Path) -> None:
    assert without_shapes(path.read_text()) == []


def test_the_check_finds_what_it_is_for() -> None:
    source = '''
def silent(x: Tensor) -> float:
    """Halve x (slowly, as in equation 3)."""

def said(x: Tensor) -> Tensor:
    """Halve x, (batch, tokens)."""

def spread(*, parts: "Sequence[Tensor]") -> int:
    """Count them."""

def _private(x: Tensor) -> Tensor: ...

class Network(nn.Module):
    """A network."""

    @override
    def forward(self, x: Tensor) -> Tensor:
        return x

    @override
    def losses(self, x: Tensor) -> Tensor: ...

    @override
    def loss(self, x: Tensor) -> Tensor:
        """In nats."""

    @property
    def mask(self) -> Tensor | None:
        """The mask."""

    @mask.setter
    def mask(self, mask: Tensor | None) -> None: ...

class Pooled(nn.Module):
    """Maps (batch, channels) to (batch,)."""

    @override
    def forward(self, x: Tensor) -> Tensor:
        return x.sum(1)
'''
    assert without_shapes(source) == ["silent", "spread", "forward", "loss", "mask"]
