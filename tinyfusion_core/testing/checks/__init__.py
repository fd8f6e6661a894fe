"""Everything that is checked, by what it is checked of. A check is a function that raises an AssertionError, or the
UserError that a user would see; its docstring says what holds, `tinyfusion_core.testing` runs it.
"""

from __future__ import annotations

from collections.abc import Callable

from ..subject import Subject
from .gating import (
    check_all_ones_is_plain,
    check_every_block_learns,
    check_hard_gated_is_pruned,
    check_nobody_keeps_a_block,
    check_sparse_is_dense,
    check_state_dict_untouched,
)
from .objective import check_loss_per_sample, check_predict_deterministic, check_prepare, check_same_inputs
from .saving import check_save_and_load, check_taps
from .structure import (
    check_blocks,
    check_copies,
    check_light_import,
    check_meta_device,
    check_streams,
    check_tiny,
)

Check = Callable[[Subject], None]

CHECKS: tuple[Check, ...] = (
    check_tiny,
    check_blocks,
    check_streams,
    check_all_ones_is_plain,
    check_hard_gated_is_pruned,
    check_state_dict_untouched,
    check_nobody_keeps_a_block,
    check_every_block_learns,
    check_sparse_is_dense,
    check_loss_per_sample,
    check_prepare,
    check_same_inputs,
    check_predict_deterministic,
    check_save_and_load,
    check_meta_device,
    check_taps,
    check_light_import,
    check_copies,
)
