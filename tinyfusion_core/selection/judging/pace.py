"""How many steps fit into a time: measured once, and kept, so that a stopped race goes on as it began."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypedDict

from ...parsing.records import read_as
from ...runtime.distributed import all_gather_object, on_main_process
from ...runtime.files import write_json
from ...runtime.run_folder import RunFolder
from ...runtime.stages import SEARCH

FEW = 8
"""Updates that are timed."""


class Pace(TypedDict):
    """What is kept of a measurement.

    Attributes:
        seconds: of one update.
    """

    seconds: float


def seconds_per_step(train: Callable[[int], object]) -> float:
    """Time an update: what a training of a few more takes beyond a short one.

    Args:
        train: runs so many updates, each time from the beginning.
    """

    def spent(steps: int) -> float:
        started = time.perf_counter()
        train(steps)
        return time.perf_counter() - started

    spent(1)  # what happens once: imports, kernels
    short = spent(1)
    return max((spent(1 + FEW) - short) / FEW, 1e-6)


def kept_pace(run: RunFolder | None, measure: Callable[[], float]) -> float:
    """Return the seconds of an update, of the main process: those of an earlier run of this stage, or measured now.

    Args:
        run: where they are kept while the stage runs.
        measure: times an update. Called on every process.
    """
    path = None if run is None else run.part(SEARCH, "pace.json").path
    if path is not None and on_main_process(path.exists):
        return on_main_process(lambda: read_as(path, Pace, "delete it to measure again"))["seconds"]
    found = all_gather_object(measure())[0]
    if path is not None:
        on_main_process(lambda: write_json(path, {"seconds": found}))
    return found
