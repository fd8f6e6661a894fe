"""Reads and writes which blocks are kept in the formats of other tools."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError
from ..parsing.records import read_text
from ..parsing.yaml12 import load_yaml

Writer = Callable[[Sequence[int], int, str], str]


def ranges(kept: Sequence[int]) -> list[list[int]]:
    """Return the runs of consecutive indices as half-open ranges: 0, 1, 2, 5 -> [[0, 3], [5, 6]]."""
    out: list[list[int]] = []
    for i in kept:
        if out and out[-1][1] == i:
            out[-1][1] = i + 1
        else:
            out.append([i, i + 1])
    return out


def mergekit(kept: Sequence[int], num_blocks: int, model: str) -> str:
    """Return a mergekit YAML: a passthrough merge of slices of one model, with half-open `layer_range`s."""
    slices = [{"sources": [{"model": model, "layer_range": pair}]} for pair in ranges(kept)]
    text: str = yaml.safe_dump({"merge_method": "passthrough", "slices": slices}, sort_keys=False)
    return text


def llama_cpp(kept: Sequence[int], num_blocks: int, model: str) -> str:
    """Return the argument of llama-quantize that removes layers."""
    return f"--prune-layers {','.join(str(i) for i in range(num_blocks) if i not in kept)}\n"


def peft(kept: Sequence[int], num_blocks: int, model: str) -> str:
    """Return `layer_replication` of peft's LoraConfig: half-open ranges."""
    return f"{ranges(kept)}\n"


def indices(kept: Sequence[int], num_blocks: int, model: str) -> str:
    """Return the indices of the kept blocks as a list."""
    return f"{list(kept)}\n"


TEXTS: dict[str, Writer] = {"mergekit": mergekit, "llama.cpp": llama_cpp, "peft": peft, "indices": indices}


def describe_clients(clients: Mapping[str, str]) -> str:
    """Say which tools make the right network of a decision or student, and why the others do not.

    Args:
        clients: what `Backbone.clients` returned.
    """
    right = ", ".join(name for name, reason in clients.items() if not reason) or "none"
    return "; ".join([right, *(f"not {name}: {reason}" for name, reason in clients.items() if reason)])


def read_kept(path: Path, num_blocks: int) -> list[int]:
    """Read the kept blocks from a file in one of these formats.

    Args:
        path: mergekit YAML, a `--prune-layers` argument, a `layer_replication` list, or a list of indices.
        num_blocks: number of blocks of the whole network.

    Raises:
        UserError: the file is missing, in none of these formats, or repeats, reorders or invents blocks.
    """
    text, content = _read(path)
    removed = re.fullmatch(r"\s*--prune-layers[ =]\s*(\d+(?:\s*,\s*\d+)*)\s*", text)
    if removed:
        gone = [int(i) for i in removed[1].split(",")]
        _check(path, sorted(gone), num_blocks)
        return [i for i in range(num_blocks) if i not in gone]
    if isinstance(content, dict) and isinstance(content.get("slices"), list):
        content = [_layer_range(path, piece) for piece in content["slices"]]
    kept = _listed(content)
    if not kept:
        raise UserError(
            f"{path}: not a decision; expected a decision.json, a mergekit YAML with slices, --prune-layers 1,2, a "
            "layer_replication list such as [[0, 4], [6, 8]], or a list of indices"
        )
    _check(path, kept, num_blocks)
    return kept


def _read(path: Path) -> tuple[str, Any]:
    """A file as text, and parsed as YAML. Raises UserError if it is missing or not readable."""
    try:
        text = read_text(path)
        return text, load_yaml(text)
    except yaml.YAMLError as e:
        raise UserError(f"{path}: not readable ({' '.join(str(e).split())})") from None


def _listed(content: Any) -> list[int]:
    """The blocks of a list of indices, or of half-open ranges; empty if it is neither."""
    if not isinstance(content, list):
        return []
    if all(isinstance(i, int) for i in content):
        return list(content)
    if all(isinstance(pair, list) and len(pair) == 2 for pair in content):
        return [i for first, stop in content for i in range(first, stop)]
    return []


def _layer_range(path: Path, piece: Any) -> Any:
    sources = piece.get("sources") if isinstance(piece, dict) else None
    if not sources or len(sources) != 1 or "layer_range" not in sources[0]:
        raise UserError(f"{path}: every slice of a passthrough merge has one source with a layer_range")
    return sources[0]["layer_range"]


def _check(path: Path, blocks: Sequence[int], num_blocks: int) -> None:
    if list(blocks) != sorted(set(blocks)) or not all(0 <= i < num_blocks for i in blocks):
        raise UserError(
            f"{path}: names the blocks {list(blocks)}; expected each at most once, in order, and among 0 to "
            f"{num_blocks - 1}: pruning leaves out, it does not repeat or reorder"
        )
