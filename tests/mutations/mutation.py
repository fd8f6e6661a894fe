"""A mistake made on purpose in a copy of the engine, and the tests that must notice it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from places import ROOT, TESTS

ENGINE = ROOT / "tinyfusion_core"


@dataclass(frozen=True)
class Mutation:
    """One wrong line.

    Attributes:
        name: what goes wrong.
        file: path below tinyfusion_core.
        right: text that occurs exactly once in the file.
        wrong: what takes its place.
        tests: files or node ids below tests, of which one must fail.
    """

    name: str
    file: str
    right: str
    wrong: str
    tests: tuple[str, ...]

    def source(self) -> str:
        """The mutated text of the file. Fails if the mutation is stale."""
        text = (ENGINE / self.file).read_text()
        found = text.count(self.right)
        assert found == 1, f"stale: {self.file} holds {found} times, not once: {self.right}"
        return text.replace(self.right, self.wrong)


def run_on_copy(
    folder: Path, tests: Iterable[str], mutation: Mutation | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run tests on a copy of the engine in this folder, in a process of its own. Exit codes: `mutation_watch`."""
    shutil.copytree(ENGINE, folder / ENGINE.name, ignore=shutil.ignore_patterns("__pycache__"))
    if mutation is not None:
        (folder / ENGINE.name / mutation.file).write_text(mutation.source())
    path = (folder, TESTS / "mutations", ROOT / "plugins")
    env = {
        **{name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
        "PYTHONPATH": os.pathsep.join(map(str, path)),
        "PYTHONDONTWRITEBYTECODE": "1",
        "TINYFUSION_COPY": str(folder),
        "TINYFUSION_MUTATED": "" if mutation is None else f"{ENGINE.name}/{mutation.file}",
        "HYPOTHESIS_STORAGE_DIRECTORY": str(folder / "hypothesis"),  # its finds are none of the engine's
    }
    # -P: else the folder that it starts in comes before the copy.
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-x", "--tb=line", "-p", "mutation_watch"]
    plugins = ["-p", "no:cacheprovider", "-p", "no:xdist", "-m", "slow or not slow"]
    nodes = [str(TESTS / test) for test in tests]
    return subprocess.run(
        [*command, *plugins, *nodes], cwd=ROOT, env=env, timeout=timeout, capture_output=True, text=True
    )
