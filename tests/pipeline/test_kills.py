"""kill -9 at random moments, and the outcome of an undisturbed run, bit for bit. See kills.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from kills import kills

ONE = "{class_path: FirstN, init_args: {keep: 4}}"
SEARCH = "{keep: 4, steps: 20, update: LoRA}"
FINALS = f"{{class_path: Finals, init_args: {{search: {SEARCH}, masks: 2, steps: 8, samples: 16}}}}"
RUN = ["--search.steps=30", "--recover.steps=30", "--trainer.checkpoint_every=4", "--recover.kd=MaskedKD"]
COMPARE = ["--recover.steps=20", "--trainer.checkpoint_every=4", "--compare.random=1", "--compare.seeds=1"]
COMPARE += [f"--compare.candidates={{one: {ONE}, finals: {FINALS}}}"]


def survive(recipe: Path, folder: Path, processes: int, number: int, command: str, flags: list[str]) -> None:
    folder.mkdir()
    assert len(kills(folder, processes, number, 7, [command, str(recipe), *flags])) == number


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(recipe: Path, tmp_path: Path) -> None:
    short = ["--search.steps=12", "--recover.steps=12", "--trainer.checkpoint_every=3", "--recover.kd=MaskedKD"]
    survive(recipe, tmp_path / "kills", 1, 1, "run", short)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "command", "kills"), [(1, "run", 12), (1, "compare", 12), (2, "run", 10), (2, "compare", 6)]
)
def test_killed_anywhere(recipe: Path, tmp_path: Path, processes: int, command: str, kills: int) -> None:
    flags = RUN if command == "run" else COMPARE
    survive(recipe, tmp_path / "kills", processes, kills, command, flags)
