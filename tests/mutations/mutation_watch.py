"""A pytest plugin for runs on a mutated copy: pytest's own exit code 1 is left for a test that has failed by itself.

Other codes: a test could not be collected or set up; the engine, or the mutated file, was not imported from the copy.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

COPY = Path(os.environ["TINYFUSION_COPY"])
MUTATED = COPY / os.environ["TINYFUSION_MUTATED"]
NO_TEST, NOT_THE_COPY = 70, 71


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        pytest.exit(f"not collected: {report.longreprtext}", returncode=NO_TEST)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed and report.when != "call":
        pytest.exit(f"failed before or after its test: {report.longreprtext}", returncode=NO_TEST)


def pytest_sessionfinish() -> None:
    loaded = [Path(module.__file__) for module in list(sys.modules.values()) if getattr(module, "__file__", None)]
    elsewhere = [file for file in loaded if "tinyfusion_core" in file.parts and not file.is_relative_to(COPY)]
    if elsewhere or (MUTATED != COPY and MUTATED not in loaded):
        pytest.exit(f"{MUTATED} was not imported; from elsewhere: {elsewhere}", returncode=NOT_THE_COPY)
