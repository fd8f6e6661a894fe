"""The surrogate of short recoveries: what it knows of masks that were not tried."""

from __future__ import annotations

import random
from itertools import combinations

import pytest
import torch

from tinyfusion_core.selection.judging.surrogate import predicted

MASKS = list(combinations(range(8), 4))


def planted(mask: tuple[int, ...]) -> float:
    """A loss that blocks add to, and that three pairs change."""
    out = set(range(8)).difference(mask)
    needed = [0.9, 0.7, 0.1, 0.3, 0.2, 0.15, 0.5, 0.05]
    return 1 + sum(needed[i] for i in out) + 0.4 * sum(pair <= out for pair in ({2, 3}, {4, 5}, {5, 7}))


@pytest.mark.parametrize("seed", range(4))
def test_it_finds_the_best_of_those_that_were_not_tried(seed: int) -> None:
    known = {mask: planted(mask) for mask in random.Random(seed).sample(MASKS, 24)}
    rest = [mask for mask in MASKS if mask not in known]
    order = predicted(known, rest, 8).argsort()
    best = sorted(rest, key=planted)
    assert best[0] in [rest[i] for i in order[:4]]
    assert planted(rest[order[-1]]) > planted(best[len(rest) // 2])


def test_it_agrees_with_the_formula_of_a_gaussian_process() -> None:
    known = {mask: planted(mask) for mask in MASKS[::9]}
    vectors = [torch.zeros(8, dtype=torch.float64).index_fill(0, torch.tensor(mask), 1) - 0.5 for mask in MASKS]
    s = torch.stack([torch.stack([a @ b for b in vectors]) for a in vectors]) / 2
    covariance, y = (s + s**2) / 2, torch.tensor(list(known.values()), dtype=torch.float64)
    seen = [MASKS.index(mask) for mask in known]
    inverse = torch.linalg.inv(covariance[seen][:, seen] + 0.01 * torch.eye(len(seen)))
    mean = (inverse @ y).sum() / inverse.sum()
    expected = mean + covariance[:, seen] @ inverse @ (y - mean)
    assert torch.allclose(predicted(known, MASKS, 8), expected)


def test_one_mask_tells_nothing_of_others_and_blocks_have_no_order() -> None:
    assert predicted({(0, 1): 2.0}, [(1, 2), (2, 3)], 4).tolist() == pytest.approx([2.0, 2.0])
    assert predicted({(0, 1): 2.0}, [], 4).tolist() == []
    known = {mask: planted(mask) for mask in MASKS[::5]}
    turned = {tuple(sorted(7 - i for i in mask)): loss for mask, loss in known.items()}
    there = predicted(turned, [tuple(sorted(7 - i for i in mask)) for mask in MASKS], 8)
    assert torch.allclose(predicted(known, MASKS, 8), there)


def test_masks_may_keep_different_numbers() -> None:
    known = {(0, 1, 2): 1.0, (0, 1): 2.0, (1, 2): 3.0, (2,): 4.0}
    assert predicted(known, [(0, 1, 2), (2,)], 4).diff() > 0
