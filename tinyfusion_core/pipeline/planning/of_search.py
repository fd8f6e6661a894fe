"""Whether a recovery will find what it takes from the search before it."""

from __future__ import annotations

from collections.abc import Sequence

from ...errors import UserError
from ...protocols.blocks.paths import word_for
from ...pruning.decision import no_order
from ...selection.base import Selector
from ...selection.search import Search
from ...training.recover import Recover
from ...training.starts.inherit import Inherit


def from_search(how: Recover, selector: Selector, blocks: Sequence[str]) -> list[tuple[str, str]]:
    """Return the rows of the plan about what a recovery takes from its search: the depths that it trains.

    Args:
        how: the recovery.
        selector: what decides.
        blocks: paths of the student's blocks, or branches.

    Raises:
        UserError: the selector will not say which blocks smaller students keep, or leaves no weights to inherit; or the
            student has no more blocks than one of the depths.
    """
    check_inherited(how, selector)
    if not (depths := how.depths):
        return []
    if not selector.ranks():
        raise UserError(f"recover.depths: {no_order(type(selector).__name__)}")
    if max(depths) >= len(blocks):
        raise UserError(f"recover.depths: {max(depths)} is no smaller student; this one keeps {len(blocks)}")
    told = f"{', '.join(map(str, sorted(depths)))} of {len(blocks)} {word_for(blocks)}"
    return [("depths", f"{told}, {min(3, 1 + len(depths))} passes a step")]


def check_inherited(how: Recover, selector: Selector | None) -> None:
    """Check that a recovery finds weights to begin with, if it inherits those of its search.

    Args:
        how: the recovery.
        selector: what decides; None in a comparison.

    Raises:
        UserError: the selector will have left none.
    """
    if not isinstance(how.start, Inherit):
        return
    if selector is None:
        raise UserError("recover.start: Inherit is for a run, since a comparison keeps nothing of what searches train")
    if not isinstance(selector, Search):
        raise UserError(
            f"recover.start: Inherit begins with what a search has trained, and {type(selector).__name__} trains "
            "nothing that the student could begin with; take search: {class_path: Search}, or leave start out"
        )
    if not selector.keep_update:
        raise UserError("search.keep_update is false, and recover.start: Inherit needs what the search has trained")
