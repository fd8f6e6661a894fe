"""Mistakes in caches of a teacher's predictions, in the judgements of a training and in its schedule."""

from __future__ import annotations

from mutations.mutation import Mutation

CACHED = "training/test_teacher_cache.py::"
SCHEDULED = "training/test_recovery_schedules.py::"
SETTINGS = "training/teacher_cache/settings.py"
SAMPLES = "training/teacher_cache/samples.py"
VALIDATION = "training/validation.py"
FORECAST = "training/forecasting/forecast.py"
FORESEEN = "training/test_forecast.py::"
DEPTHS = "training/depths.py"
AT_DEPTHS = "training/test_depths.py::"
REFIT = "training/starts/refit.py"
REFITTED = "training/test_refit.py::"
FUSE = "training/starts/fuse.py"
FUSED = "training/test_fuse.py::"

MAKING_UP_FOR_GAPS = [
    Mutation(
        "a fused block becomes what the teacher's is, not the end of its gap",
        FUSE,
        "theirs[max(decision.kept[own], *dropped)]",
        "theirs[decision.kept[own]]",
        (FUSED + "test_what_linear_blocks_did_is_done_by_those_beside_them",),
    ),
    Mutation(
        "what was learned of dropped blocks is not kept",
        FUSE,
        "block.get_parameter(name).copy_(weight)",
        "block.get_parameter(name)",
        (FUSED + "test_what_linear_blocks_did_is_done_by_those_beside_them",),
    ),
    Mutation(
        "coefficients begin at random",
        FUSE,
        "torch.zeros(len(other), rank",
        "torch.ones(len(other), rank",
        (FUSED + "test_without_coefficients_it_is_the_pruned_network_bit_for_bit",),
    ),
    Mutation(
        "finalists begin anew in every round",
        "selection/successive_halving.py",
        "self.recovery if number == 1 else replace(self.recovery, start=None)",
        "self.recovery",
        ("selection/test_finals.py::test_finalists_begin_as_the_recovery_will",),
    ),
    Mutation(
        "a start is fitted to what judges the recovery",
        "training/recover.py",
        "replace(task, train=data, model=task.teacher)",
        "task",
        (REFITTED + "test_it_is_not_fitted_to_the_samples_that_judge",),
    ),
    Mutation(
        "relations are not seen from the mean token",
        "training/distilling/losses.py",
        "tokens - tokens.mean(1, keepdim=True)",
        "tokens",
        ("training/test_features.py::test_relations_are_cosines_from_the_mean_token",),
    ),
    Mutation(
        "the shift is left out",
        REFIT,
        "@ bias + found[:, width])",
        "@ bias)",
        (REFITTED + "test_what_linear_blocks_did_is_made_up_for",),
    ),
    Mutation(
        "a bias does not follow the map",
        REFIT,
        "bias + found[:, :width] @ bias +",
        "bias +",
        (REFITTED + "test_what_linear_blocks_did_is_made_up_for",),
    ),
    Mutation(
        "a token counts with its gate instead of its square",
        "training/starts/least_squares.py",
        "torch.stack(self._gates).square()",
        "torch.stack(self._gates)",
        (REFITTED + "test_the_map_is_that_of_numpy",),
    ),
    Mutation(
        "the second batch replaces the first",
        "training/starts/least_squares.py",
        "right if self._right is None else self._right + right",
        "right",
        (REFITTED + "test_the_map_is_that_of_numpy",),
    ),
    Mutation(
        "a group is made up for at its end only",
        REFIT,
        "whole if backbone.units else replace(whole, choices=())",
        "whole",
        (REFITTED + "test_a_group_that_was_decided_by_itself_is_made_up_for_gap_by_gap",),
    ),
    Mutation(
        "a layer is taken whatever comes behind it",
        "training/starts/output_layer.py",
        "if _alike(call.given(layer, size * direction) - without, (gate * size * direction)[:, None]):",
        "if True:",
        (REFITTED + "test_the_layer_is_found_whose_output_is_added",),
    ),
]

LEARNING_FROM_FILES = [
    Mutation(
        "every draw of a sample is the first",
        SETTINGS,
        "rows=tuple(batch[ROW].tolist())",
        "rows=tuple(row % len(self.samples) for row in batch[ROW].tolist())",
        (CACHED + "test_two_draws_of_a_sample_differ_and_a_row_is_always_the_same",),
    ),
    Mutation(
        "the student sees draws of its own",
        SAMPLES,
        "return {**self.draws.prepare(own), **theirs}",
        "return {**self.draws.task.loss.prepare(own, rng), **theirs}",
        (CACHED + "test_two_draws_of_a_sample_differ_and_a_row_is_always_the_same",),
    ),
    Mutation(
        "the weights of the teacher do not matter",
        SAMPLES,
        '"weights": _hash(task.teacher.state_dict())',
        '"weights": ""',
        (CACHED + "test_predictions_of_something_else_are_refused",),
    ),
    Mutation(
        "a shard that was cut short counts as done",
        "training/teacher_cache/writing.py",
        "return bool(read_shard(str(self.folder), self._record(rows)))",
        "return bool(self._record(rows))",
        (CACHED + "test_what_was_interrupted_goes_on_and_what_is_damaged_is_made_anew",),
    ),
]

JUDGING_WHAT_IS_TRAINED = [
    Mutation(
        "the last judgement is the best",
        VALIDATION,
        "if self.latest < self.best:",
        "if True:",
        (SCHEDULED + "test_the_best_is_kept_and_what_judges_is_not_trained_on",),
    ),
    Mutation(
        "the best weights go on moving",
        VALIDATION,
        "t.detach().cpu().clone()",
        "t.detach()",
        (SCHEDULED + "test_the_best_is_kept_and_what_judges_is_not_trained_on",),
    ),
    Mutation(
        "a forecast does not know how wrong the law was",
        FORECAST,
        "sum(o * o for o in off)",
        "0 * sum(o * o for o in off)",
        (FORESEEN + "test_the_range_is_as_wide_as_the_law_was_wrong_before",),
    ),
    Mutation(
        "a forecast may be worse than the best, which is kept",
        FORECAST,
        "high = min(self.best - self.teacher, self._lacking((self.exponent + self.spread) * ahead))",
        "high = self._lacking((self.exponent + self.spread) * ahead)",
        (FORESEEN + "test_the_range_is_as_wide_as_the_law_was_wrong_before",),
    ),
    Mutation(
        "a first forecast is made from the first judgements",
        FORECAST,
        "if step >= begin",
        "if step >= 0",
        (FORESEEN + "test_the_first_stays_and_the_newest_follows",),
    ),
    Mutation(
        "patience counts all judgements",
        VALIDATION,
        "self.best, self.best_step, self.judged = self.latest, step, 0",
        "self.best, self.best_step = self.latest, step",
        (SCHEDULED + "test_patience_ends_it",),
    ),
    Mutation(
        "with a cache what judges is trained on",
        SETTINGS,
        "if self.samples[row % num] in some]",
        "if self.samples[row % num] in some and row < num]",
        (SCHEDULED + "test_with_a_cache_no_draw_of_what_judges_is_trained_on",),
    ),
    Mutation(
        "the fall begins where it would without a warm-up",
        "training/objective.py",
        "schedule((step - num) / max(1, steps - 1 - num))",
        "schedule(progress)",
        (SCHEDULED + "test_the_rate_rises_and_then_falls",),
    ),
    Mutation(
        "the end of a list is beside the next list",
        "pruning/decision.py",
        "pairs = [pair for members in block_lists(self.blocks).values() for pair in pairwise(members)]",
        "pairs = list(pairwise(range(len(self.blocks))))",
        (SCHEDULED + "test_blocks_beside_gaps_are_those_next_to_removed_ones_in_their_list",),
    ),
]

AT_SEVERAL_DEPTHS = [
    Mutation(
        "shallower students count as much as the whole one alone would",
        DEPTHS,
        "return total / (1 + SHARE * len(depths)), losses",
        "return total, losses",
        (AT_DEPTHS + "test_a_step_is_the_mean_of_the_whole_and_of_those_inside",),
    ),
    Mutation(
        "the whole student learns from the shallower ones",
        DEPTHS,
        "x.detach() if isinstance(x, Tensor) else x",
        "x",
        (AT_DEPTHS + "test_the_whole_student_is_not_drawn_to_those_inside",),
    ),
    Mutation(
        "of several depths blocks are recomputed whole",
        "training/recover.py",
        "for p in task.backbone.unit_paths(student)] if self.depths",
        "for p in task.backbone.block_paths(student)] if self.depths",
        (AT_DEPTHS + "test_recomputed_blocks_change_no_number",),
    ),
    Mutation(
        "keys of removed blocks stay in an adapter",
        "pipeline/exporting/adapters.py",
        "if (new := moves[block]) is None or any(",
        "if (new := moves[block] or block) is None or any(",
        ("pipeline/test_adapters.py::test_how_keys_are_renamed",),
    ),
]

MUTATIONS = [*MAKING_UP_FOR_GAPS, *LEARNING_FROM_FILES, *JUDGING_WHAT_IS_TRAINED, *AT_SEVERAL_DEPTHS]
