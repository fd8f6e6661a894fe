"""The verdict of a comparison in words: which choice recovers best, how clearly, and whether it beats chance."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .results import ComparisonResults
from .statistics import RANDOM, Summary, reference, summaries


def comparison_title(results: ComparisonResults) -> str:
    """Return what was compared: `8 → 4 blocks: 7 choices beside 20 random subsets`."""
    count, masks = len(dict.fromkeys(e.method for e in results.entries)), len(reference(results, results.seeds[0]))
    beside = f" beside {masks} random subset{'s' if masks > 1 else ''}" if masks else ""
    what = f"{count} way{'s' if count > 1 else ''} to {'choose and recover' if results.recoveries else 'choose'}"
    return f"{len(results.blocks)} → {results.kept}: {what}{beside}"


def comparison_verdict(results: ComparisonResults) -> dict[str, str]:
    """Return the verdict as sentences by what they are about, in the order of reading."""
    ranked = [s for s in summaries(results) if s.name != RANDOM and s.recovered.mean is not None]
    if not ranked:
        return {"Best": "No choice has a finite loss after recovery."}
    found = {"Best": _best(ranked, results), "How clearly": _lead(ranked, results)}
    masks = len(reference(results, results.seeds[0]))
    if masks:
        found["Against chance"] = _against_chance(ranked, masks)
    searches = [s for s in ranked if s.name in results.learned]
    if searches and not results.recoveries and ranked[0].name not in results.learned:
        first = searches[0]
        found["The search"] = f"{first.name} comes in place {ranked.index(first) + 1}, at {first.recovered.text()}."
    return found


def _best(ranked: Sequence[Summary], results: ComparisonResults) -> str:
    best, teacher = ranked[0], results.teacher
    same = [s.name for s in ranked[1:] if s.same_as(best)]
    too = f" ({', '.join(same)} cho{'se' if len(same) > 1 else 'oses'} the same blocks)" if same else ""
    steps = f"{results.steps_of(best.recovery):,} steps of recovery"
    text = f"{best.name}{too}: held-out loss {best.recovered.text()} after {steps}"
    return f"{text}; the teacher's is {teacher:.4g}." if teacher is not None else f"{text}."


def _lead(ranked: Sequence[Summary], results: ComparisonResults) -> str:
    """How far the next one, of other blocks or another recovery, is behind, against the spread over the seeds."""
    best = ranked[0]
    other = next((s for s in ranked[1:] if not s.same_as(best)), None)
    if other is None:
        return "Nothing to tell apart: no choice of other blocks has recovered."
    gap = (other.recovered.mean or 0.0) - (best.recovered.mean or 0.0)
    text = f"{other.name} is next, {gap:.2g} behind"
    if len(results.seeds) < 2:
        return f"{text}; with one seed there is no telling whether that is luck."
    spread = math.hypot(best.recovered.sd or 0.0, other.recovered.sd or 0.0)
    if gap > 2 * spread:
        return f"Clearly: {text}, more than twice the deviation over the seeds ({spread:.2g})."
    return f"Not clearly: {text}, where the deviation over the seeds is {spread:.2g}; try more seeds or steps."


def _against_chance(ranked: Sequence[Summary], masks: int) -> str:
    shares = {s.name: s.better.mean for s in ranked if s.better.mean is not None}
    (best, share), *_ = shares.items()
    text = f"{best} recovers better than {share:.0%} of {masks} random subset{'s' if masks > 1 else ''}"
    worse = [name for name, value in shares.items() if value <= 0.5]
    return f"{text}; no better than half of them: {', '.join(worse)}." if worse else f"{text}."
