"""The folder of a run: readable results, metrics and checkpoints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError
from .checkpoints import Checkpoints
from .files import read_json, write_json, write_text
from .stages import OUTPUTS, Stage, stages_of

FAULTS = {"skipped": "steps skipped (loss or gradient not finite)", "bad_samples": "unreadable samples replaced"}
"""Counters in `metrics.jsonl` that should be zero, and their descriptions."""
COMPARISON_RESULTS = "findings.json"
"""Results file of a comparison; a run folder never has one."""


class RunFolder:
    """The folder of one run.

    It holds `recipe.yaml` (resolved), `metrics.jsonl` (one line per logged step), `decision.json`, `student/`,
    `metrics.json` (final metrics), `report.html`, `figures/`, and `checkpoints/` while a stage runs. With progressive
    pruning it contains one such folder for each round, with the results of that round's search and recovery.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def round(self, name: str) -> RunFolder:
        """Return the folder of a round; an empty name is the run folder itself."""
        return RunFolder(self / name) if name else self

    def stages(self) -> list[Stage]:
        """Return the stages of the run, in order, from its `recipe.yaml`."""
        return stages_of(yaml.safe_load((self / "recipe.yaml").read_text()))

    def holds_comparison(self) -> bool:
        """Return whether this folder belongs to a comparison rather than a run."""
        return any((self / name).exists() for name in (COMPARISON_RESULTS, "cells"))

    # Metrics

    def log(self, stage: str, step: int, values: Mapping[str, Any]) -> None:
        """Append one line to `metrics.jsonl`.

        Raises:
            UserError: the file cannot be written.
        """
        path = self / "metrics.jsonl"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write(json.dumps({"stage": stage, "step": step, **values}) + "\n")
        except OSError as e:
            raise UserError(f"{path}: cannot be written ({e.strerror}). Free space, then run again to go on") from e

    def metrics(self, stage: str | None = None) -> list[dict[str, Any]]:
        """Return the logged lines of one stage or of all; an incomplete last line is left out."""
        path = self / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        entries = [entry for line in lines if (entry := _parsed(line)) is not None]
        return [e for e in entries if stage is None or e["stage"] == stage]

    def spent(self, seconds: float, stage: str | None = None) -> float:
        """Return the total time of a stage in seconds, including earlier, interrupted processes."""
        logged: list[float] = [e.get("seconds", 0.0) for e in self.metrics(stage)[-1:]]
        return max([seconds, *logged])

    def faults(self, stage: str) -> dict[str, int]:
        """Return how many steps a stage has skipped and how many samples it has replaced, by description."""
        last = self.metrics(stage)[-1:]
        return {name: e[key] for e in last for key, name in FAULTS.items() if e.get(key)}

    def rewind(self, stage: str, step: int) -> None:
        """Drop the logged lines of a stage after `step`, which will be logged again."""
        kept = [e for e in self.metrics() if e["stage"] != stage or e["step"] <= step]
        if kept:
            write_text(self / "metrics.jsonl", "".join(json.dumps(e) + "\n" for e in kept))
        else:
            (self / "metrics.jsonl").unlink(missing_ok=True)

    # Checkpoints, and what else a stage keeps only while it runs

    def checkpoints(self, stage: str) -> Checkpoints:
        """Return the checkpoints of a stage."""
        return Checkpoints(self / "checkpoints" / stage)

    def part(self, stage: str, name: str) -> RunFolder:
        """Return the folder of a sub-task within a stage; deleted when the stage finishes."""
        return RunFolder(self.checkpoints(stage).path / name)

    def drop_checkpoints(self, stage: str) -> None:
        """Delete the checkpoints of a stage."""
        shutil.rmtree(self.checkpoints(stage).path, ignore_errors=True)
        with suppress(OSError):  # other stages' are in it
            (self / "checkpoints").rmdir()

    # Finished stages

    def finished(self) -> dict[str, dict[str, Any]]:
        """Return the finished stages: name -> key (hash of what decides its result) and seconds."""
        path = self / "stages.json"
        stages: dict[str, dict[str, Any]] = read_json(path) if path.exists() else {}
        return stages

    def finish(self, stage: str, key: str, seconds: float) -> None:
        """Record a stage as finished and delete its checkpoints.

        Args:
            stage: name of the stage.
            key: hash of everything that decides its result.
            seconds: time it took.
        """
        write_json(self / "stages.json", {**self.finished(), stage: {"key": key, "seconds": round(seconds, 1)}})
        self.drop_checkpoints(stage)

    def restart(self, stage: str, exhibits: Collection[str] = ()) -> None:
        """Delete a stage's record, log and results, files of these names included, so that it runs again."""
        write_json(self / "stages.json", {k: v for k, v in self.finished().items() if k != stage})
        for name in (*OUTPUTS[stage], *exhibits):
            if (self / name).is_dir():
                shutil.rmtree(self / name)
            else:
                (self / name).unlink(missing_ok=True)
        self.drop_checkpoints(stage)
        self.rewind(stage, -1)


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        entry: dict[str, Any] = json.loads(line)
    except ValueError:
        return None
    return entry


def existing_run(path: Path | str) -> RunFolder:
    """Return the folder of an existing run.

    Raises:
        UserError: there is no run in this folder.
    """
    if (Path(path) / COMPARISON_RESULTS).exists():
        raise UserError(f"{path}: a comparison, not a run; its page is {Path(path) / 'report.html'}")
    if not (Path(path) / "recipe.yaml").is_file():
        raise UserError(f"{path}: not a run folder (no recipe.yaml in it)")
    return RunFolder(path)
