"""Mistakes in what masks share, and in what is known of a dropped block."""

from __future__ import annotations

from mutations.mutation import Mutation

GATING = "pruning/gating.py"
PREFIXES = "pruning/prefixes.py"
SHARED = "pruning/test_prefixes.py::"
BIT_FOR_BIT = (SHARED + "test_what_masks_share_changes_no_bit",)

MUTATIONS = [
    Mutation(
        "an output that was changed in place is taken over",
        PREFIXES,
        "self.output is None or [*map(version, self.output[0])] != self.versions",
        "self.output is None",
        BIT_FOR_BIT,
    ),
    Mutation(
        "what a mask says of a block is not asked",
        PREFIXES,
        "(before.block, before.kept) == (block, kept)",
        "before.block == block",
        BIT_FOR_BIT,
    ),
    Mutation(
        "an output that shares memory with an argument is taken over",
        PREFIXES,
        "return _memory(leaves).isdisjoint(_memory(arguments))",
        "return True",
        BIT_FOR_BIT,
    ),
    Mutation(
        "a call that changes its arguments is taken over",
        PREFIXES,
        "if call.changed or not same",
        "if not same",
        BIT_FOR_BIT,
    ),
    Mutation(
        "what a call writes into a mapping is lost",
        PREFIXES,
        "if call.changed or not same",
        "if call.changed",
        BIT_FOR_BIT,
    ),
    Mutation(
        "a batch is answered with another one's outputs",
        PREFIXES,
        "        finally:\n            self._calls.clear()",
        "        finally:\n            pass",
        (SHARED + "test_batches_and_calls_share_what_was_learned",),
    ),
    Mutation(
        "no pass follows another",
        PREFIXES,
        "self._place, self._follows = 0, True",
        "self._place, self._follows = 0, False",
        (SHARED + "test_every_beginning_is_run_once",),
    ),
    Mutation(
        "masks come in any order",
        PREFIXES,
        "key=lambda i: [masks[i][j] for j in self._order], reverse=True",
        "key=lambda i: i",
        (SHARED + "test_every_beginning_is_run_once",),
    ),
    Mutation(
        "the order of the calls is not learned",
        PREFIXES,
        "*(made.block for made in self._calls), *self._order",
        "*self._order",
        (SHARED + "test_every_beginning_is_run_once",),
    ),
    Mutation(
        "outputs are held without bound",
        PREFIXES,
        "<= self.most_bytes:",
        "< 2**60:",
        (SHARED + "test_what_does_not_fit_is_computed_again_and_said_once",),
    ),
    Mutation(
        "a trial that fails has no effect",
        PREFIXES,
        "self._shares = self._shares and same",
        "pass",
        (SHARED + "test_blocks_that_tell_each_other_something_unseen_share_nothing",),
    ),
    Mutation(
        "calls with gradients are answered too",
        GATING,
        "if self.recall is None or torch.is_grad_enabled():",
        "if self.recall is None:",
        (SHARED + "test_gradients_are_not_shared_and_no_output_is_held_afterwards",),
    ),
    Mutation(
        "the form of an output is that of other inputs",
        GATING,
        "like = (j, call.signature())",
        "like = (j, ())",
        ("pruning/test_known_forms.py::test_without_gradients_a_dropped_block_runs_only_until_its_form_is_known",),
    ),
]
