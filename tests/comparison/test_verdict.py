"""The verdict of a comparison: which choice is best, how clearly, and against chance."""

from __future__ import annotations

from tinyfusion_core.comparison.results import ComparisonResults, Entry
from tinyfusion_core.comparison.verdict import comparison_title, comparison_verdict

CHOICES = {"search": (0, 1), "Taylor": (0, 1), "Greedy": (0, 2), "LastN": (2, 3)}


def found(losses: dict[str, tuple[float | None, ...]], masks: tuple[float, ...] = ()) -> ComparisonResults:
    entries = [
        Entry(name, seed, CHOICES[name], 1.0, loss) for name, row in losses.items() for seed, loss in enumerate(row)
    ]
    seeds = tuple(range(len(next(iter(losses.values())))))
    return ComparisonResults(
        view="compare", blocks=("b.0", "b.1", "b.2", "b.3"), budget=2, num_masks=6, steps=1000, seeds=seeds,
        teacher=0.08, learned=("search",), entries=tuple(entries),
        masks=tuple(Entry("", 0, (1, 2), 1.0, loss) for loss in masks),
    )  # fmt: skip


def test_a_clear_lead_over_others_and_over_chance() -> None:
    losses = {"search": (0.1, 0.11), "Taylor": (0.1, 0.11), "Greedy": (0.2, 0.21), "LastN": (0.3, 0.3)}
    results = found(losses, masks=(0.25, 0.15))
    assert comparison_title(results) == "4 → 2 blocks: 4 ways to choose beside 2 random subsets"
    assert comparison_verdict(results) == {
        "Best": (
            "search (Taylor chooses the same blocks): held-out loss 0.1050 ± 0.0071 after 1,000 steps of recovery; "
            "the teacher's is 0.08."
        ),
        "How clearly": "Clearly: Greedy is next, 0.1 behind, more than twice the deviation over the seeds (0.01).",
        "Against chance": (
            "search recovers better than 100% of 2 random subsets; no better than half of them: Greedy, LastN."
        ),
    }


def test_a_lead_within_the_spread_and_a_search_that_is_behind() -> None:
    verdict = comparison_verdict(found({"search": (0.101, 0.109), "Greedy": (0.1, 0.105)}, masks=(0.25,)))
    assert verdict["How clearly"] == (
        "Not clearly: search is next, 0.0025 behind, where the deviation over the seeds is 0.0067; try more "
        "seeds or steps."
    )
    assert verdict["Against chance"] == "Greedy recovers better than 100% of 1 random subset."
    assert verdict["The search"] == "search comes in place 2, at 0.1050 ± 0.0057."


def test_what_is_not_known_is_said() -> None:
    verdict = comparison_verdict(found({"search": (0.1,), "Greedy": (0.2,), "LastN": (None,)}))
    assert verdict == {
        "Best": "search: held-out loss 0.1000 after 1,000 steps of recovery; the teacher's is 0.08.",
        "How clearly": "Greedy is next, 0.1 behind; with one seed there is no telling whether that is luck.",
    }
    alone = found({"search": (0.1,), "Taylor": (0.1,)})
    assert comparison_title(alone) == "4 → 2 blocks: 2 ways to choose"
    assert comparison_verdict(alone)["How clearly"] == (
        "Nothing to tell apart: no choice of other blocks has recovered."
    )  # fmt: skip
    assert comparison_verdict(found({"search": (None,)})) == {"Best": "No choice has a finite loss after recovery."}
