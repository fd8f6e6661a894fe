"""Code of one's own that is called while a stage trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Moment:
    """Where a training stands after a step; the same on every process, but for `main`.

    Attributes:
        stage: `train`, `search` or `recover`.
        step: updates done.
        steps: updates of the whole stage.
        loss: mean loss of this step's batch.
        main: whether this process is the one that writes.
    """

    stage: str
    step: int
    steps: int
    loss: float
    main: bool


class Callback:
    """Called while a stage trains, on every process. By default its methods do nothing.

    A method that returns True ends the stage properly after one more step, on all processes alike. Its state is then
    its result: the same call with the same run folder returns it and trains no further. To stop in a way that the same
    call goes on from, send the process a signal instead: `signal.raise_signal(signal.SIGTERM)`.

    The short trainings within a race or a comparison, which trackers do not see either, are not told.
    """

    def on_step(self, at: Moment) -> bool | None:
        """Do something after an update. Return True to end the stage."""
        return None

    def on_log(self, at: Moment, values: Mapping[str, Any]) -> bool | None:
        """Do something with what `metrics.jsonl` gets, with or without a run folder. Return True to end the stage.

        Args:
            at: where the training stands.
            values: by name; `loss` is the mean since the last call, `validation` is there where it was judged.
        """
        return None

    def on_checkpoint(self, at: Moment, path: Path) -> bool | None:
        """Do something after a checkpoint was saved. Return True to end the stage.

        Args:
            at: where the training stands.
            path: its file. A finished stage of a recipe deletes it.
        """
        return None


class Listeners:
    """The callbacks of one training.

    Args:
        callbacks: who is told.

    Attributes:
        stop: whether one of them has asked for the end.
    """

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self.callbacks, self.stop = callbacks, False

    def tell(self, event: str, *what: Any) -> None:
        """Call a method of all of them."""
        for callback in self.callbacks:
            self.stop |= bool(getattr(callback, event)(*what))
