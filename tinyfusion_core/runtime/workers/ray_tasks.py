"""Pieces of work as tasks of Ray, which gives out processors and GPUs and replaces processes that die."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typing_extensions import override

from ...errors import UserError, first_line, need
from ..signals import handlers_kept, stop_requests
from .base import P, Workers, attempt

TRIES = 3
"""How often a piece is begun again after its process has died."""


@dataclass(frozen=True)
class RayWorkers(Workers):
    """Tasks of Ray: one processor each and, where there are GPUs, one of those.

    Args:
        number: so many processes on this machine, which share its GPUs.
        address: of a running cluster instead, as `ray.init` takes it; it decides how many tasks run at once.
    """

    number: int | None = None
    address: str | None = None

    @override
    @contextmanager
    def started(self) -> Iterator[None]:
        """Run Ray in the context, which may be inside of another one; see `Workers.started`."""
        ray = need("ray", "tinyfusion[ray]", "--workers")
        if ray.is_initialized():
            yield
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would tell its makers
        how: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": False}
        if self.address is None:
            how |= {"num_cpus": self.number, "include_dashboard": False}
        try:
            with handlers_kept():
                ray.init(self.address or "local", **how)
        except (ConnectionError, RuntimeError, ValueError) as e:
            raise UserError(f"--workers {self.address or self.number}: Ray does not answer: {first_line(e)}") from e
        try:
            yield
        finally:
            ray.shutdown()

    @override
    def run(self, work: Callable[[P], object], pieces: Sequence[P], logs: Path) -> Iterator[P]:
        """Do the pieces; see `Workers.run`. Ray keeps what its processes print where it was started."""
        ray = need("ray", "tinyfusion[ray]", "--workers")
        with self.started():
            try:
                gpus = ray.cluster_resources().get("GPU", 0)
                share = min(1.0, gpus / (self.number or 1))
                task = ray.remote(num_cpus=1, num_gpus=share, max_retries=TRIES)(attempt)
                waiting = {task.remote(work, piece): piece for piece in pieces}
                with stop_requests() as asked:  # an exception in a handler would end Ray's wait as one of Ray's
                    while waiting and not asked:
                        for done in ray.wait(list(waiting), timeout=1)[0]:
                            if (message := ray.get(done)) is not None:
                                raise UserError(message)
                            yield waiting.pop(done)
            except ray.exceptions.RayTaskError:
                raise  # a fault of the work, with its traceback
            except ray.exceptions.RayError as e:  # of a process, a machine or the cluster
                raise UserError(
                    f"--workers: Ray gave up: {first_line(e)}. The same command goes on where it was"
                ) from e
