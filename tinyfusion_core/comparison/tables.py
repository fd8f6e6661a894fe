"""The findings of a comparison as tables and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from ..samplers.constraints import spoken
from .results import Findings
from .statistics import RANDOM, Mean, Row, guides, reference, rows


@dataclass(frozen=True)
class Table:
    """For a terminal and for a page.

    Attributes:
        title: what it shows.
        columns: their names.
        rows: texts.
        notes: how to read it.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]


def tables(findings: Findings) -> list[Table]:
    """The table of the candidates, and for an audit that of the cheap scores."""
    if findings.view == "compare":
        return [_compared(findings)]
    return [_placed(findings), _guided(findings)]


def table_csv(findings: Findings) -> str:
    """The candidates' rows with all figures, unrounded."""
    lines = []
    for row in rows(findings):
        line: dict[str, object] = {"candidate": row.name, "kept": _kept(row, findings).replace("\n", "; ")}
        for name, value in asdict(row).items():
            if isinstance(value, dict):
                line |= {name: value["mean"], f"{name}_sd": value["sd"]}
        lines.append(line)
    return _csv(lines)


def trials_csv(findings: Findings) -> str:
    """One line for every subset that was healed, with its seed."""
    lines = []
    for trial in (*findings.trials, *findings.masks):
        line = {name: value for name, value in asdict(trial).items() if name != "scores"}
        lines.append({**line, "method": trial.method or RANDOM, "kept": " ".join(map(str, trial.kept))})
    return _csv(lines)


def _compared(findings: Findings) -> Table:
    has_frechet = any(t.frechet is not None for t in findings.trials)
    body = []
    for row in rows(findings):
        candidate = row.name != RANDOM
        body.append(
            (
                row.name if candidate else f"{RANDOM} ({_count(findings)})",
                _kept(row, findings),
                row.calibration.text(),
                row.healed.text(),
                *([row.frechet.text() if candidate else ""] if has_frechet else []),
                _percent(row.better) if candidate and findings.masks else "",
                f"{row.seconds.mean:.2g}" if row.seconds.mean is not None else "",
                f"{row.evaluations.mean:,.0f}" if row.evaluations.mean is not None else "",
            )
        )
    frechet = ("Fréchet distance",) if has_frechet else ()
    columns = ("", "kept blocks", "calibration loss", "healed loss", *frechet, "better than random")
    return Table(
        title=f"{_task(findings)}, {_recovery(findings)}",
        columns=(*columns, "seconds", "samples"),
        rows=tuple(body),
        notes=(
            *_common_notes(findings),
            "seconds that the choice takes, and samples that the network is run on for it; those of a search go "
            "forward and backward (steps times batch), those of a criterion forward, Taylor's backward too",
        ),
    )


def _placed(findings: Findings) -> Table:
    body = [
        (
            row.name if row.name != RANDOM else f"{RANDOM} ({_count(findings)})",
            _kept(row, findings),
            row.calibration.text(),
            row.healed.text(),
            *(
                (row.rank.text(".3g"), _percent(row.better), Mean(row.to_best.mean).text("+.2g"))
                if row.name != RANDOM
                else [""] * 3
            ),
        )
        for row in rows(findings)
    ]
    return Table(
        title=f"{_task(findings)}, {_recovery(findings)}",
        columns=(
            "",
            "kept blocks",
            "calibration loss",
            "healed loss",
            f"rank of {_count(findings)}",
            "better than random",
            "from the best",
        ),
        rows=tuple(body),
        notes=(
            *_common_notes(findings),
            "rank: 1 and the number of random subsets that heal better; from the best: healed loss less that of "
            "the best random subset, healed with the same seed if it was, else with the first",
        ),
    )


def _guided(findings: Findings) -> Table:
    return Table(
        title="Which cheap score foretells the healed loss?",
        columns=("score", "Spearman's rho"),
        rows=tuple((name, value.text(".2f")) for name, value in guides(findings).items()),
        notes=(
            f"rank correlation with the healed loss over {_count(findings)} random subsets; 1 is the very same "
            "order, 0 none, -1 the opposite one; sums are over the kept blocks",
        ),
    )


def _task(findings: Findings) -> str:
    return f"{len(findings.blocks)} → {spoken(findings.budget)} blocks"


def _recovery(findings: Findings) -> str:
    num = len(findings.seeds)
    return f"{findings.steps:,} recovery steps, {num} seed{'s' if num > 1 else ''}"


def _count(findings: Findings) -> int:
    return len(reference(findings, findings.seeds[0]))


def _common_notes(findings: Findings) -> list[str]:
    teacher = "" if findings.teacher is None else f"; the whole network's is {findings.teacher:.4g}"
    spread = "; mean ± standard deviation over the seeds" if len(findings.seeds) > 1 else ""
    notes = [
        f"calibration loss: held-out loss right after pruning; healed loss: after recovery ({findings.note}{teacher})"
        f"{spread}"
    ]
    if findings.masks:
        count, every = _count(findings), findings.num_masks
        which = f"all {count} subsets" if count == every else f"{count} random subsets of {every:,}"
        seeds = "each seed" if len({m.seed for m in findings.masks}) > 1 else "the first seed"
        notes.append(
            f"better than random: share of {which} within the budget that heal worse; they were healed with {seeds}, "
            "and the ± in their own row is over the subsets"
        )
    notes += [f"{name} left out: {why}" for name, why in findings.left_out.items()]
    return notes


def _kept(row: Row, findings: Findings) -> str:
    """One line when every seed keeps the same blocks, else one for each seed."""
    texts = [" ".join(map(str, kept)) for kept in row.kept]
    if len(set(texts)) <= 1:
        return "".join(texts[:1])
    return "\n".join(f"seed {seed}: {text}" for seed, text in zip(findings.seeds, texts, strict=True))


def _percent(share: Mean) -> str:
    return "n/a" if share.mean is None else f"{share.mean:.0%}"


def _csv(lines: Sequence[dict[str, object]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()
