"""Kill a command with SIGKILL at random moments, run it again, and hold what comes out against an undisturbed run.

    python tests/kills.py FOLDER PROCESSES KILLS SEED COMMAND RECIPE FLAG ...

The processes are forked from this one, which has imported everything: a start takes no time, so kills fall everywhere,
from the plan to the report. Several of them find each other as torchrun's would, and when one is dead the others are
ended as torchrun does it: one that still waits for the dead to join cannot know.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import accelerate.utils  # noqa: F401  # imported once, for all forks
import peft  # noqa: F401
import torch
from safetensors.torch import load_file

import tinyfusion_core.pipeline.compare
import tinyfusion_core.pipeline.run  # noqa: F401
from tinyfusion_core.cli import main
from tinyfusion_core.runtime.distributed import shutdown

GRACE = 5.0
"""Seconds between asking the others to end and killing them; torchrun's are 30."""


def start(arguments: list[str], processes: int, log: Path) -> list[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(processes):
        pid = os.fork()
        if pid:
            pids.append(pid)
            continue
        code = 1
        try:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            if processes > 1:
                address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
                ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
                os.environ.update(address | {name: str(value) for name, value in ranks.items()})
            code = main(arguments)
            if processes > 1:
                assert torch.distributed.get_world_size() == processes
                shutdown()
        finally:
            sys.stdout.flush()
            os._exit(code)
    return pids


def wait(pids: list[int], seconds: float) -> dict[int, int]:
    """Exit codes of the processes that have ended within some seconds."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + seconds
    while len(codes) < len(pids) and time.monotonic() < deadline:
        for pid in set(pids) - codes.keys():
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                codes[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return codes


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


def kills(folder: Path, processes: int, number: int, seed: int, arguments: list[str]) -> dict[str, Any]:
    draws = random.Random(seed)
    log = folder / "log.txt"

    def leg(name: str) -> list[int]:
        return start([*arguments, "--run-dir", str(folder / name)], processes, log)

    began = time.monotonic()
    codes = wait(leg("whole"), 600)
    assert list(codes.values()) == [0] * processes, (codes, log.read_text()[-3000:])
    took, whole = time.monotonic() - began, outcome(folder / "whole")
    killed, finished, stages = 0, 0, []
    while True:
        pids = leg("killed")
        codes = wait(pids, draws.uniform(0, took) if killed < number else 600)
        if codes:
            codes |= wait([pid for pid in pids if pid not in codes], 600)
        else:
            victim = draws.choice(pids)
            os.kill(victim, signal.SIGKILL)
            codes = wait([victim], GRACE)
            others = [pid for pid in pids if pid != victim]
            for signum in (signal.SIGTERM, signal.SIGKILL):
                for pid in others:
                    os.kill(pid, signum)
                codes |= wait(others, GRACE)
                others = [pid for pid in others if pid not in codes]
            assert not others
            if codes[victim] == -signal.SIGKILL:
                killed += 1
                stages += [p.name for p in folder.glob("killed/checkpoints/*")] or ["elsewhere"]
                continue
            if any(codes.values()):  # it had just ended, the others had not
                continue
        assert list(codes.values()) == [0] * processes, (codes, log.read_text()[-3000:])
        assert outcome(folder / "killed") == whole, "the outcome differs"
        assert not list(folder.rglob("*.partial")), "something is half-written"
        finished += 1
        if killed >= number:
            return {"killed": killed, "finished": finished, "stages": stages}
        shutil.rmtree(folder / "killed")


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(kills(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5:])))
