"""Mistakes in the search, in criteria and calibration, in successive halving and in evaluation."""

from __future__ import annotations

from mutations.mutation import Mutation

SEARCH = "selection/search.py"
SEARCHED = "selection/test_search.py::"
OPTIONS = "selection/test_search_options.py::"
LOSS = "selection/gated_loss.py"
CALIBRATION = "selection/calibration.py"
CRITERIA = "selection/test_criteria.py::"
BY_HAND = "selection/test_criteria_by_hand.py::"
SIMILARITY = "selection/similarity.py"
HALVING = "selection/successive_halving.py"
HALVED = "selection/test_finals.py::test_the_final_heals_the_best_masks_and_keeps_the_winner"
METRICS = "evaluation/metrics.py"
EVALUATED = "evaluation/test_evaluation.py::"

SEARCHES = [
    Mutation(
        "the averaged sampler is not annealed at the end",
        SEARCH,
        "averaged.anneal(1.0)",
        "pass",
        ("selection/test_search.py", "selection/test_search_options.py"),
    ),
    Mutation(
        "a long search moves the weights faster",
        SEARCH,
        "min(1e-3, 1 / self.steps)",
        "max(1e-3, 1 / self.steps)",
        (SEARCHED + "test_a_short_search_moves_the_weights_faster",),
    ),
    Mutation(
        "the global generator is not restored",
        SEARCH,
        "with torch.random.fork_rng(), undisturbed(model):",
        "with undisturbed(model):",
        (SEARCHED + "test_the_search_leaves_the_global_generator_alone",),
    ),
    Mutation(
        "the sampler as it is decides, not its average",
        SEARCH,
        "return Learned(averaged.cpu(),",
        "return Learned(sampler.cpu(),",
        ("selection/test_search.py", "selection/test_search_options.py"),
    ),
    Mutation(
        "the weights of dropped values have a mean below one",
        LOSS,
        "< share).to(mask) / share",
        "< share).to(mask)",
        ("selection/test_search.py", "selection/test_search_options.py"),
    ),
    Mutation(
        "the values of a share and of its complement are mistaken for each other",
        LOSS,
        'rng.uniform("dropped values", *mask.shape) < share',
        'rng.uniform("dropped values", *mask.shape) >= share',
        ("selection/test_search.py", "selection/test_search_options.py"),
    ),
    Mutation(
        "the masks of a sample are drawn from the streams of its neighbours",
        LOSS,
        "first=rng.first * copies",
        "first=rng.first",
        ("selection/test_search.py", "selection/test_search_options.py"),
    ),
    Mutation(
        "copies of a sample do not lie side by side",
        LOSS,
        "value.repeat_interleave(copies, 0)",
        "value.repeat(copies, *[1] * (value.ndim - 1))",
        (OPTIONS + "test_every_mask_of_a_sample_sees_the_same_draws",),
    ),
    Mutation(
        "gates learn one step late",
        LOSS,
        "self.learning = progress >= self.warmup",
        "self.learning = progress > self.warmup",
        (SEARCHED + "test_the_first_step_of_the_gates_is_as_long_after_a_warmup_as_without",),
    ),
    Mutation(
        "schedules do not reach their ends after a warm-up",
        LOSS,
        "(progress - self.warmup) / (1 - self.warmup)",
        "progress - self.warmup",
        (SEARCHED + "test_every_logged_step_tells_the_state_of_the_search",),
    ),
    Mutation(
        "a search is as sure as its surest choice",
        LOSS,
        "return min(self.unregistered[1].confidence()) >= self.confident",
        "return max(self.unregistered[1].confidence()) >= self.confident",
        ("selection/test_search.py", "selection/test_search_options.py"),
    ),
    Mutation(
        "a start that fades has a say in the decision",
        LOSS,
        "averaged.prior = averaged.prior_schedule[1]",
        "pass",
        (OPTIONS + "test_a_prior_that_fades_makes_no_search_confident",),
    ),
    Mutation(
        "gates move before they learn",
        LOSS,
        "mask = draw.mask if self.learning else draw.mask.detach()",
        "mask = draw.mask",
        (SEARCHED + "test_the_gates_wait_for_the_warmup",),
    ),
]

CRITERIA_AND_HALVING = [
    Mutation(
        "every batch of calibration samples draws like the first",
        CALIBRATION,
        "first=rows.start, strata",
        "first=0, strata",
        (CRITERIA + "test_every_criterion_sees_the_same_inputs_spread_over_the_data_and_the_time_steps",),
    ),
    Mutation(
        "slopes of both signs cancel",
        CALIBRATION,
        "gradient.abs().sum(0)",
        "gradient.sum(0).abs()",
        (BY_HAND + "test_taylor_by_hand",),
    ),
    Mutation(
        "the calibration loss is a sum",
        CALIBRATION,
        "(totals / self.num_samples).nan_to_num",
        "totals.nan_to_num",
        (BY_HAND + "test_leave_one_out_by_hand",),
    ),
    Mutation(
        "block influence compares with an input that has been changed in place",
        CALIBRATION,
        "call.stream(stream, path).clone()",
        "call.stream(stream, path)",
        (BY_HAND + "test_a_block_that_works_in_place_is_still_compared_with_its_input",),
    ),
    Mutation(
        "the mean similarity counts batches, not tokens",
        SIMILARITY,
        "values.numel()",
        "len(values)",
        (BY_HAND + "test_block_influence_by_hand",),
    ),
    Mutation(
        "moments of batches merge with the wrong weight",
        SIMILARITY,
        "(self.count * n / both)",
        "(n * n / both)",
        (BY_HAND + "test_streamed_cka_is_that_of_all_tokens_at_once",),
    ),
    Mutation(
        "features are not centred",
        SIMILARITY,
        "x, y = x - means[0], y - means[1]",
        "pass",
        (BY_HAND + "test_streamed_cka_is_that_of_all_tokens_at_once",),
    ),
    Mutation(
        "a span reaches over blocks of another list that lie between",
        SIMILARITY,
        "if run[-1] - run[0] == size - 1]",
        "if run[-1] - run[0] >= size - 1]",
        ("selection/test_criteria.py", "selection/test_criteria_by_hand.py"),
    ),
    Mutation(
        "the block that matters least is kept",
        "selection/sensitivity.py",
        "[loss - full for loss in losses]",
        "[full - loss for loss in losses]",
        (BY_HAND + "test_leave_one_out_by_hand",),
    ),
    Mutation(
        "greedy removes by the losses of the first round",
        "selection/sensitivity.py",
        "masks = [[j for j in kept if j not in unit] for unit in candidates]",
        "masks = [[j for j in range(constraints.num_blocks) if j not in unit] for unit in candidates]",
        (BY_HAND + "test_greedy_sees_what_belongs_together",),
    ),
    Mutation(
        "greedy removes the block that costs most",
        "selection/sensitivity.py",
        "lowest += calibration.finite([min(losses)])",
        "lowest += calibration.finite([max(losses)])",
        (BY_HAND + "test_greedy_sees_what_belongs_together",),
    ),
    Mutation(
        "evenly spaced blocks start at the first",
        "selection/criteria.py",
        "(i + 1) * size // num_kept - 1",
        "i * size // num_kept",
        (CRITERIA + "test_positions",),
    ),
    Mutation(
        "a smaller budget forgets the decision",
        "selection/criteria.py",
        "p + (i in decision.kept)",
        "p",
        ("pipeline/test_budgets.py", "testing/test_core_classes.py::test_a_decision_that_a_search_has_nested"),
    ),
    Mutation(
        "less than half of the finalists go on",
        HALVING,
        "best[: (len(students) + 1) // 2]",
        "best[: len(students) // 2]",
        (HALVED,),
    ),
    Mutation(
        "the worse half of the finalists goes on",
        HALVING,
        "sorted(losses, key=losses.__getitem__)",
        "sorted(losses, key=losses.__getitem__, reverse=True)",
        (HALVED,),
    ),
    Mutation(
        "every round of the finals draws like the first",
        HALVING,
        'stage=f"finals {number}")',
        'stage="finals 1")',
        ("training/test_faults.py::test_an_interrupted_final_recovers_nothing_twice",),
    ),
    Mutation(
        "another winner has the confidence of the search's own mask",
        HALVING,
        "decision.confidences if winner == decision.kept else ()",
        "decision.confidences",
        (HALVED,),
    ),
]

EVALUATION = [
    Mutation(
        "a teacher that is hardly better than nothing passes",
        "evaluation/evaluate.py",
        "if not learned < 0.9 * trivial:",
        "if not learned < 1.1 * trivial:",
        ("evaluation", "training/test_distill.py::test_a_teacher_that_knows_nothing_stops_the_run"),
    ),
    Mutation(
        "a teacher whose loss is no number passes",
        "evaluation/evaluate.py",
        "if not learned < 0.9 * trivial:",
        "if learned >= 0.9 * trivial:",
        ("evaluation", "training/test_distill.py::test_a_teacher_that_knows_nothing_stops_the_run"),
    ),
    Mutation(
        "generated classes are compared with those of the first batch",
        "evaluation/frechet.py",
        "classes[rows.start : rows.stop]",
        "classes[: len(rows)]",
        ("evaluation/test_evaluation.py",),
    ),
    Mutation(
        "the Fréchet distance is between the real examples and themselves",
        "evaluation/frechet.py",
        "fid_statistics_to_metric(fid_features_to_statistics(features), reference",
        "fid_statistics_to_metric(reference, reference",
        (EVALUATED + "test_frechet_distance_and_accuracy_know_real_images_from_none",),
    ),
    Mutation(
        "the held-out loss is a mean of batches",
        METRICS,
        "float(torch.cat(map_sharded(parts, losses)).double().mean())",
        "float(torch.stack([part.mean() for part in map_sharded(parts, losses)]).double().mean())",
        (EVALUATED + "test_held_out_loss_is_the_mean_of_fixed_draws_at_any_batch_size",),
    ),
    Mutation(
        "all draws of the held-out loss are the same",
        METRICS,
        'Rng(0, "held out", draw, rows.start, strata=num)',
        'Rng(0, "held out", 0, rows.start, strata=num)',
        ("evaluation/test_evaluation.py",),
    ),
    Mutation(
        "held-out draws are not spread over the samples",
        METRICS,
        'Rng(0, "held out", draw, rows.start, strata=num)',
        'Rng(0, "held out", draw, rows.start)',
        ("evaluation/test_evaluation.py",),
    ),
    Mutation(
        "every batch is generated from the noise of the first",
        "evaluation/generation.py",
        'Rng(trainer.seed, "generate", first=rows.start)',
        'Rng(trainer.seed, "generate")',
        (EVALUATED + "test_generated_examples_do_not_depend_on_the_batch",),
    ),
]

MUTATIONS = [*SEARCHES, *CRITERIA_AND_HALVING, *EVALUATION]
