"""What a decision says of itself."""

from __future__ import annotations

import pytest

from tinyfusion_core.errors import UserError
from tinyfusion_core.pruning.decision import Decision

BLOCKS = tuple(f"blocks.{i}" for i in range(5))


def test_a_decision_is_as_sure_as_its_least_certain_choice() -> None:
    assert Decision(blocks=BLOCKS, kept=(0, 3), method="by hand", confidences=(0.9, 0.2, 0.7)).confidence == 0.2
    assert Decision(blocks=BLOCKS, kept=(0, 3), method="by hand").confidence is None


def test_what_is_not_kept_is_removed() -> None:
    assert Decision(blocks=BLOCKS, kept=(1,), method="by hand").removed == (0, 2, 3, 4)
    assert Decision(blocks=BLOCKS, kept=(0, 1, 2, 3, 4), method="by hand").removed == ()


@pytest.mark.parametrize("kept", [(4, 5), (-1, 2), (2, 1), (1, 1), ()])
def test_what_cannot_be_kept_is_refused(kept: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="indices must ascend, be distinct and lie in 0 to 4|keeps no block at all"):
        Decision(blocks=BLOCKS, kept=kept, method="by hand")


def test_the_block_that_differs_is_named() -> None:
    decision = Decision(blocks=("blocks.0", "con:1", "blocks.2"), kept=(0,), method="any")
    with pytest.raises(UserError, match=r"decision.blocks: .* differs is 'con:1' there and 'blocks.1' here"):
        decision.check_fits([f"blocks.{i}" for i in range(3)], "DiT")
    with pytest.raises(UserError, match="the decision is about 3 blocks"):
        decision.check_fits(["blocks.0"], "DiT")
