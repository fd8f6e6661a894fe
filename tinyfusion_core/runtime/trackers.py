"""Send logged values to experiment trackers (TensorBoard, W&B and others) through accelerate."""

from __future__ import annotations

import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ..errors import MissingFileError, UserError, nearest, worded
from ..parsing.records import read_as
from .files import write_json

IDS = "trackers.json"
"""File with the tracker run of each stage, so that a resumed stage continues it."""


def check_trackers(names: Sequence[str]) -> None:
    """Check that trackers are known to accelerate and installed.

    Raises:
        UserError: accelerate does not know the tracker.
        MissingFileError: its package is not installed.
    """
    if not names:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
    from accelerate.utils import LoggerType

    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise UserError(f"trainer.trackers: unknown tracker '{name}'{nearest(name, LOGGER_TYPE_TO_CLASS)}")
        if name in LoggerType.list() and LoggerType(name) not in get_available_trackers():
            raise MissingFileError(
                f"trainer.trackers: '{name}' is not installed; pip install {name.replace('_', '-')}, or leave it out "
                "(metrics.jsonl is always written)"
            )


@contextmanager
def tracked(
    names: Sequence[str], project: str, folder: Path, stage: str, start: int
) -> Iterator[Callable[[Mapping[str, Any], int], None]]:
    """Open trackers for one stage of a run; yields a function that logs values at a step of the stage.

    A tracker that fails is dropped after one warning: a lost network or a full disk does not end the run.

    Args:
        names: names of the trackers.
        project: project name, for trackers that have projects.
        folder: the run folder; trackers that write files write them there.
        stage: name of the stage. Each stage has its own tracker run, with its own step axis.
        start: the step that the stage resumes from; later steps are logged again.
    """
    running: dict[str, Any] = {}

    def attempt(name: str, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as e:  # whatever a service raises
            running.pop(name, None)
            warnings.warn(
                worded(f"trainer.trackers: {name} failed and gets no more of {stage} ({type(e).__name__}: {e}); ")
                + "metrics.jsonl has everything",
                stacklevel=2,
            )

    def log(values: Mapping[str, Any], step: int) -> None:
        numbers = dict(_numbers(values))
        for name, tracker in list(running.items()):
            attempt(name, lambda tracker=tracker: tracker.log(numbers, step=step))  # type: ignore[misc]

    def open_(name: str) -> None:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        kind = LOGGER_TYPE_TO_CLASS[name]
        options = _options(name, folder, stage, start)
        where = (stage, folder / name) if kind.requires_logging_directory else (project,)
        tracker = kind(*where, **options)
        tracker.start()
        running[name] = tracker

    with ExitStack() as stack:
        for name in names:
            attempt(name, lambda name=name: open_(name))  # type: ignore[misc]
        for name, tracker in running.items():
            stack.callback(attempt, name, tracker.finish)
        yield log


def _options(name: str, folder: Path, stage: str, start: int) -> dict[str, Any]:
    """Constructor options with which a resumed stage continues its tracker run, where the tracker can."""
    if name == "tensorboard":
        return {"purge_step": start + 1}
    if name not in ("wandb", "trackio"):
        return {}
    ids: dict[str, str] = _known_ids(folder / IDS)
    if start == 0 or stage not in ids:
        ids[stage] = uuid.uuid4().hex[:8]
        write_json(folder / IDS, ids)
    title = f"{'/'.join(folder.resolve().parts[-2:])} {stage}"
    if name == "wandb":
        return {"id": ids[stage], "resume": "allow", "name": title, "dir": str(folder)}
    return {"name": f"{title} {ids[stage]}", "resume": "allow"}


def _known_ids(path: Path) -> dict[str, str]:
    return (
        read_as(path, dict[str, str], "delete it; resumed stages then get runs of their own") if path.exists() else {}
    )


def _numbers(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of a logged line by name; those of a list as `name/0`, `name/1` and so on."""
    for name, value in values.items():
        if isinstance(value, (list, tuple)):
            yield from _numbers({f"{name}/{i}": v for i, v in enumerate(value)})
        elif isinstance(value, (int, float)):
            yield name, value
