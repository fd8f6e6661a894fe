"""Whether the students inside of a student will be known."""

from __future__ import annotations

from collections.abc import Sequence

from ...errors import UserError
from ...protocols.blocks.paths import word_for
from ...pruning.decision import no_order
from ...selection.base import Selector


def depths_text(depths: Sequence[int], selector: Selector, blocks: Sequence[str]) -> str:
    """Return the depths that a recovery trains, in a line of the plan.

    Args:
        depths: numbers of blocks, or branches.
        selector: what decides.
        blocks: paths of the student's.

    Raises:
        UserError: the selector will not say which blocks they are, or the student has no more than one of them.
    """
    if not selector.ranks():
        raise UserError(f"recover.depths: {no_order(type(selector).__name__)}")
    if max(depths) >= len(blocks):
        raise UserError(f"recover.depths: {max(depths)} is no smaller student; this one keeps {len(blocks)}")
    told = f"{', '.join(map(str, sorted(depths)))} of {len(blocks)} {word_for(blocks)}"
    return f"{told}, {min(3, 1 + len(depths))} passes a step"
