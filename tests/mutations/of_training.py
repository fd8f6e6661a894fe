"""Mistakes in training, distillation, averages, the guard of steps, the order of data and random streams."""

from __future__ import annotations

from mutations.mutation import Mutation

DISTILLATION = "training/distillation.py"
OBJECTIVE = "training/distilling/distilled.py"
FEATURES = "training/distilling/losses.py"
DISTILLED = "training/test_distill.py::"
TRAINED = "training/test_trainer.py::"
UPDATE = "training/steps/update.py"
UPDATED = "training/test_update.py::"
GUARD = "training/steps/step_guard.py"
FAULTS = "training/test_faults.py::"
ORDER = "dataloading/order.py"
SEEDING = "runtime/seeding.py"
STREAMS = "runtime/test_random_streams.py::test_the_same_key_draws_the_same_numbers"

LEARNING_FROM_A_TEACHER = [
    Mutation(
        "the teacher has a graph",
        OBJECTIVE,
        "with torch.no_grad(), self.kd.watched(teacher,",
        "with self.kd.watched(teacher,",
        (DISTILLED + "test_the_teacher_runs_once_a_step_without_graph_in_eval_mode_on_the_same_inputs",),
    ),
    Mutation(
        "the weights of teacher and data are swapped",
        OBJECTIVE,
        'given = {"kd": self.kd.alpha_kd, "gt": self.kd.alpha_gt if',
        'given = {"gt": self.kd.alpha_kd, "kd": self.kd.alpha_gt if',
        (DISTILLED + "test_teacher_and_data_have_each_a_weight",),
    ),
    Mutation(
        "masked features are averaged over all",
        FEATURES,
        "/ keep.sum(1).clamp(min=1)",
        "/ keep.shape[1]",
        (DISTILLED + "test_the_two_masks_differ_where_one_side_alone_is_extreme",),
    ),
    Mutation(
        "extremes are those of the whole batch",
        FEATURES,
        "(x - x.mean(1, keepdim=True)).abs() < sigma * x.std(1, keepdim=True)",
        "(x - x.mean()).abs() < sigma * x.std()",
        (DISTILLED + "test_the_two_masks_differ_where_one_side_alone_is_extreme",),
    ),
    Mutation(
        "a tap of one list belongs to the next",
        DISTILLATION,
        "        last = None\n        for i in members:",
        "        for i in members:",
        (DISTILLED + "test_segments_never_reach_over_two_lists",),
    ),
    Mutation(
        "the last block of a list needs no tap",
        DISTILLATION,
        "(i in ends or i == members[-1])",
        "i in ends",
        (DISTILLED + "test_without_groups_a_segment_ends_with_every_removed_run",),
    ),
    Mutation(
        "the weight of the features stays",
        OBJECTIVE,
        "first + (last - first) * progress for",
        "first for",
        (DISTILLED + "test_beta_falls_with_the_steps_and_the_terms_are_logged",),
    ),
]

TRAINING = [
    Mutation(
        "the weight of a micro-batch is wrong",
        UPDATE,
        "loss * (rows.micro / rows.count)",
        "loss",
        (UPDATED + "test_parts_of_a_batch_have_the_gradient_of_the_whole",),
    ),
    Mutation(
        "every micro-batch draws like the first",
        UPDATE,
        "rng = Rng(trainer.seed, self.stage, step, first)",
        "rng = Rng(trainer.seed, self.stage, step)",
        (UPDATED + "test_parts_of_a_batch_have_the_gradient_of_the_whole",),
    ),
    Mutation(
        "dropout is the same in every step",
        UPDATE,
        'seed_of(trainer.seed, self.stage, step, "forward", first)',
        'seed_of(trainer.seed, self.stage, "forward", first)',
        (UPDATED + "test_the_global_generator_follows_from_step_and_row",),
    ),
    Mutation(
        "dropout is the same in every micro-batch",
        UPDATE,
        'seed_of(trainer.seed, self.stage, step, "forward", first)',
        'seed_of(trainer.seed, self.stage, step, "forward")',
        (UPDATED + "test_the_global_generator_follows_from_step_and_row",),
    ),
    Mutation(
        "the average moves in a step that is not finite",
        UPDATE,
        "if finite and ema is not None:",
        "if ema is not None:",
        (UPDATED + "test_a_step_that_is_not_finite_does_not_move_the_average",),
    ),
    Mutation(
        "the optimizer moves in a step that is not finite",
        UPDATE,
        "if finite or self.trainer.accelerator.scaler is not None:",
        "if True:",
        (FAULTS + "test_gates_whose_gradient_is_no_number_do_not_move",),
    ),
    Mutation(
        "gradients are not clipped",
        UPDATE,
        "accelerator.clip_grad_norm_(self.parameters, clip)",
        "accelerator.clip_grad_norm_(self.parameters, 1e9)",
        (UPDATED + "test_the_gradient_is_clipped_and_its_norm_is_that_of_before",),
    ),
    Mutation(
        "a training that goes on reads its data from the start",
        "training/loop.py",
        "order.steps(start, steps,",
        "order.steps(0, steps,",
        (TRAINED + "test_a_stop_request_finishes_the_step_and_resumes_bit_for_bit",),
    ),
    Mutation(
        "what a finished stage resumes to is one step further",
        "training/loop.py",
        "self.optimization.progress(step - 1)",
        "self.optimization.progress(step)",
        ("selection/test_search.py::test_a_search_that_was_stopped_in_its_last_step_decides_like_any_other",),
    ),
    Mutation(
        "gates that wait use up Adam's bias correction",
        UPDATE,
        "gate.grad = None",
        "pass",
        ("selection/test_search.py::test_the_first_step_of_the_gates_is_as_long_after_a_warmup_as_without",),
    ),
    Mutation(
        "learning rates compound",
        UPDATE,
        'group["lr"] = group["base_lr"] *',
        'group["lr"] = group["lr"] *',
        (TRAINED + "test_the_learning_rate_follows_its_schedule",),
    ),
    Mutation(
        "schedules end after the last step",
        "training/objective.py",
        "step / max(1, (self.horizon or self.steps) - 1)",
        "step / max(1, self.horizon or self.steps)",
        (TRAINED + "test_the_learning_rate_follows_its_schedule",),
    ),
    Mutation(
        "a schedule rises again after its horizon",
        "training/objective.py",
        "return min(1.0, step / max(1, (self.horizon or self.steps) - 1))",
        "return step / max(1, (self.horizon or self.steps) - 1)",
        ("pipeline/test_extending.py::test_beyond_the_horizon_all_stays_as_it_ended",),
    ),
    Mutation(
        "more steps make the average longer",
        "training/objective.py",
        "1 - 10 / (horizon or steps)",
        "1 - 10 / steps",
        ("pipeline/test_extending.py::test_more_steps_are_what_all_at_once_are",),
    ),
    Mutation(
        "the average weighs the present by its decay",
        "training/objective.py",
        "_foreach_lerp_(averaged, values, 1 - self.decay)",
        "_foreach_lerp_(averaged, values, self.decay)",
        (TRAINED + "test_the_average_weighs_the_past_by_its_decay",),
    ),
    Mutation(
        "a step waits for what it sends to the device",
        "runtime/seeding.py",
        "(device, non_blocking=True)",
        "(device)",
        ("training/test_waiting.py",),
    ),
    Mutation(
        "a recovery returns its last weights",
        "training/recover.py",
        "student.load_state_dict(averaged.state_dict())",
        "pass",
        (TRAINED + "test_the_average_weighs_the_past_by_its_decay",),
    ),
    Mutation(
        "weight decay is dropped",
        "training/objective.py",
        '"weight_decay": weight_decay}',
        '"weight_decay": 0.0}',
        (UPDATED + "test_weight_decay_shrinks_what_no_gradient_moves",),
    ),
    Mutation(
        "an average does not resume",
        "training/state.py",
        'self.ema.average.load_state_dict(state["ema"])',
        "pass",
        (TRAINED + "test_a_stop_request_finishes_the_step_and_resumes_bit_for_bit",),
    ),
    Mutation(
        "the logged loss counts steps that were skipped",
        "training/state.py",
        "if report.finite:",
        "if True:",
        ("selection/test_search.py::test_a_step_that_is_not_finite_is_skipped_and_counted",),
    ),
    Mutation(
        "a gradient that is no number is taken for finite",
        GUARD,
        "finite=math.isfinite(loss) and not any_not_finite,",
        "finite=math.isfinite(loss),",
        (FAULTS + "test_gates_whose_gradient_is_no_number_do_not_move",),
    ),
    Mutation(
        "skipped steps count as in a row",
        GUARD,
        "self.streak = 0 if report.finite else self.streak + 1",
        "self.streak += not report.finite",
        (FAULTS + "test_too_many_of_them_end_the_stage_with_advice",),
    ),
    Mutation(
        "a training may end with a step that is not finite",
        GUARD,
        "or (self.streak and last)",
        "",
        (TRAINED + "test_a_training_whose_last_step_is_not_finite_fails",),
    ),
]

ORDER_AND_STREAMS = [
    Mutation(
        "every epoch has the order of the first",
        ORDER,
        "generator=generator(*self.key, epoch))",
        "generator=generator(*self.key))",
        ("samplers/test_sampling.py::test_order_visits_every_sample_once_in_an_epoch",),
    ),
    Mutation(
        "every process reads the first rows of a batch",
        ORDER,
        "base = step * self.batch_size + first",
        "base = step * self.batch_size",
        ("samplers/test_sampling.py::test_order_visits_every_sample_once_in_an_epoch",),
    ),
    Mutation(
        "a reader starts where the one before it does",
        ORDER,
        "accumulate([0, *shares])",
        "accumulate([0, 0, *shares])",
        ("dataloading/test_shards.py::test_every_pass_sees_every_sample_once",),
    ),
    Mutation(
        "a sample inside of a shard is off by one",
        ORDER,
        "bisect.bisect_right(self._ends, i)",
        "bisect.bisect_left(self._ends, i)",
        ("dataloading/test_shards.py::test_every_pass_sees_every_sample_once",),
    ),
    Mutation(
        "a stratified order ignores the step",
        SEEDING,
        "generator=generator(self.seed, self.stage, self.step, purpose))\n            rows",
        "generator=generator(self.seed, self.stage, purpose))\n            rows",
        ("samplers/test_sampling.py::test_stratified_draws_cover_every_interval_once",),
    ),
    Mutation(
        "stratified rows start over in every batch",
        SEEDING,
        "torch.arange(self.first, self.first + num_rows)",
        "torch.arange(num_rows)",
        (
            "selection/test_criteria.py::test_every_criterion_sees_the_same_inputs_spread_over_the_data_and_the_time_steps",
        ),
    ),
    Mutation(
        "rows are numbered from the start of their batch",
        SEEDING,
        "number = self.first + i if",
        "number = i if",
        ("samplers/test_sampling.py::test_rows_have_their_own_streams",),
    ),
    Mutation(
        "every batch of an evaluation draws like the first",
        SEEDING,
        "(self.first,) if self.strata else ()",
        "()",
        (STREAMS,),
    ),
    Mutation(
        "Gumbel noise has the wrong sign",
        SEEDING,
        "return -self._rows(",
        "return self._rows(",
        ("samplers/test_sampling.py::test_option_frequencies_follow_the_softmax_whatever_tau_is",),
    ),
]

MUTATIONS = [*LEARNING_FROM_A_TEACHER, *TRAINING, *ORDER_AND_STREAMS]
