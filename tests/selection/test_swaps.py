"""Greedy removal, and the exchange of a kept and a removed block afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, product
from typing import Any

import pytest
import torch
from torch import Tensor

import tinyfusion_core as tiny
from criteria_tasks import TRAINER, Given, Plain, Product, given, scalars
from marks import slow_but
from tinyfusion_core.comparison.keys import described
from tinyfusion_core.errors import UserError
from tinyfusion_core.samplers.constraints import Rules
from tinyfusion_core.selection.criteria.calibration import Calibration
from tinyfusion_core.selection.criteria.sensitivity import Greedy

pytestmark = pytest.mark.numerics


def losses_of(task: tiny.Task) -> dict[tuple[int, ...], float]:
    """Of all subsets of the blocks."""
    masks = torch.tensor(list(product((0.0, 1.0), repeat=len(task.blocks))))
    losses = Calibration(task, TRAINER, 64, 64).losses(masks)
    return {tuple(m.nonzero().flatten().tolist()): loss for m, loss in zip(masks, losses, strict=True)}


def test_exchanges_by_hand() -> None:
    task = scalars(0.125, 0.5, 2, 3, 0.75, target=1)
    # 3/4 comes next to 1 after 1/8, 1/2 and 2 have gone; what is left is then 3 x 1/8.
    plain = Greedy(keep=2)(task, TRAINER)
    truth = losses_of(task)
    assert plain.kept == (0, 3) and truth[plain.kept] == 0.5 * 0.625**2
    assert "exchanges" not in plain.provenance
    first, second = ({"removed": [0], "kept": [1], "loss": 0.125}, {"removed": [3], "kept": [2], "loss": 0.0})
    once = Greedy(keep=2, swaps=1)(task, TRAINER)
    assert (once.kept, once.provenance["exchanges"]) == ((1, 3), [first])
    often = Greedy(keep=2, swaps=9)(task, TRAINER)
    assert (often.kept, often.provenance["exchanges"]) == ((1, 2), [first, second])
    assert often.kept == min(combinations(range(5), 2), key=truth.__getitem__)
    # Six pairs are tried for each of the two, and once more to see that none is better.
    tried = [d.provenance["evaluations"] - plain.provenance["evaluations"] for d in (once, often)]
    assert tried == [6, 18]
    assert {key: often.provenance[key] for key in ("removed", "losses")} == {
        key: plain.provenance[key] for key in ("removed", "losses")
    }


def test_nothing_removed_leaves_nothing_to_exchange() -> None:
    decision = Greedy(keep=3, swaps=2)(scalars(0.5, 2, 3), TRAINER)
    assert (decision.kept, decision.provenance["exchanges"]) == ((0, 1, 2), [])


def matrices(seed: int, blocks: int = 7) -> tiny.Task:
    """A product of matrices, which is to be the identity; blocks of two lists."""

    class Lists(Product):
        def __init__(self, given: Sequence[Tensor]) -> None:
            super().__init__(given)
            self.more = self.blocks[4:]
            del self.blocks[4:]

        def forward(self, x: Tensor) -> Tensor:
            for block in [*self.blocks, *self.more]:
                x = block(x)
            return x

    draws = torch.Generator().manual_seed(seed)
    some = [torch.eye(3) + 0.7 * torch.randn(3, 3, generator=draws) for _ in range(blocks)]
    task = given(Lists(some), {"x": torch.randn(8, 3, generator=draws)}, Given, paths=("blocks.*", "more.*"))
    return replace(task, loss=Plain(1.0))


OPTIONS: list[dict[str, Any]] = [
    {"keep": 3},
    {"keep": 3, "protect": [0, 6]},
    {"keep": 4, "constraints": Rules(together=[[1, 5]])},
    {"keep": {"blocks": 2, "more": 1}},
    {"pattern": {"blocks": (1, 2), "more": (2, 3)}},
    {"keep": 3, "constraints": Rules(max_run=2, remove=[3])},
    {"constraints": Rules(costs=[3, 2, 1, 3, 2, 2, 1], budget=7, together=[[0, 2]])},
]


@pytest.mark.parametrize("options", slow_but(OPTIONS, OPTIONS[4]))
def test_exchanges_obey_the_constraints_and_end_where_none_is_better(options: dict[str, Any]) -> None:
    better = 0
    for seed in range(3):
        task = matrices(seed)
        how = Greedy(swaps=20, **options)
        constraints = how.compiled(task.blocks)
        plain, decision = Greedy(**options)(task, TRAINER), how(task, TRAINER)
        assert constraints.accepts(decision.kept)
        truth = losses_of(task)
        losses = [truth[plain.kept], *(e["loss"] for e in decision.provenance["exchanges"])]
        assert losses == sorted(losses, reverse=True)
        assert losses[-1] == pytest.approx(truth[decision.kept], rel=1e-5)
        units = [set(group) for group in constraints.rules.together]
        units += [{i} for i in range(7) if not any(i in unit for unit in units)]
        kept = set(decision.kept)
        near = [kept - out | back for out in units for back in units if out <= kept and not back & kept]
        assert all(truth[tuple(sorted(m))] >= truth[decision.kept] for m in near if constraints.accepts(m))
        better += decision.kept != plain.kept
    assert better


def test_a_number_below_zero_is_refused() -> None:
    with pytest.raises(UserError, match=r"Greedy\.swaps is -1; expected 0 or more"):
        Greedy(keep=4, swaps=-1)


def test_the_default_is_what_was_done_before_for_finished_comparisons() -> None:
    assert described(Greedy(keep=4)).keys() ^ described(Greedy(keep=4, swaps=1)).keys() == {"swaps"}
