"""`make gpu-check` on this machine, in small: rows that run, one that fails, one whose hardware is missing."""

from __future__ import annotations

import importlib.util
import re
import sys

import pytest

from places import ROOT

PATH = ROOT / "benchmarks" / "gpu_check.py"
spec = importlib.util.spec_from_file_location("gpu_check", PATH)
assert spec is not None and spec.loader is not None
gpu_check = importlib.util.module_from_spec(spec)
sys.modules["gpu_check"] = gpu_check  # its dataclass looks there for its annotations
spec.loader.exec_module(gpu_check)


def test_what_the_machine_lacks_and_what_takes_too_long_are_rows() -> None:
    two = next(check for check in gpu_check.CHECKS if check.processes == 2)
    assert gpu_check.run(two, "tiny", 60, gpus=1) == "not run: needs 2 GPUs"
    assert gpu_check.run(gpu_check.CHECKS[0], "tiny", 0.1, gpus=0) == "FAILED: not done after 0 s"


@pytest.mark.slow
def test_every_piece_runs_here() -> None:
    wrong = gpu_check.Check("wrong", ("--trainer.batch_size=none",))
    names = ("fp32", "fp32, 2 devices, DDP", "fp32, 2 devices, FSDP2")
    names += ("search step, sparse gating", "memory plan of a training step")
    table = gpu_check.table([*(c for c in gpu_check.CHECKS if c.name in names), wrong], "tiny", 300)
    rows = dict(re.findall(r"^\| (.*?) \| (.*) \| \d+ \|$", table, re.MULTILINE))
    for name in names[:3]:
        assert re.fullmatch(r"train .* steps/s, loss .*; search .*; recover .*", rows[name]), rows[name]
    assert "peak" in rows[names[3]]
    counted, real = re.search(r"activations (.*) \(real (.*)\)", rows[names[4]]).groups()
    assert counted == real
    assert rows["wrong"].startswith("FAILED: error: ")
    assert "trainer.batch_size" in rows["wrong"]
