"""Pieces of work as a Slurm job array, by submitit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic

from typing_extensions import override

from ...errors import UserError, first_line, need
from .base import P, Workers, attempt


@dataclass(frozen=True)
class SlurmWorkers(Workers):
    """An array of Slurm jobs, one for each piece.

    Args:
        number: how many run at once.
        parameters: of submitit: `timeout_min`, `slurm_partition`, `gpus_per_node`, `cpus_per_task` and others.
        cluster: `slurm`, or `local` for processes on this machine, all at once.
    """

    number: int
    parameters: Mapping[str, Any] = field(default_factory=dict)
    cluster: str = "slurm"

    @override
    def run(self, work: Callable[[P], object], pieces: Sequence[P], logs: Path) -> Iterator[P]:
        """Do the pieces; see `Workers.run`. The scripts and what the jobs print are in `logs`."""
        submitit = need("submitit", "tinyfusion[slurm]", "--workers slurm")
        try:
            executor = submitit.AutoExecutor(folder=logs, cluster=self.cluster)
            executor.update_parameters(name="tinyfusion", slurm_array_parallelism=self.number, **self.parameters)
        except (RuntimeError, NameError, TypeError, ValueError) as e:  # no sbatch here; no such parameter
            raise UserError(f"--workers slurm: {first_line(e)}") from e
        jobs = dict(zip(executor.map_array(Resumed(work), pieces), pieces, strict=True))
        try:
            for job in submitit.helpers.as_completed(list(jobs), poll_frequency=1):
                if (message := job.result()) is not None:
                    raise UserError(message)
                yield jobs[job]
        except submitit.core.utils.FailedJobError:
            raise  # a fault of the work, with its traceback
        except submitit.core.utils.UncompletedJobError as e:
            raise UserError(
                f"--workers slurm: a job has ended half-way; {logs} has what it printed. The same command goes on "
                f"where it was ({first_line(e)})"
            ) from e
        finally:
            for job in jobs:
                if not job.done():
                    job.cancel(check=False)


@dataclass(frozen=True)
class Resumed(Generic[P]):
    """Work that submitit queues again at the end of its time and after a pre-emption.

    Args:
        work: does a piece, from where it was left.
    """

    work: Callable[[P], object]

    def __call__(self, piece: P) -> str | None:
        """Do a piece; see `attempt`."""
        return attempt(self.work, piece)

    def checkpoint(self, piece: P) -> Any:
        """Return what to queue: the same piece."""
        return need("submitit", "tinyfusion[slurm]", "--workers slurm").helpers.DelayedSubmission(self, piece)
