"""Mistakes in the search, in criteria and calibration, in successive halving and in evaluation."""

from __future__ import annotations

from mutations.mutation import Mutation

SEARCH = "selection/search.py"
SEARCHED = "selection/test_search.py::"
OPTIONS = "selection/test_search_options.py::"
LOSS = "selection/learning/gated_loss.py"
WEIGHTS = "pruning/test_weight_updates.py::"
GATED = "selection/test_gated_loss.py::"
DROPPED = "pruning/test_dropped_values.py::test_a_share_of_the_values_is_weighted_to_a_mean_of_one"
CALIBRATION = "selection/criteria/calibration.py"
CRITERIA = "selection/test_criteria.py::"
BY_HAND = "selection/test_criteria_by_hand.py::"
SIMILARITY = "selection/criteria/similarity.py"
HALVING = "selection/successive_halving.py"
HALVED = "selection/test_finals.py::test_the_final_heals_the_best_masks_and_keeps_the_winner"
TEACHERS = "evaluation/test_teacher_check.py::"
METRICS = "evaluation/metrics.py"
EVALUATED = "evaluation/test_evaluation.py::"

SEARCHES = [
    Mutation(
        "the averaged sampler is not annealed at the end",
        SEARCH,
        "averaged.anneal(1.0)",
        "pass",
        (GATED + "test_the_averaged_sampler_decides_as_it_is_after_the_last_step",),
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
        "with torch.random.fork_rng(), undisturbed(model), ExitStack() as stack:",
        "with undisturbed(model), ExitStack() as stack:",
        (SEARCHED + "test_the_search_leaves_the_global_generator_alone",),
    ),
    Mutation(
        "the sampler as it is decides, not its average",
        SEARCH,
        "return Learned(averaged.cpu(),",
        "return Learned(sampler.cpu(),",
        (SEARCHED + "test_every_logged_step_tells_the_state_of_the_search",),
    ),
    Mutation(
        "gates decay like weights",
        SEARCH,
        '"lr": self.lr_gates or sampler.lr_gates, "weight_decay": 0.0}',
        '"lr": self.lr_gates or sampler.lr_gates, "weight_decay": self.weight_decay}',
        (WEIGHTS + "test_gates_do_not_decay",),
    ),
    Mutation(
        "LoRA's update is not scaled by alpha / rank",
        "pruning/weight_update.py",
        "lora_alpha=self.alpha",
        "lora_alpha=self.rank",
        (WEIGHTS + "test_lora_adds_alpha_over_rank_times_its_product",),
    ),
    Mutation(
        "a full update stays in the network",
        "protocols/undisturbed.py",
        "p.copy_(values)",
        "pass",
        (WEIGHTS + "test_the_weights_of_a_full_update_come_back_bit_for_bit",),
    ),
    Mutation(
        "the weights of dropped values have a mean below one",
        LOSS,
        "< share).to(mask.dtype) / share",
        "< share).to(mask.dtype)",
        (DROPPED,),
    ),
    Mutation(
        "the values of a share and of its complement are mistaken for each other",
        LOSS,
        'rng.uniform("dropped values", *mask.shape) < share',
        'rng.uniform("dropped values", *mask.shape) >= share',
        (DROPPED,),
    ),
    Mutation(
        "the masks of a sample are drawn from the streams of its neighbours",
        LOSS,
        "first=rng.first * copies",
        "first=rng.first",
        (GATED + "test_passes_over_parts_of_a_batch_draw_the_masks_of_the_whole",),
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
        (GATED + "test_schedules_begin_when_the_gates_do",),
    ),
    Mutation(
        "a search is as sure as its surest choice",
        LOSS,
        "return min(self.unregistered[1].confidence()) >= self.confident",
        "return max(self.unregistered[1].confidence()) >= self.confident",
        (GATED + "test_a_search_is_as_sure_as_its_least_certain_choice",),
    ),
    Mutation(
        "a start that fades has a say in the decision",
        LOSS,
        "averaged.prior = averaged.prior_schedule[1]",
        "pass",
        (OPTIONS + "test_a_prior_that_fades_makes_no_search_confident",),
    ),
    Mutation(
        "gates that wait have a gradient, which counts in the norm that is clipped",
        LOSS,
        "mask = draw.mask if self.learning else draw.mask.detach()",
        "mask = draw.mask",
        (GATED + "test_gates_that_wait_have_a_gradient_of_zero_not_none",),
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
        "self.sample_losses(masks, note).mean(1)",
        "self.sample_losses(masks, note).sum(1)",
        (BY_HAND + "test_leave_one_out_by_hand",),
    ),
    Mutation(
        "block influence compares with an input that has been changed in place",
        "selection/criteria/watching.py",
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
        (CRITERIA + "test_bad_input",),
    ),
    Mutation(
        "the block that matters least is kept",
        "selection/criteria/sensitivity.py",
        "[loss - full for loss in losses]",
        "[full - loss for loss in losses]",
        (BY_HAND + "test_leave_one_out_by_hand",),
    ),
    Mutation(
        "greedy removes the block that costs most",
        "selection/criteria/sensitivity.py",
        "lowest += calibration.finite([min(losses)])",
        "lowest += calibration.finite([max(losses)])",
        (BY_HAND + "test_greedy_sees_what_belongs_together",),
    ),
    Mutation(
        "evenly spaced blocks start at the first",
        "selection/criteria/positions.py",
        "(i + 1) * size // num_kept - 1",
        "i * size // num_kept",
        (CRITERIA + "test_positions",),
    ),
    Mutation(
        "a smaller budget forgets the decision",
        "pruning/decision.py",
        "p + (i in self.kept) for",
        "p for",
        (BY_HAND + "test_nested_budgets_rank_what_a_search_has_kept_before_the_rest",),
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
        "if known and not learned.mean() < 0.9 * trivial.mean():",
        "if known and not learned.mean() < 1.0 * trivial.mean():",
        (TEACHERS + "test_a_teacher_that_has_learned_less_is_refused",),
    ),
    Mutation(
        "a teacher whose loss is no number passes",
        "evaluation/evaluate.py",
        "if known and not learned.mean() < 0.9 * trivial.mean():",
        "if known and learned.mean() >= 0.9 * trivial.mean():",
        (TEACHERS + "test_a_teacher_that_has_learned_less_is_refused",),
    ),
    Mutation(
        "labels are held against themselves",
        "evaluation/evaluate.py",
        "conditions: labels.roll(1)",
        "conditions: labels",
        ("evaluation/test_teacher.py::test_permuted_labels_are_refused",),
    ),
    Mutation(
        "the classes of the first batch are generated in every batch",
        "evaluation/frechet.py",
        "classes[rows.start : rows.stop]",
        "classes[: len(rows)]",
        (EVALUATED + "test_frechet_distance_and_accuracy_know_real_images_from_none",),
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
        (TEACHERS + "test_draws_have_noise_of_their_own_and_seeds_change_nothing",),
    ),
    Mutation(
        "held-out draws are not spread over the samples",
        METRICS,
        'Rng(0, "held out", draw, rows.start, strata=num)',
        'Rng(0, "held out", draw, rows.start)',
        (TEACHERS + "test_every_draw_spreads_its_times_over_the_samples_in_an_order_of_its_own",),
    ),
    Mutation(
        "every batch is generated from the noise of the first",
        "evaluation/generation.py",
        "Rng(trainer.seed, stage, first=rows.start)",
        'Rng(trainer.seed, "generate")',
        (EVALUATED + "test_generated_examples_do_not_depend_on_the_batch",),
    ),
]

MUTATIONS = [*SEARCHES, *CRITERIA_AND_HALVING, *EVALUATION]
