"""Reads the files of the result cache of a comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NotRequired, TypedDict

from ..errors import UserError
from ..parsing.records import read_as, shaped

AGAIN = "delete it to compute that again"
NEEDED = {"decision": ("kept", "scores", "seconds", "evaluations"), "calibration": ("loss",), "healing": ("loss",)}
"""What a result of each kind has for certain."""


class CachedResult(TypedDict):
    """A result, of whichever kind, and what decides it."""

    of: dict[str, Any]
    kept: NotRequired[list[int]]
    scores: NotRequired[list[float | None] | None]
    seconds: NotRequired[float]
    evaluations: NotRequired[int]
    loss: NotRequired[float | None]


def read_cached(kind: str, path: Path, num_blocks: int) -> dict[str, Any]:
    """Read the file of a result.

    Args:
        kind: a key of `NEEDED`.
        path: the file.
        num_blocks: how many blocks the network has.

    Raises:
        UserError: it is damaged.
    """
    content: dict[str, Any] = dict(read_as(path, CachedResult, AGAIN))
    if missing := [name for name in NEEDED[kind] if name not in content]:
        raise UserError(f"{path}: {missing[0]!r} is missing; {AGAIN}")
    for name in content.keys() - CachedResult.__annotations__.keys():  # metrics, by the hash of how they were measured
        shaped(content[name], float | None, f"{path}: {name!r}", AGAIN)  # type: ignore[arg-type]  # a type all the same
    kept, scores, blocks = content.get("kept"), content.get("scores"), range(num_blocks)
    if kind == "decision" and not (kept and kept == sorted(set(kept)) and set(kept) <= set(blocks)):
        raise UserError(f"{path}: 'kept' is {kept!r:.60}; expected some of 0 to {num_blocks - 1}, ascending; {AGAIN}")
    if scores is not None and len(scores) != num_blocks:
        raise UserError(f"{path}: 'scores' has {len(scores)}; expected one for each of {num_blocks} blocks; {AGAIN}")
    return content
