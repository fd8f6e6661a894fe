"""The results of a run as a table and as plain values, from the files of its folder, without torch."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from ..protocols.blocks.paths import word_for
from ..pruning.decision import Decision
from ..pruning.record import DECISION, decision_of
from ..runtime.run_folder import RunFolder
from ..runtime.stages import SEARCH
from .measured import measurements, results


def results_table(folder: RunFolder) -> Table:
    """Return the results table for a terminal; the ratio is the last model's value over the first's.

    Raises:
        UserError: the run has not reached its evaluation.
    """
    names, rows = results(folder)
    table = Table(title=headline(folder), title_justify="left", title_style="bold")
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    if len(names) > 1:
        table.add_column("ratio", justify="right")
    for label, cells, ratio, _ in rows:
        table.add_row(label, *cells, *([ratio] if len(names) > 1 else []))
    if faults := faults_of(folder):
        table.caption, table.caption_justify = "; ".join(faults), "left"
    return table


def results_record(folder: RunFolder) -> dict[str, Any]:
    """Return the results of a run as plain values, for programs.

    Raises:
        UserError: the run has not reached its evaluation.
    """
    measured = measurements(folder)
    made = {
        name: {
            "kept": decision.kept,
            "blocks": decision.blocks,
            "method": decision.method,
            "confidence": decision.confidence,
        }
        for name, decision in decisions_of(folder).items()
    }
    return {
        "run_dir": str(folder.path),
        "decisions": made,
        "measurements": measured,
        "faults": faults_of(folder),
    }


def headline(folder: RunFolder) -> str:
    """Return the name of a run, and how many blocks there were and are."""
    decisions = list(decisions_of(folder).values())
    depths = [len(d.blocks) for d in decisions[:1]] + [len(d.kept) for d in decisions]
    name = folder.path.resolve().name
    return f"{name}: {' → '.join(map(str, depths))} {word_for(decisions[0].blocks)}" if depths else name


def faults_of(folder: RunFolder) -> list[str]:
    """Return the steps that the stages have skipped and the samples that they have replaced, in words."""
    return [
        f"{stage.title}: {count} {what}"
        for stage in folder.stages()
        for what, count in folder.round(stage.round).faults(stage.name).items()
    ]


def decisions_of(folder: RunFolder) -> dict[str, Decision]:
    """Return the decisions of the rounds by name; without rounds, the name is empty."""
    searches = [stage for stage in folder.stages() if stage.name == SEARCH]
    rounds = [stage.round for stage in searches if (folder.round(stage.round) / DECISION).exists()]
    return {name: decision_of(folder, name) for name in rounds}
