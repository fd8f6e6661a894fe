"""Place every choice of an audit that recovered all masks: `python benchmarks/placed.py RUN_DIR`.

A mask's recovered loss is its mean over the seeds it was recovered with, whoever chose it; the noise is the standard
deviation between seeds, pooled over the masks. A choice counts as good as the best when it is within two of them.
"""

from __future__ import annotations

import statistics
import sys
from collections import defaultdict
from pathlib import Path

from tinyfusion_core.comparison.results import ComparisonResults
from tinyfusion_core.comparison.statistics import spearman


def main(run_dir: str) -> None:
    results = ComparisonResults.load(Path(run_dir) / "findings.json")
    recovered, calibration = losses_of(results)
    means = {kept: statistics.fmean(by_seed.values()) for kept, by_seed in recovered.items()}
    degrees = sum(len(by_seed) - 1 for by_seed in recovered.values())
    squares = sum((loss - means[kept]) ** 2 for kept, by_seed in recovered.items() for loss in by_seed.values())
    noise = (squares / degrees) ** 0.5 if degrees else float("nan")
    order = sorted(means, key=means.__getitem__)
    best, worst = order[0], order[-1]
    median = statistics.median(means.values())
    print(
        f"{len(results.blocks)} -> {len(best)}, {results.steps} steps, all {len(order)} masks: best {_say(best)} "
        f"{means[best]:.4f}, median {median:.4f}, worst {_say(worst)} {means[worst]:.4f}; "
        f"s.d. between recovery seeds {noise:.4f}; teacher {results.teacher:.4f}"
    )
    rho = spearman([calibration[k] for k in order], [means[k] for k in order])
    print(f"Spearman's rho of calibration loss and recovered loss: {rho:.2f}\n")
    print("| choice | kept (seeds) | recovered | rank | from the best, in s.d. (worst seed) | within 2 s.d. |")
    print("|---|---|---|---|---|---|")
    chosen: dict[str, list[tuple[int, ...]]] = defaultdict(list)
    for entry in results.entries:
        chosen[entry.method].append(entry.kept)
    for name, kept in sorted(chosen.items(), key=lambda item: statistics.fmean(means[k] for k in item[1])):
        counts = {k: kept.count(k) for k in dict.fromkeys(kept)}
        said = ", ".join(f"{_say(k)}{f' x{n}' if len(kept) > 1 else ''}" for k, n in counts.items())
        ranks = ", ".join(str(1 + order.index(k)) for k in counts)
        away = [(means[k] - means[best]) / noise for k in kept]
        value = statistics.fmean(means[k] for k in kept)
        within = f"{sum(a <= 2 for a in away)} of {len(kept)}"
        print(f"| {name} | {said} | {value:.4f} | {ranks} | {max(away):.1f} | {within} |")


def losses_of(
    results: ComparisonResults,
) -> tuple[dict[tuple[int, ...], dict[int, float]], dict[tuple[int, ...], float]]:
    """Recovered losses of every mask by seed, and its loss right after pruning."""
    recovered: dict[tuple[int, ...], dict[int, float]] = defaultdict(dict)
    calibration: dict[tuple[int, ...], float] = {}
    for entry in (*results.masks, *results.entries):
        assert entry.recovered is not None and entry.calibration is not None
        recovered[entry.kept][entry.seed] = entry.recovered
        calibration[entry.kept] = entry.calibration
    if len(recovered) != results.num_masks:
        sys.exit(f"{len(recovered)} of {results.num_masks} masks were recovered; this needs all of them")
    return recovered, calibration


def _say(kept: tuple[int, ...]) -> str:
    return " ".join(map(str, kept))


if __name__ == "__main__":
    main(sys.argv[1])
