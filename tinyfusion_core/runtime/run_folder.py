"""Everything a run makes, readable without this software."""

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
"""What a line of `metrics.jsonl` counts that should be zero, and how to say it."""
COMPARISON_RESULTS = "findings.json"
"""What a comparison leaves in its folder, and a run never does."""


class RunFolder:
    """The folder of one run.

    `recipe.yaml` (resolved), `metrics.jsonl` (one line a logged step), `decision.json`, `student/`,
    `metrics.json` (the final figures), `report.html`, `figures/`, and while a stage runs `checkpoints/`.
    Progressive pruning has one such folder for each round in it, with what the round's search and recovery made.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def round(self, name: str) -> RunFolder:
        """The folder of a round; a search of its own is the round without a name, in the run folder itself."""
        return RunFolder(self / name) if name else self

    def stages(self) -> list[Stage]:
        """The stages of the run, as its `recipe.yaml` has them."""
        return stages_of(yaml.safe_load((self / "recipe.yaml").read_text()))

    def holds_comparison(self) -> bool:
        """Whether a comparison was begun here, rather than a run."""
        return any((self / name).exists() for name in (COMPARISON_RESULTS, "cells"))

    # Metrics

    def log(self, stage: str, step: int, values: Mapping[str, Any]) -> None:
        """Append one line to `metrics.jsonl`."""
        path = self / "metrics.jsonl"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write(json.dumps({"stage": stage, "step": step, **values}) + "\n")
        except OSError as e:
            raise UserError(f"{path}: cannot be written ({e.strerror}). Free space, then run again to go on") from e

    def metrics(self, stage: str | None = None) -> list[dict[str, Any]]:
        """The logged lines, of one stage or of all. A line that a kill cut short is left out."""
        path = self / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        entries = [entry for line in lines if (entry := _parsed(line)) is not None]
        return [e for e in entries if stage is None or e["stage"] == stage]

    def spent(self, seconds: float, stage: str | None = None) -> float:
        """Seconds that some work took: its last logged line knows what earlier, interrupted processes spent too."""
        logged: list[float] = [e.get("seconds", 0.0) for e in self.metrics(stage)[-1:]]
        return max([seconds, *logged])

    def faults(self, stage: str) -> dict[str, int]:
        """The steps that a stage has skipped and the samples that it has replaced, counted by what they are."""
        last = self.metrics(stage)[-1:]
        return {name: e[key] for e in last for key, name in FAULTS.items() if e.get(key)}

    def rewind(self, stage: str, step: int) -> None:
        """Forget the lines of a stage after `step`: they will be made again."""
        kept = [e for e in self.metrics() if e["stage"] != stage or e["step"] <= step]
        if kept:
            write_text(self / "metrics.jsonl", "".join(json.dumps(e) + "\n" for e in kept))
        else:
            (self / "metrics.jsonl").unlink(missing_ok=True)

    # Checkpoints, and what else a stage keeps only while it runs

    def checkpoints(self, stage: str) -> Checkpoints:
        return Checkpoints(self / "checkpoints" / stage)

    def part(self, stage: str, name: str) -> RunFolder:
        """The folder of a piece of work within a stage; it goes when the stage is finished."""
        return RunFolder(self.checkpoints(stage).path / name)

    def drop_checkpoints(self, stage: str) -> None:
        shutil.rmtree(self.checkpoints(stage).path, ignore_errors=True)
        with suppress(OSError):  # other stages' are in it
            (self / "checkpoints").rmdir()

    # Finished stages

    def finished(self) -> dict[str, dict[str, Any]]:
        """What is known of the stages that ran to their end: name -> key and seconds."""
        path = self / "stages.json"
        stages: dict[str, dict[str, Any]] = read_json(path) if path.exists() else {}
        return stages

    def finish(self, stage: str, key: str, seconds: float) -> None:
        write_json(self / "stages.json", {**self.finished(), stage: {"key": key, "seconds": round(seconds, 1)}})
        self.drop_checkpoints(stage)

    def restart(self, stage: str, exhibits: Collection[str] = ()) -> None:
        """Forget a stage, what it logged and what it made, files of these names among it."""
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
    """The folder of a run that exists. Raises UserError when there is none."""
    if (Path(path) / COMPARISON_RESULTS).exists():
        raise UserError(f"{path}: a comparison, not a run; its page is {Path(path) / 'report.html'}")
    if not (Path(path) / "recipe.yaml").is_file():
        raise UserError(f"{path}: not a run folder (no recipe.yaml in it)")
    return RunFolder(path)
