"""The folder of a run: readable results, metrics and checkpoints."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import yaml

from ..errors import UserError
from ..parsing.records import beside, check_regular, read_as, read_json, read_text
from ..parsing.yaml12 import load_yaml
from .checkpoints import Checkpoints
from .files import write_json, write_text
from .locking import FolderKind, check_held
from .stages import FORECASTS, OUTPUTS, Finished, Forecasts, Stage, log_line, stages_of
from .trackers import IDS

FAULTS = {"skipped": "steps skipped (loss or gradient not finite)", "bad_samples": "unreadable samples replaced"}
"""Counters in `metrics.jsonl` that should be zero, and their descriptions."""
COMPARISON_RESULTS = "findings.json"
"""Results file of a comparison; a run folder never has one."""
RESULT_CACHE, NOW = "cells", "now.json"
"""Folder of a comparison's results, and the file, there or among a stage's parts, that says what is being computed."""
RUN_RECORD = "run.json"
"""Record of a run: its settings, command, versions and hardware. It is written first, and tells a run folder."""


class RunRecord(TypedDict):
    """What is in `run.json`."""

    settings: dict[str, Any]
    command: NotRequired[str]
    extended: NotRequired[dict[str, list[int]]]
    versions: NotRequired[dict[str, str]]
    hardware: NotRequired[dict[str, Any]]


class RunFolder:
    """The folder of one run.

    It holds `recipe.yaml` (resolved), `metrics.jsonl` (one line per logged step), `decision.json`, `student/`,
    `metrics.json` (final metrics), `report.html`, `figures/`, and `checkpoints/`: those of the stage that runs, and the
    last one of a recovery. With progressive pruning it contains one such folder for each round, with the results of
    that round's search and recovery.

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
        """Return the stages of the run, in order, from its `recipe.yaml`.

        Raises:
            UserError: the file is missing or no recipe.
        """
        path = self / "recipe.yaml"
        try:
            return stages_of(load_yaml(read_text(path)))
        except yaml.YAMLError as e:
            raise UserError(
                f"{path}: not readable as YAML ({' '.join(str(e).split())}); run the recipe again"
            ) from None
        except (TypeError, AttributeError, KeyError):
            raise UserError(f"{path}: not the recipe of a run; run the recipe again") from None

    def holds_comparison(self) -> bool:
        """Return whether this folder belongs to a comparison rather than a run."""
        return any((self / name).exists() for name in (COMPARISON_RESULTS, RESULT_CACHE))

    # Metrics

    def log(self, stage: str, step: int, values: Mapping[str, Any]) -> None:
        """Append one line to `metrics.jsonl`.

        Raises:
            UserError: the file cannot be written, or the folder is gone.
        """
        check_held()
        path = self / "metrics.jsonl"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                check_regular(path)
            with path.open("a") as file:
                file.write(json.dumps({"stage": stage, "step": step, **values}) + "\n")
        except OSError as e:
            raise UserError(f"{path}: cannot be written ({e.strerror}). Free space, then run again to go on") from e

    def metrics(self, stage: str | None = None) -> list[dict[str, Any]]:
        """Return the logged lines of one stage or of all, without those that are damaged, which a warning names.

        An incomplete last line is what a kill leaves, and is left out silently.

        Raises:
            UserError: the log is no file, or cannot be read.
        """
        path = self / "metrics.jsonl"
        if not path.exists():
            return []
        check_regular(path)
        lines = path.read_bytes().split(b"\n")
        entries = [log_line(line) for line in lines]
        damaged = [i for i, entry in enumerate(entries[:-1], 1) if entry is None and lines[i - 1].strip()]
        if damaged:
            which = ", ".join(map(str, damaged[:5])) + (" ..." if len(damaged) > 5 else "")
            warnings.warn(f"{path}: left out what is no line of a log: {which}", stacklevel=2)
        return [e for e in entries if e is not None and (stage is None or e["stage"] == stage)]

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

    def forecasts(self) -> Forecasts | None:
        """Return what its recovery was expected to come to; None if nothing is foretold.

        Raises:
            UserError: the file is damaged.
        """
        path = self / FORECASTS
        return read_as(path, Forecasts, "delete it; no result depends on it") if path.exists() else None

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

    def finished(self) -> dict[str, Finished]:
        """Return the finished stages by name.

        Raises:
            UserError: their record is damaged.
        """
        path = self / "stages.json"
        fix = "restore the file, or delete it to do these stages again"
        return read_as(path, dict[str, Finished], fix) if path.exists() else {}

    def record(self) -> RunRecord:
        """Return what is in `run.json`.

        Raises:
            UserError: it is missing or damaged.
        """
        return read_as(self / RUN_RECORD, RunRecord, "restore it, or take another run folder")

    def finish(self, stage: str, key: str, seconds: float, keep_state: bool = False) -> None:
        """Record a stage as finished and delete its checkpoints.

        Args:
            stage: name of the stage.
            key: hash of everything that decides its result.
            seconds: time it took.
            keep_state: keep the last checkpoint, if there is one, from which the stage can be extended.
        """
        write_json(self / "stages.json", {**self.finished(), stage: {"key": key, "seconds": round(seconds, 1)}})
        if keep_state and self.checkpoints(stage).last() is not None:
            self.checkpoints(stage).keep_last()
        else:
            self.drop_checkpoints(stage)

    def reopen(self, stage: str) -> None:
        """Take back that a stage has finished; what it left stays."""
        if stage in (finished := self.finished()):
            write_json(self / "stages.json", {k: v for k, v in finished.items() if k != stage})

    def restart(self, stage: str, exhibits: Collection[str] = ()) -> None:
        """Delete a stage's record, log and results, files of these names included, so that it runs again."""
        self.reopen(stage)
        for name in (*OUTPUTS[stage], *exhibits):
            if (self / name).is_dir():
                shutil.rmtree(self / name)
            else:
                (self / name).unlink(missing_ok=True)
        self.drop_checkpoints(stage)
        self.rewind(stage, -1)


def is_run(path: Path) -> bool:
    """Return whether a folder has a run's record. Raises UserError if its file is damaged."""
    if not (path / RUN_RECORD).exists():
        return False
    record = read_json(path / RUN_RECORD)
    return isinstance(record, dict) and {"format_version", "settings"} <= record.keys()


def is_comparison(path: Path) -> bool:
    """Return whether a folder holds results of a comparison, or one that has begun."""
    marks = {
        COMPARISON_RESULTS: {"format_version", "view"},
        f"{RESULT_CACHE}/{NOW}": {"what", "done", "total"},
        f"{RESULT_CACHE}/*-*.json": {"of"},
    }
    return any(_has_keys(file, keys) for name, keys in marks.items() for file in path.glob(name))


def _has_keys(file: Path, keys: Collection[str]) -> bool:
    with suppress(UserError):
        content = read_json(file)
        return isinstance(content, dict) and set(keys) <= content.keys()
    return False


def _run_writes(folder: Path, path: Path) -> bool:
    """Whether a run writes this file, given relative to its folder."""
    recipe = _sections(folder)
    rounds = recipe.get("rounds")
    parts = path.parts[1:] if isinstance(rounds, dict) and path.parts[0] in rounds else path.parts
    written = {"recipe.yaml", RUN_RECORD, "stages.json", "metrics.jsonl", "checkpoints", "budgets", "budgets.json", IDS}
    return bool(parts) and parts[0] in written.union(*OUTPUTS.values(), _plugin_files(recipe))


def _comparison_writes(folder: Path, path: Path) -> bool:
    """Whether a comparison writes this file, given relative to its folder."""
    written = {
        "recipe.yaml",
        COMPARISON_RESULTS,
        RESULT_CACHE,
        "costs.json",
        "table.csv",
        "trials.csv",
        "figures",
        "report.html",
    }
    return path.parts[0] in written.union(_plugin_files(_sections(folder)))


def _sections(folder: Path) -> dict[str, Any]:
    """The sections of the recipe in a folder; none if it cannot be read."""
    with suppress(UserError, yaml.YAMLError):
        found = load_yaml(read_text(folder / "recipe.yaml"))
        return found if isinstance(found, dict) else {}
    return {}


def _plugin_files(recipe: Mapping[str, Any]) -> list[str]:
    """The names of the plugin files that are copied beside a recipe."""
    names = recipe.get("plugins")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


RUN = FolderKind("a run", "--run-dir", is_run, _run_writes)
COMPARISON = FolderKind("a comparison", "--run-dir", is_comparison, _comparison_writes)


def existing_run(path: Path | str) -> RunFolder:
    """Return the folder of an existing run.

    Raises:
        UserError: there is no run in this folder.
    """
    if (Path(path) / COMPARISON_RESULTS).exists():
        raise UserError(f"{path}: a comparison, not a run; its page is {Path(path) / 'report.html'}")
    for name, there in (("recipe.yaml", (Path(path) / "recipe.yaml").is_file()), (RUN_RECORD, is_run(Path(path)))):
        if not there:
            raise UserError(f"{path}: not a run folder (no {name} of a run in it){beside(Path(path))}")
    return RunFolder(path)
