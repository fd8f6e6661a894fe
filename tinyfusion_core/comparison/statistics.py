"""What the findings of a comparison come to: a row for each candidate, a rank correlation for each cheap score."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from .results import Findings, Trial

RANDOM = "random subsets"


@dataclass(frozen=True)
class Mean:
    """A mean and its standard deviation; none of either where a figure is missing or not finite."""

    mean: float | None
    sd: float | None = None

    def text(self, digits: str = "#.4g") -> str:
        """The deviation with the decimals of the mean, or as many as it needs; equal figures have none."""
        if self.mean is None:
            return "n/a"
        text = f"{self.mean:{',.0f' if self.mean >= 1000 else digits}}".removesuffix(".")
        if not self.sd:
            return text
        return f"{text} ± {self.sd:.{max(len(text.partition('.')[2]), -math.floor(math.log10(self.sd)))}f}"


@dataclass(frozen=True)
class Row:
    """A candidate over all seeds.

    Attributes:
        name: of the candidate, or `random subsets`.
        kept: what it keeps with each seed; nothing for the random subsets.
        calibration: held-out loss right after pruning.
        healed: held-out loss after recovery.
        frechet: Fréchet distance after recovery.
        better: share of the random subsets that heal worse.
        rank: 1 and the number of random subsets that heal better.
        to_best: healed loss less that of the best random subset.
        seconds: that the choice takes.
        evaluations: samples that the network is run on for it.
    """

    name: str
    kept: tuple[tuple[int, ...], ...]
    calibration: Mean
    healed: Mean
    frechet: Mean = Mean(None)
    better: Mean = Mean(None)
    rank: Mean = Mean(None)
    to_best: Mean = Mean(None)
    seconds: Mean = Mean(None)
    evaluations: Mean = Mean(None)


def rows(findings: Findings) -> list[Row]:
    """The candidates, best recovered first, and last the random subsets."""
    found = []
    for name in dict.fromkeys(t.method for t in findings.trials):
        trials = [t for t in findings.trials if t.method == name]
        references = [reference(findings, t.seed) for t in trials]
        places = [_place(t, masks) for t, masks in zip(trials, references, strict=True)]
        found.append(
            Row(
                name=name,
                kept=tuple(t.kept for t in trials),
                calibration=_mean(t.calibration for t in trials),
                healed=_mean(t.healed for t in trials),
                frechet=_mean(t.frechet for t in trials),
                better=_mean(better for _, better, _ in places),
                rank=_mean(rank for rank, _, _ in places),
                to_best=_mean(to_best for _, _, to_best in places),
                seconds=_mean(t.seconds for t in trials),
                evaluations=_mean(t.evaluations for t in trials),
            )
        )
    found.sort(key=lambda row: _or_inf(row.healed.mean))
    masks = reference(findings, findings.seeds[0])
    if masks:
        found.append(Row(RANDOM, (), _mean(m.calibration for m in masks), _mean(m.healed for m in masks)))
    return found


def reference(findings: Findings, seed: int) -> list[Trial]:
    """The random subsets healed with this seed, or with the first one where it healed none."""
    return [m for m in findings.masks if m.seed == seed] or [m for m in findings.masks if m.seed == findings.seeds[0]]


def guides(findings: Findings) -> dict[str, Mean]:
    """How well each cheap score orders the random subsets: Spearman's correlation with the healed loss, best first.

    Where a score is higher for better subsets its sign is turned, so that 1 is always the order of the healed loss.
    """
    seeds = dict.fromkeys(m.seed for m in findings.masks)
    found: dict[str, list[float | None]] = {}
    for seed in seeds:
        masks = reference(findings, seed)
        healed = [_or_inf(m.healed) for m in masks]
        calibration = spearman([_or_inf(m.calibration) for m in masks], healed)
        found.setdefault("calibration loss", []).append(calibration)
        for trial in (t for t in findings.trials if t.seed == seed and t.scores is not None):
            scores = [_or_inf(score) for score in trial.scores or ()]
            sums = [-sum(scores[i] for i in m.kept) for m in masks]
            found.setdefault(f"{trial.method}, sum of scores", []).append(spearman(sums, healed))
    means = {name: _mean(values) for name, values in found.items()}
    return dict(sorted(means.items(), key=lambda item: (item[1].mean is None, -(item[1].mean or 0))))


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Rank correlation, equal values sharing the mean of their ranks; None where one side does not vary."""
    if len(set(x)) < 2 or len(set(y)) < 2:
        return None
    return float(np.corrcoef(_ranks(x), _ranks(y))[0, 1])


def _place(trial: Trial, masks: Sequence[Trial]) -> tuple[float | None, float | None, float | None]:
    """Rank among the random subsets, share of them that heal worse, difference to the best."""
    if not masks:
        return None, None, None
    own, losses = _or_inf(trial.healed), [_or_inf(m.healed) for m in masks]
    best = min(losses)
    to_best = own - best if math.isfinite(own) and math.isfinite(best) else None
    return 1.0 + sum(v < own for v in losses), sum(v > own for v in losses) / len(losses), to_best


def _ranks(values: Sequence[float]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    _, place, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    last = counts.cumsum()
    ranks: np.ndarray[tuple[int], np.dtype[np.float64]] = (last - (counts - 1) / 2)[place]
    return ranks


def _mean(values: Iterable[float | None]) -> Mean:
    given = list(values)
    known = [v for v in given if v is not None]
    if len(known) < len(given) or not known:
        return Mean(None)
    return Mean(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None)


def _or_inf(value: float | None) -> float:
    return math.inf if value is None else value
