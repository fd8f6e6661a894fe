"""Mistakes in gating, in what blocks are transformed to, in removal, and in samplers and their constraints."""

from __future__ import annotations

from mutations.mutation import Mutation

GATING = "pruning/gating.py"
GATES = "pruning/test_gating.py::"
TRANSFORMED = "training/test_block_transforms.py::"
REMOVAL = "pruning/removal.py"
PRUNED = "pruning/test_pruning.py::"
DECIDED = "pruning/test_decision.py::"
GROUPED = "samplers/grouped.py"
GROUPS = "samplers/test_sampling.py::"
SUBSET = "samplers/subset.py"
SUBSETS = "samplers/test_subset_samplers.py::"
POISSON = "samplers/conditional_poisson.py"
ENUMERATED = "samplers/test_subsets.py::test_everything_equals_enumeration"
AUTOMATON = "samplers/automaton.py"
COMPILED = "samplers/compiled.py"
ESTIMATORS = "samplers/test_estimators.py::"
CONTROL = "samplers/test_control_variate.py::"
RULED = "samplers/test_constraints.py::"

GATES_AND_REMOVAL = [
    Mutation(
        "the weights of dropped values are ignored",
        GATING,
        "change = change * weight.index_select(0, rows).view(-1, *[1] * (x.ndim - 1)).to(change)",
        "pass",
        ("pruning/test_dropped_values.py::test_weights_are_factors_on_the_gradient_of_dropped_samples_alone",),
    ),
    Mutation(
        "the weights of dropped values are those of the first block",
        GATING,
        "self._weights[:, j]",
        "self._weights[:, 0]",
        ("pruning/test_dropped_values.py::test_weights_are_factors_on_the_gradient_of_dropped_samples_alone",),
    ),
    Mutation(
        "weights outlast their mask",
        GATING,
        "self._mask, self._weights = mask, weights",
        "self._mask, self._weights = mask, self._weights if weights is None else weights",
        ("pruning/test_dropped_values.py::test_weights_are_factors_on_the_gradient_of_dropped_samples_alone",),
    ),
    Mutation(
        "a skipped branch adds its input",
        GATING,
        "torch.zeros_like(x) if s.added else x",
        "x",
        ("pruning/test_branches.py::test_a_mask_of_each_sample_is_the_dense_formula",),
    ),
    Mutation(
        "a layer goes as a whole with the only branch that is known of it",
        REMOVAL,
        "going == inside and known <=",
        "going == inside and set() <=",
        ("plugins/llm/test_llm_branches.py::test_a_layer_that_never_had_attention_stays",),
    ),
    Mutation(
        "a mask outlasts its context",
        GATING,
        "        self._open.close()\n        self._mask = None\n",
        "        self._open.close()\n",
        ("pruning/test_dropped_values.py::test_the_mask_goes_when_the_context_closes",),
    ),
    Mutation(
        "the mask's gradient is that of f(x)",
        GATING,
        "delta = out - x",
        "delta = out.clone()",
        (GATES + "test_gradients_equal_the_dense_formula",),
    ),
    Mutation(
        "the input of a kept block has the gradient of a skipped one too",
        GATING,
        "grad_x = grad.index_fill(0, kept, 0).to(x_dtype)",
        "grad_x = grad.to(x_dtype)",
        (GATES + "test_gradients_equal_the_dense_formula",),
    ),
    Mutation(
        "the mask's gradient is a mean over the features",
        GATING,
        ".flatten(1).sum(1).to(mask_dtype)",
        ".flatten(1).mean(1).to(mask_dtype)",
        (GATES + "test_gradients_equal_the_dense_formula",),
    ),
    Mutation(
        "where nobody keeps a block only one sample gives a gradient",
        "protocols/blocks/rows.py",
        "(dropped[:1], dropped[1:])",
        "(dropped[:1], dropped[:0])",
        (GATES + "test_gradients_equal_the_dense_formula",),
    ),
    Mutation(
        "recomputation keeps the activations",
        "training/block_transforms.py",
        "use_reentrant=False, **kwargs) if recompute else",
        "use_reentrant=False, **kwargs) if compiled else",
        (TRANSFORMED + "test_recomputed_blocks_run_once_more_and_give_the_same_gradients",),
    ),
    Mutation(
        "blocks stay transformed",
        "protocols/undisturbed.py",
        'module.__dict__.pop("forward", None)',
        "pass",
        (TRANSFORMED + "test_the_forward_of_before_comes_back",),
    ),
    Mutation(
        "a forward that somebody else had taken over is lost",
        "protocols/undisturbed.py",
        'module.__dict__["forward"] = before',
        'module.__dict__.pop("forward", None)',
        (TRANSFORMED + "test_the_forward_of_before_comes_back",),
    ),
    Mutation(
        "blocks are deleted from the front, so that later ones have moved",
        REMOVAL,
        "for i in reversed(going):",
        "for i in going[: len(container)]:",
        (PRUNED + "test_the_teacher_keeps_its_blocks_and_shares_no_weights",),
    ),
    Mutation(
        "a pruned copy trains if the teacher does",
        REMOVAL,
        "return student.eval()",
        "return student",
        (PRUNED + "test_the_teacher_keeps_its_blocks_and_shares_no_weights",),
    ),
    Mutation(
        "networks that differ are taken for alike",
        REMOVAL,
        "atol=64 * torch.finfo",
        "atol=6.4e7 * torch.finfo",
        ("pruning/test_removal.py::test_a_choice_that_was_never_tried_is_tried_when_it_is_pruned",),
    ),
    Mutation(
        "a decision is as sure as its surest choice",
        "pruning/decision.py",
        "return min(self.confidences, default=None)",
        "return max(self.confidences, default=None)",
        (DECIDED + "test_a_decision_is_as_sure_as_its_least_certain_choice",),
    ),
    Mutation(
        "a decision may keep the block after the last",
        "pruning/decision.py",
        "if not 0 <= k < len(self.blocks)]",
        "if not 0 <= k <= len(self.blocks)]",
        (DECIDED + "test_what_cannot_be_kept_is_refused",),
    ),
    Mutation(
        "what comes after the last kept block is not removed",
        "pruning/decision.py",
        "for i in range(len(self.blocks)) if i not in self.kept)",
        "for i in range(self.kept[-1]) if i not in self.kept)",
        (DECIDED + "test_what_is_not_kept_is_removed",),
    ),
]

SAMPLERS = [
    Mutation(
        "ReinMax without its correction",
        GROUPED,
        " - linearised(law) / 2",
        "",
        (ESTIMATORS + "test_reinmax_is_its_formula",),
    ),
    Mutation(
        "the relaxation is divided by no temperature",
        GROUPED,
        "(scores_BK / self.tau).softmax(1)",
        "scores_BK.softmax(1)",
        (GROUPS + "test_gradient_is_that_of_the_formula",),
    ),
    Mutation(
        "the prior of every group is that of the first blocks",
        GROUPED,
        "@ prior_M\n",
        "@ self.prior_logits[: len(prior_M)]\n",
        (ESTIMATORS + "test_a_prior_is_log_odds_for_the_blocks_that_it_keeps_and_against_the_others",),
    ),
    Mutation(
        "the best masks of later groups are numbered from their own first block",
        GROUPED,
        "tuple(members[i] for i in",
        "tuple(i for i in",
        (GROUPS + "test_what_is_reported_of_the_distribution",),
    ),
    Mutation(
        "the log-probability is that of the relaxed options",
        GROUPED,
        "scores_K.log_softmax(0)[chosen_B]",
        "(scores_K / self.tau).log_softmax(0)[chosen_B]",
        (GROUPS + "test_log_prob_is_that_of_the_drawn_options",),
    ),
    Mutation(
        "a prior says nothing against the other blocks",
        "samplers/base.py",
        "fill_(-1.0)",
        "fill_(0.0)",
        (ESTIMATORS + "test_a_prior_is_log_odds_for_the_blocks_that_it_keeps_and_against_the_others",),
    ),
    Mutation(
        "a prior never fades",
        "samplers/base.py",
        "self.prior = linear(self.prior_schedule, progress)",
        "self.prior = self.prior_schedule[0]",
        (SUBSETS + "test_a_prior_fades_along_its_schedule",),
    ),
    Mutation(
        "the entropy's sign is flipped",
        SUBSET,
        "total = total - self.entropy_weight",
        "total = total + self.entropy_weight",
        (ESTIMATORS + "test_the_entropy_is_a_reward_in_units_of_the_differences",),
    ),
    Mutation(
        "the entropy counts as much as differences of either sign cancel",
        SUBSET,
        "advantage.abs().mean()",
        "advantage.mean()",
        (ESTIMATORS + "test_the_entropy_is_a_reward_in_units_of_the_differences",),
    ),
    Mutation(
        "a mask is compared with all masks of its sample but for the number",
        SUBSET,
        "/ (self.masks_per_sample - 1)",
        "/ self.masks_per_sample",
        (ESTIMATORS + "test_a_mask_is_weighted_by_how_much_worse_it_is_than_the_others_of_its_sample",),
    ),
    Mutation(
        "masks of different samples are compared",
        SUBSET,
        "losses = losses.view(-1, self.masks_per_sample)",
        "losses = losses.view(self.masks_per_sample, -1).T",
        (ESTIMATORS + "test_a_mask_is_weighted_by_how_much_worse_it_is_than_the_others_of_its_sample",),
    ),
    Mutation(
        "autocast rounds the gradient of the score function",
        SUBSET,
        "(gradient * (self.logits - self.logits.detach())).sum(-1)",
        "gradient @ (self.logits - self.logits.detach())",
        (ESTIMATORS + "test_the_gradient_is_not_rounded_under_autocast",),
    ),
    Mutation(
        "what the control variate takes out is not put back",
        SUBSET,
        "            total = total + terms.mean\n",
        "            pass\n",
        (CONTROL + "test_the_mean_of_the_gradient_stays_by_enumeration",),
    ),
    Mutation(
        "the control variate takes the level of a sample for the masks' doing",
        "samplers/control_variate.py",
        "(masks - masks.mean(1, keepdim=True))",
        "masks",
        (CONTROL + "test_what_it_explains_is_no_noise",),
    ),
    Mutation(
        "the relaxed top-k forgets what it has taken, at the temperature",
        SUBSET,
        ".clamp(min=1e-6).log() / self.tau",
        ".clamp(min=1e-6).log()",
        (ESTIMATORS + "test_the_relaxed_top_k_is_its_formula",),
    ),
    Mutation(
        "the order of a draw is read backwards",
        SUBSET,
        "chosen.flip(1).logcumsumexp(1).flip(1)",
        "chosen.logcumsumexp(1)",
        (SUBSETS + "test_the_log_probability_of_an_order_is_that_of_drawing_block_after_block",),
    ),
    Mutation(
        "the straight-through gradient is that of one minus the marginals",
        SUBSET,
        "(masks + (soft - soft.detach())).to(self.logits)",
        "(masks - (soft - soft.detach())).to(self.logits)",
        (SUBSETS + "test_the_straight_through_marginals_are_exact_for_a_linear_loss",),
    ),
    Mutation(
        "the entropy of subsets with the wrong sign of the mean",
        POISSON,
        "return self.log_partition() - self.marginals() @ self.theta",
        "return self.log_partition() + self.marginals() @ self.theta",
        (ENUMERATED,),
    ),
    Mutation(
        "the divergence has its partitions the wrong way round",
        POISSON,
        "return mean - self.log_partition() + other.log_partition()",
        "return mean + self.log_partition() - other.log_partition()",
        (ENUMERATED,),
    ),
    Mutation(
        "every block is drawn by the first number of its row",
        POISSON,
        "uniform[:, i] < odds.sigmoid()",
        "uniform[:, 0] < odds.sigmoid()",
        ("samplers/test_subsets.py::test_samples_follow_the_distribution",),
    ),
    Mutation(
        "the best masks are counted short by one",
        POISSON,
        "sorted(both, key=_order)[:count]",
        "sorted(both, key=_order)[: count - 1 or 1]",
        (ENUMERATED,),
    ),
    Mutation(
        "a run of dropped blocks reaches over two lists",
        AUTOMATON,
        "_State(used, 0 if place.last else run,",
        "_State(used, run,",
        (ENUMERATED,),
    ),
    Mutation(
        "a run may be longer by one block",
        AUTOMATON,
        "if before < demands.max_run else None",
        "if before <= demands.max_run else None",
        (ENUMERATED,),
    ),
    Mutation(
        "a segment may keep too few",
        AUTOMATON,
        "(place.closes and used != place.segment.kept)",
        "(place.closes and used > place.segment.kept)",
        (ENUMERATED,),
    ),
    Mutation(
        "a budget may be missed by the cheapest block",
        AUTOMATON,
        "state.used > least}",
        "state.used >= least}",
        ("samplers/test_subsets.py::test_a_budget_is_used_as_far_as_it_can_be",),
    ),
    Mutation(
        "costs stay in the order of execution where the automaton reads list by list",
        COMPILED,
        "[rules.costs[block] for block in order]",
        "list(rules.costs)",
        (RULED + "test_groups_follow_lists_that_take_turns",),
    ),
    Mutation(
        "scores stay in the order of execution where the automaton reads list by list",
        COMPILED,
        "_exact([scores[block] for block in self.order])",
        "_exact(scores)",
        (RULED + "test_groups_follow_lists_that_take_turns",),
    ),
    Mutation(
        "protected blocks come on top of the number",
        COMPILED,
        "num = (choice.num_kept or 0) - (len(choice.blocks) - len(free))",
        "num = choice.num_kept or 0",
        (RULED + "test_the_draws_of_numbers_and_patterns_are_what_they_were",),
    ),
    Mutation(
        "blocks that only the constraints protect may go",
        "samplers/constraints.py",
        "tuple(sorted({*given.protect, *protect}))",
        "tuple(sorted(protect))",
        (RULED + "test_groups_follow_lists_that_take_turns",),
    ),
]

MUTATIONS = [*GATES_AND_REMOVAL, *SAMPLERS]
