"""Statistics of a comparison: a summary of each candidate, a rank correlation for each cheap score."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from .results import ComparisonResults, Entry

RANDOM = "random subsets"


@dataclass(frozen=True)
class MeanStd:
    """A mean and its standard deviation; None if a value is missing or not finite."""

    mean: float | None
    sd: float | None = None

    def text(self, digits: str = "#.4g") -> str:
        """Format it; the deviation has the decimals of the mean, or as many as it needs; equal values have none."""
        if self.mean is None:
            return "n/a"
        text = f"{self.mean:{',.0f' if self.mean >= 1000 else digits}}".removesuffix(".")
        if not self.sd:
            return text
        return f"{text} ± {self.sd:.{max(len(text.partition('.')[2]), -math.floor(math.log10(self.sd)))}f}"


@dataclass(frozen=True)
class Summary:
    """A candidate over all seeds.

    Attributes:
        name: name of the candidate, or `random subsets`.
        kept: the blocks it keeps with each seed; empty for the random subsets.
        calibration: held-out loss right after pruning.
        recovered: held-out loss after recovery.
        metrics: the other metrics after recovery, by the name of their column.
        better: share of the random subsets that recover worse.
        rank: 1 plus the number of random subsets that recover better.
        to_best: recovered loss minus that of the best random subset.
        seconds: time that the choice takes.
        evaluations: samples that the network is run on for it.
        recovery: name of its recovery among those that are compared; empty: the recipe's.
        recovery_seconds: time that a recovery takes.
    """

    name: str
    kept: tuple[tuple[int, ...], ...]
    calibration: MeanStd
    recovered: MeanStd
    metrics: Mapping[str, MeanStd] = field(default_factory=dict)
    better: MeanStd = MeanStd(None)
    rank: MeanStd = MeanStd(None)
    to_best: MeanStd = MeanStd(None)
    seconds: MeanStd = MeanStd(None)
    evaluations: MeanStd = MeanStd(None)
    recovery: str = ""
    recovery_seconds: MeanStd = MeanStd(None)

    def same_as(self, other: Summary) -> bool:
        """Whether the other keeps the same blocks with every seed, and recovers them alike."""
        return (self.kept, self.recovery) == (other.kept, other.recovery)


def summaries(results: ComparisonResults) -> list[Summary]:
    """Return the candidates, best recovered first, and then the random subsets."""
    found = [_summary(results, name) for name in dict.fromkeys(e.method for e in results.entries)]
    found.sort(key=lambda summary: _or_inf(summary.recovered.mean))
    masks = reference(results, results.seeds[0])
    if masks:
        found.append(Summary(RANDOM, (), _mean(m.calibration for m in masks), _mean(m.recovered for m in masks)))
    return found


def _summary(results: ComparisonResults, name: str) -> Summary:
    """The summary of a candidate over its choices, one per seed."""
    entries = [e for e in results.entries if e.method == name]
    rank, better, to_best = zip(*(_place(e, reference(results, e.seed)) for e in entries), strict=True)
    return Summary(
        name=name,
        kept=tuple(e.kept for e in entries),
        calibration=_mean(e.calibration for e in entries),
        recovered=_mean(e.recovered for e in entries),
        metrics={metric: _mean(e.metrics.get(metric) for e in entries) for metric in results.columns},
        better=_mean(better),
        rank=_mean(rank),
        to_best=_mean(to_best),
        seconds=_mean(e.seconds for e in entries),
        evaluations=_mean(e.evaluations for e in entries),
        recovery=entries[0].recovery,
        recovery_seconds=_mean(e.recovery_seconds for e in entries),
    )


def reference(results: ComparisonResults, seed: int) -> list[Entry]:
    """Return the random subsets recovered with this seed, or with the first seed if there are none."""
    return [m for m in results.masks if m.seed == seed] or [m for m in results.masks if m.seed == results.seeds[0]]


def guides(results: ComparisonResults) -> dict[str, MeanStd]:
    """Return how well each cheap score ranks the random subsets: Spearman's rho with the recovered loss, best first.

    The sign of scores that are higher for better subsets is flipped, so that 1 always is the order of the recovered
    loss.
    """
    seeds = dict.fromkeys(m.seed for m in results.masks)
    found: dict[str, list[float | None]] = {}
    for seed in seeds:
        masks = reference(results, seed)
        recovered = [_or_inf(m.recovered) for m in masks]
        calibration = spearman([_or_inf(m.calibration) for m in masks], recovered)
        found.setdefault("calibration loss", []).append(calibration)
        for entry in (e for e in results.entries if e.seed == seed and e.scores is not None):
            scores = [_or_inf(score) for score in entry.scores or ()]
            sums = [-sum(scores[i] for i in m.kept) for m in masks]
            found.setdefault(f"{entry.method}, sum of scores", []).append(spearman(sums, recovered))
    means = {name: _mean(values) for name, values in found.items()}
    return dict(sorted(means.items(), key=lambda item: (item[1].mean is None, -(item[1].mean or 0))))


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Return the rank correlation, with mean ranks for ties; None if one side does not vary."""
    from scipy.stats import spearmanr  # half a second, which no other command should wait

    return float(spearmanr(x, y).statistic) if len(set(x)) > 1 and len(set(y)) > 1 else None


def _place(entry: Entry, masks: Sequence[Entry]) -> tuple[float | None, float | None, float | None]:
    """Rank among the random subsets, share of them that recover worse, difference to the best."""
    if not masks:
        return None, None, None
    own, losses = _or_inf(entry.recovered), [_or_inf(m.recovered) for m in masks]
    best = min(losses)
    to_best = own - best if math.isfinite(own) and math.isfinite(best) else None
    return 1.0 + sum(v < own for v in losses), sum(v > own for v in losses) / len(losses), to_best


def _mean(values: Iterable[float | None]) -> MeanStd:
    given = list(values)
    known = [v for v in given if v is not None]
    if len(known) < len(given) or not known:
        return MeanStd(None)
    return MeanStd(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None)


def _or_inf(value: float | None) -> float:
    return math.inf if value is None else value
