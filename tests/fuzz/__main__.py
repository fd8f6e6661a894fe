"""Runs cases by hand: `python -m fuzz KIND FIRST [NUMBER] [KIND FIRST NUMBER ...]`, with `tests` on the path."""

from __future__ import annotations

import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", MPLBACKEND="Agg", OMP_NUM_THREADS="1")

import torch

from fuzz.cases import judged, prepared


def tried(kind: str, first: int, number: int) -> int:
    """Run so many cases of a kind and print those that broke the rule. Returns how many did."""
    with tempfile.TemporaryDirectory() as place:
        base, seconds, found, slowest, faults = prepared(kind, Path(place)), 0.0, Counter[int](), (0.0, 0), 0
        for i in range(first, first + number):
            case, outcome = judged(kind, i, base, Path(place))
            seconds, found[outcome.code] = seconds + outcome.seconds, found[outcome.code] + 1
            slowest, faults = max(slowest, (outcome.seconds, i)), faults + bool(outcome.faults)
            if outcome.faults or number == 1:
                print(f"{kind} {i}: {case.what}\n  {' '.join(case.argv)}\n  -> {outcome.code}, {outcome.faults}")
                print(outcome.text if number == 1 else "", flush=True)
    print(f"{number} cases of {kind} in {seconds:.0f} s, by exit code {dict(found)}; slowest {slowest}", flush=True)
    return faults


if __name__ == "__main__":
    torch.set_num_threads(1)
    words = sys.argv[1:] if len(sys.argv) > 3 else [*sys.argv[1:], "1"]
    slices = [(words[i], int(words[i + 1]), int(words[i + 2])) for i in range(0, len(words), 3)]
    sys.exit(1 if sum(tried(*part) for part in slices) else 0)
