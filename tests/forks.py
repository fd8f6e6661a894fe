"""Commands in forks of a process that has imported everything and done nothing: to start one takes no time.

The tests' own process cannot be forked: autograd's threads do not survive it. Several processes of a command find each
other as torchrun's would.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import torch

from tinyfusion_core.cli import main
from tinyfusion_core.runtime.distributed import shutdown

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        "accelerate.utils",
        "peft",
        "timm.models.vision_transformer",
        "tinyfusion_core.pipeline.compare",
        "tinyfusion_core.pipeline.run",
        "tinyfusion_core.reporting.report",
        "tinyfusion_dit.model",
    ]
)


def command(*words: object) -> Callable[[], int]:
    """Return what `tinyfusion` does with these words, to be started."""
    return partial(main, [str(word) for word in words])


def script(path: Path, *arguments: object) -> None:
    """Run a file as a program."""
    sys.argv = [str(path), *map(str, arguments)]
    runpy.run_path(str(path), run_name="__main__")


def start(work: Callable[[], object], log: Path, processes: int = 1) -> list[ForkServerProcess]:
    """Start work, with all that it prints in a file. Returns the process of each rank.

    Args:
        work: a picklable function; the process ends with the number that it returns.
        log: gets what is printed, at its end.
        processes: how many share the work.
    """
    address: dict[str, str] = {}
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    ranks = [
        {**address, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        | {"LOCAL_WORLD_SIZE": str(processes), "ACCELERATE_USE_CPU": "true"}
        for rank in range(processes)
    ]
    started = [SERVER.Process(target=_work, args=(work, log, rank if address else {})) for rank in ranks]
    for process in started:
        process.start()
    return started


def _work(work: Callable[[], object], log: Path, environment: dict[str, str]) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which the server ignores
    os.environ.update(environment)
    torch.set_num_threads(1)
    code = work()
    if environment:
        assert torch.distributed.get_world_size() == int(environment["WORLD_SIZE"])
        shutdown()
    sys.exit(code if isinstance(code, int) else 0)


def wait(processes: Sequence[ForkServerProcess], seconds: float = 240) -> list[int | None]:
    """Return the exit codes of processes, of a signal its negative number; None of one that has not ended in time."""
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    return [process.exitcode for process in processes]


def kill_when(process: ForkServerProcess, there: Callable[[], object]) -> None:
    """Kill a process once something is there; it must not end by itself before."""
    deadline = time.monotonic() + 120
    while not there():
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    process.join()
