"""Kill a command with SIGKILL at random moments, run it again, and hold what comes out against an undisturbed run.

It runs in forks, see forks.py, so that kills fall everywhere, from the plan to the report.
"""

from __future__ import annotations

import json
import multiprocessing.connection
import os
import random
import shutil
import signal
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from forks import command, start, wait
from tinyfusion_core.cli import main
from tinyfusion_core.runtime.run_folder import RunFolder

GRACE = 5.0
"""Seconds between asking the others to end and killing them; torchrun's are 30."""


def outcome(folder: Path) -> Any:
    """All that a run or a comparison has found, but how long it took."""

    def timeless(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: timeless(v) for k, v in value.items() if k != "seconds"}
        return [timeless(v) for v in value] if isinstance(value, list) else value

    if (folder / "findings.json").exists():
        return timeless(json.loads((folder / "findings.json").read_text()))
    weights = load_file(folder / "student" / "model.safetensors")
    measured = json.loads((folder / "metrics.json").read_text())["measurements"]
    return [
        json.loads((folder / "decision.json").read_text()),
        {name: value.tolist() for name, value in weights.items()},
        [timeless(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()],
        [m for m in measured if m["name"] == "held-out loss"],
    ]


def die_at(place: str, step: int, *words: str) -> int:
    """Run a command that dies when a stage of a round logs this step or a later one."""
    log = RunFolder.log

    def log_and_die(self: RunFolder, stage: str, at: int, values: dict[str, Any]) -> None:
        log(self, stage, at, values)
        if f"{self.path.name}.{stage}" == place and at >= step:
            os.kill(os.getpid(), signal.SIGKILL)

    RunFolder.log = log_and_die  # type: ignore[method-assign]
    return main(list(words))


def kills(folder: Path, processes: int, number: int, seed: int, words: list[str]) -> list[str]:
    """Kill a command this many times, and let it go on; returns the stages in which it died.

    When one of several processes is dead, the others are ended as torchrun does it: one that still waits for the dead
    to join cannot know.

    Args:
        folder: an empty one.
        processes: how many share the work.
        number: how often to kill one.
        seed: of the moments.
        words: the command, without its run folder.
    """
    draws = random.Random(seed)
    log = folder / "log.txt"

    def leg(name: str) -> list[ForkServerProcess]:
        return start(command(*words, "--run-dir", folder / name), log, processes)

    began = time.monotonic()
    codes = wait(leg("whole"), 600)
    assert codes == [0] * processes, (codes, log.read_text()[-3000:])
    took, whole = time.monotonic() - began, outcome(folder / "whole")
    stages: list[str] = []
    while True:
        ranks = leg("killed")
        if len(stages) < number:
            multiprocessing.connection.wait([rank.sentinel for rank in ranks], draws.uniform(0, took))
        if len(stages) < number and all(rank.is_alive() for rank in ranks):
            victim = draws.choice(ranks)
            victim.kill()
            victim.join(GRACE)
            for end in (ForkServerProcess.terminate, ForkServerProcess.kill):
                for rank in ranks:
                    end(rank)
                wait(ranks, GRACE)
            assert not any(rank.is_alive() for rank in ranks)
            if victim.exitcode == -signal.SIGKILL:
                stages.append(next((p.name for p in folder.glob("killed/checkpoints/*")), "elsewhere"))
                continue
            if any(rank.exitcode for rank in ranks):  # it had just ended, the others had not
                continue
        codes = wait(ranks, 600)
        assert codes == [0] * processes, (codes, log.read_text()[-3000:])
        assert outcome(folder / "killed") == whole, "the outcome differs"
        assert not list(folder.rglob("*.partial")), "something is half-written"
        if len(stages) >= number:
            return stages
        shutil.rmtree(folder / "killed")
