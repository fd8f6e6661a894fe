"""Mistakes in a race: who enters, who is judged on what, who goes on."""

from __future__ import annotations

from mutations.mutation import Mutation

HEATS, PAIRED, RECOVERIES, SURROGATE = (
    f"selection/judging/{name}.py" for name in ("heats", "paired", "recoveries", "surrogate")
)
TESTS = "selection/test_race.py::"

MUTATIONS = [
    Mutation(
        "entrants are trained on what judges them",
        RECOVERIES,
        "replace(self.task, train=rest, model=self.task.teacher)",
        "self.task",
        (TESTS + "test_a_race_judges_by_samples_that_it_did_not_train_on",),
    ),
    Mutation(
        "neighbours do not enter",
        HEATS,
        "[: min(at_once, left)]",
        "[:0]",
        (TESTS + "test_neighbours_of_the_best_are_tried_and_followed",),
    ),
    Mutation(
        "neighbours enter in any order",
        HEATS,
        "found.argsort(stable=True)",
        "(-found).argsort(stable=True)",
        (TESTS + "test_neighbours_of_the_best_are_tried_and_followed",),
    ),
    Mutation(
        "the surrogate knows of no pairs",
        SURROGATE,
        "(s + s.square()) / 2",
        "s",
        ("selection/test_surrogate.py::test_it_agrees_with_the_formula_of_a_gaussian_process",),
    ),
    Mutation(
        "any lower loss takes the lead",
        PAIRED,
        "best if leader is None or _worse(losses[leader], losses[best], sure) else leader",
        "best",
        (TESTS + "test_a_leader_is_replaced_only_by_who_is_surely_better",),
    ),
    Mutation(
        "differences are not paired",
        PAIRED,
        "float(paired.std()) / math.sqrt(len(paired))",
        "float((losses.var() + of.var()).sqrt()) / math.sqrt(len(paired))",
        (TESTS + "test_a_leader_is_replaced_only_by_who_is_surely_better",),
    ),
    Mutation(
        "who has diverged goes on",
        PAIRED,
        "(mask for mask in means if math.isfinite(means[mask]))",
        "means",
        (TESTS + "test_a_third_goes_on_however_far_behind",),
    ),
    Mutation(
        "all go on",
        PAIRED,
        "*others[: max(1, math.ceil(len(losses) / 3) - 1)]",
        "*others",
        (TESTS + "test_a_third_goes_on_however_far_behind",),
    ),
]
