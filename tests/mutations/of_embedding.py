"""Mistakes in what somebody's own script sees of a training: callbacks, own parts, messages."""

from __future__ import annotations

from mutations.mutation import Mutation

LOOP = "training/loop.py"
UPDATE = "training/steps/update.py"
CALLED = "training/test_callbacks.py::"
OWN = "training/test_own_recovery.py::"
WORDED = "protocols/test_wording.py::test_one_message_two_readers"

MUTATIONS = [
    Mutation(
        "nobody hears that a callback asks for the end",
        LOOP,
        "asked=self._listeners.stop",
        "asked=False",
        (CALLED + "test_a_callback_ends_a_stage_after_one_more_step",),
    ),
    Mutation(
        "short trainings within others are told",
        "training/trainer.py",
        "trackers=(), callbacks=())",
        "trackers=())",
        (CALLED + "test_short_trainings_within_others_are_not_told",),
    ),
    Mutation(
        "progress is always shown",
        "training/trainer.py",
        "self.accelerator.is_main_process, self.progress)",
        "self.accelerator.is_main_process)",
        (CALLED + "test_one_logger_has_the_lines_of_the_screen_and_the_checkpoints",),
    ),
    Mutation(
        "a scheduler begins anew",
        UPDATE,
        "self.scheduler.load_state_dict(scheduler)",
        "pass",
        (OWN + "test_it_goes_on_bit_for_bit",),
    ),
    Mutation(
        "our schedule overrules the scheduler",
        UPDATE,
        "if self.scheduler is None else ()",
        "",
        (OWN + "test_learning_rates_are_the_schedulers",),
    ),
    Mutation(
        "a checkpoint of any optimizer will do",
        LOOP,
        "!= update.made_with",
        "is None",
        (OWN + "test_a_checkpoint_of_another_optimizer_is_refused",),
    ),
    Mutation(
        "a teacher compared by a function has a graph",
        "training/recover.py",
        "network.requires_grad_(False)",
        "network.requires_grad_(True)",
        (OWN + "test_a_loss_of_ones_own_sees_student_and_teacher",),
    ),
    Mutation(
        "names of files are taken for keys",
        "errors.py",
        "if key[2] in ARGUMENTS else key[0]",
        "",
        (WORDED,),
    ),
    Mutation(
        "the way on is told in keys",
        "errors.py",
        "if _of_a_recipe.get():",
        "if True:",
        (WORDED,),
    ),
]
