"""Rules of every kind, for a network of two lists of blocks."""

from __future__ import annotations

from tinyfusion_core.samplers.constraints import Rules

TWO_LISTS = {"first": 5, "second": 3}
CASES = [
    Rules(keep=3),
    Rules(keep={"first": 2, "second": 1}),
    Rules(keep=4, protect=[0, 7], remove=[3]),
    Rules(keep=4, together=[[0, 4], [1, 6]]),
    Rules(keep=4, max_run=1),
    Rules(keep=5, contiguous=True),
    Rules(costs=[3, 1, 2, 2, 5, 1, 4, 2], budget=9),
    Rules(costs=[3, 1, 2, 2, 5, 1, 4, 2], budget=11, protect=[4], together=[[2, 3]], max_run=2),
]
