"""kill -9 at random moments, and the outcome of an undisturbed run, bit for bit. See kills.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from places import TESTS

ONE = "{class_path: FirstN, init_args: {keep: 4}}"
SEARCH = "{keep: 4, steps: 20, update: LoRA}"
FINALS = f"{{class_path: Finals, init_args: {{search: {SEARCH}, masks: 2, steps: 8, samples: 16}}}}"
RUN = ["--search.steps=30", "--recover.steps=30", "--trainer.checkpoint_every=4", "--recover.kd=MaskedKD"]
COMPARE = ["--recover.steps=20", "--trainer.checkpoint_every=4", "--compare.random=1", "--compare.seeds=1"]
COMPARE += [f"--compare.candidates={{one: {ONE}, finals: {FINALS}}}"]


def survive(recipe: Path, folder: Path, processes: int, kills: int, command: str, flags: list[str]) -> dict:
    folder.mkdir()
    arguments = [str(folder), str(processes), str(kills), "7", command, str(recipe), *flags]
    program = [sys.executable, str(TESTS.joinpath("kills.py")), *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(program, env=env, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["killed"] == kills
    return found


def test_a_killed_run_goes_on_bit_for_bit(recipe: Path, tmp_path: Path) -> None:
    survive(recipe, tmp_path / "kills", 1, 3, "run", RUN)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "command", "kills"), [(1, "run", 12), (1, "compare", 12), (2, "run", 10), (2, "compare", 6)]
)
def test_killed_anywhere(recipe: Path, tmp_path: Path, processes: int, command: str, kills: int) -> None:
    flags = RUN if command == "run" else COMPARE
    survive(recipe, tmp_path / "kills", processes, kills, command, flags)
