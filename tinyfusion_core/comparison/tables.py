"""The results of a comparison as tables and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, fields

from .results import OF_RECOVERIES, ComparisonResults, Entry, in_files
from .statistics import RANDOM, MeanStd, Summary, guides, reference, summaries


@dataclass(frozen=True)
class TextTable:
    """A table for a terminal and for a page.

    Attributes:
        title: what it shows.
        columns: names of the columns.
        rows: texts of the cells.
        notes: how to read it.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]


def tables(results: ComparisonResults) -> list[TextTable]:
    """Return the table of the candidates, and for an audit that of the cheap scores."""
    if results.view == "compare":
        return [_compared(results)]
    return [_ranked(results), _guided(results)]


def table_csv(results: ComparisonResults) -> str:
    """Return the candidates' summaries with all values, unrounded."""
    return _csv(unrounded(results))


def unrounded(results: ComparisonResults) -> list[dict[str, object]]:
    """Return a mapping for every candidate: its name, what it kept, and all values by name, None if one is missing."""
    lines = []
    for summary in summaries(results):
        line: dict[str, object] = {"candidate": summary.name, "kept": _kept(summary, results).replace("\n", "; ")}
        figures = in_files({name: getattr(summary, name) for name in _columns(Summary, results)}, MeanStd(None))
        for name, value in figures.items():
            if isinstance(value, MeanStd):
                line |= {name: value.mean, f"{name}_sd": value.sd}
        lines.append(line)
    return lines


def trials_csv(results: ComparisonResults) -> str:
    """Return one line for every subset that was recovered, with its seed."""
    lines = []
    for entry in (*results.entries, *results.masks):
        line = in_files({name: getattr(entry, name) for name in _columns(Entry, results) if name != "scores"})
        lines.append({**line, "method": entry.method or RANDOM, "kept": " ".join(map(str, entry.kept))})
    return _csv(lines)


def _columns(of: type[Summary] | type[Entry], results: ComparisonResults) -> list[str]:
    """What a file has of each; of recoveries only if several are compared."""
    return [f.name for f in fields(of) if results.recoveries or f.name not in OF_RECOVERIES]


def _compared(results: ComparisonResults) -> TextTable:
    body = []
    for summary in summaries(results):
        candidate = summary.name != RANDOM
        body.append(
            (
                summary.name if candidate else f"{RANDOM} ({_count(results)})",
                _kept(summary, results),
                summary.calibration.text(),
                summary.recovered.text(),
                *(summary.metrics[name].text() if candidate else "" for name in results.columns),
                _percent(summary.better) if candidate and results.masks else "",
                f"{summary.seconds.mean:.2g}" if summary.seconds.mean is not None else "",
                f"{summary.evaluations.mean:,.0f}" if summary.evaluations.mean is not None else "",
                *([f"{took:.3g}" if (took := summary.recovery_seconds.mean) else ""] if results.recoveries else []),
            )
        )
    columns = ("", "kept blocks", "calibration loss", "recovered loss", *results.columns, "better than random")
    recovered = ("recovery seconds",) if results.recoveries else ()
    return TextTable(
        title=f"{_task(results)}, {_recovery(results)}",
        columns=(*columns, "seconds", "samples", *recovered),
        rows=tuple(body),
        notes=(
            *_common_notes(results),
            "seconds that the choice takes, and samples that the network is run on for it; those of a search go "
            "forward and backward (steps times batch), those of a criterion forward, Taylor's backward too",
        ),
    )


def _ranked(results: ComparisonResults) -> TextTable:
    body = [
        (
            summary.name if summary.name != RANDOM else f"{RANDOM} ({_count(results)})",
            _kept(summary, results),
            summary.calibration.text(),
            summary.recovered.text(),
            *(
                (summary.rank.text(".3g"), _percent(summary.better), MeanStd(summary.to_best.mean).text("+.2g"))
                if summary.name != RANDOM
                else [""] * 3
            ),
        )
        for summary in summaries(results)
    ]
    return TextTable(
        title=f"{_task(results)}, {_recovery(results)}",
        columns=(
            "",
            "kept blocks",
            "calibration loss",
            "recovered loss",
            f"rank of {_count(results)}",
            "better than random",
            "from the best",
        ),
        rows=tuple(body),
        notes=(
            *_common_notes(results),
            "rank: 1 and the number of random subsets that recover better; from the best: recovered loss less "
            "that of the best random subset, recovered with the same seed if it was, else with the first",
        ),
    )


def _guided(results: ComparisonResults) -> TextTable:
    return TextTable(
        title="Which cheap score foretells the recovered loss?",
        columns=("score", "Spearman's rho"),
        rows=tuple((name, value.text(".2f")) for name, value in guides(results).items()),
        notes=(
            f"rank correlation with the recovered loss over {_count(results)} random subsets; 1 is the very same "
            "order, 0 none, -1 the opposite one; sums are over the kept blocks",
        ),
    )


def _task(results: ComparisonResults) -> str:
    return f"{len(results.blocks)} → {results.kept}"


def _recovery(results: ComparisonResults) -> str:
    num = len(results.seeds)
    found = [results.steps_of(e.recovery) for e in results.entries]
    steps = " to ".join(f"{n:,}" for n in sorted({min(found), max(found)}))
    return f"{steps} recovery steps, {num} seed{'s' if num > 1 else ''}"


def _count(results: ComparisonResults) -> int:
    return len(reference(results, results.seeds[0]))


def _common_notes(results: ComparisonResults) -> list[str]:
    teacher = "" if results.teacher is None else f"; the whole network's is {results.teacher:.4g}"
    spread = "; mean ± standard deviation over the seeds" if len(results.seeds) > 1 else ""
    notes = [
        f"calibration loss: held-out loss right after pruning; recovered loss: after recovery ({results.note}{teacher})"
        f"{spread}"
    ]
    if results.masks:
        count, every = _count(results), results.num_masks
        which = f"all {count} subsets" if count == every else f"{count} random subsets of {every:,}"
        seeds = "each seed" if len({m.seed for m in results.masks}) > 1 else "the first seed"
        notes.append(
            f"better than random: share of {which} within the budget that recover worse; they were recovered with "
            f"{seeds}, and the ± in their own row is over the subsets"
        )
    if results.masks and results.recoveries:
        notes.append("random subsets have the recipe's recovery")
    if others := [f"{n:,} of {name}" for name, n in results.recoveries.items() if n != results.steps]:
        notes.append(f"recovery steps: {results.steps:,}, but {'; '.join(others)}")
    notes += [f"{name} left out: {why}" for name, why in results.left_out.items()]
    return notes


def _kept(summary: Summary, results: ComparisonResults) -> str:
    """One line if every seed keeps the same blocks, else one for each seed."""
    texts = [" ".join(map(str, kept)) for kept in summary.kept]
    if len(set(texts)) <= 1:
        return "".join(texts[:1])
    return "\n".join(f"seed {seed}: {text}" for seed, text in zip(results.seeds, texts, strict=True))


def _percent(share: MeanStd) -> str:
    return "n/a" if share.mean is None else f"{share.mean:.0%}"


def _csv(lines: Sequence[dict[str, object]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(dict.fromkeys(name for line in lines for name in line)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()
