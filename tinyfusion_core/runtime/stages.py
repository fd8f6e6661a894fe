"""The stages of a run: names, order, the files each one writes, and what is recorded of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NotRequired, TypedDict

from ..errors import UserError
from ..parsing.records import shaped

TRAIN, SEARCH, RECOVER, EVALUATE = "train", "search", "recover", "evaluate"
UPDATE = "weight_update.safetensors"
"""What a search has made of the weights that stay, if the recovery begins with them."""
FORECASTS = "forecasts.json"
"""What a recovery that is judged was expected to come to."""
OUTPUTS = {
    TRAIN: ("teacher",),
    SEARCH: ("decision.json", "costs.json", UPDATE),
    RECOVER: ("student", FORECASTS),
    EVALUATE: ("metrics.json", "evaluation", "figures", "report.html"),
}
"""What each stage writes to the run folder, besides its lines of `metrics.jsonl` and the exhibits of metrics."""


@dataclass(frozen=True)
class Stage:
    """A stage of a run.

    Attributes:
        name: one of `OUTPUTS`; also its section of the recipe and its label in the log.
        round: name of its round; empty if the recipe has no rounds.
        settings: its section of the recipe, in the form in which the recipe was given. None for a round without
            recovery, whose stage saves the student as pruned.
    """

    name: str
    round: str = ""
    settings: Any = field(default=None, compare=False)

    @property
    def key(self) -> str:
        """A unique name: `search`, or `d14.search`."""
        return f"{self.round}.{self.name}" if self.round else self.name

    @property
    def section(self) -> str:
        """Its section of a recipe: `search`, or `rounds.d14.search`."""
        return f"rounds.{self.key}" if self.round else self.key

    @property
    def title(self) -> str:
        """The name shown to users: `search`, or `d14 search`."""
        return self.key.replace(".", " ")


def stages_of(sections: Mapping[str, Any]) -> list[Stage]:
    """Return the stages of a recipe in order.

    Args:
        sections: the recipe's sections by name, as parsed YAML or as objects; those of progressive pruning are under
            `rounds`. A section that is None or missing is not part of the run.
    """
    stages = [Stage(TRAIN, settings=sections[TRAIN])] if sections.get(TRAIN) is not None else []
    for name, part in {"": sections, **(sections.get("rounds") or {})}.items():
        if part.get(SEARCH) is not None:
            stages += [Stage(SEARCH, name, part[SEARCH]), Stage(RECOVER, name, part.get(RECOVER))]
    return [*stages, Stage(EVALUATE, settings=sections.get(EVALUATE) or ())]


class Finished(TypedDict):
    """What is known of a finished stage: the hash of what decides its result, and how long it took."""

    key: str
    seconds: float


class Now(TypedDict):
    """What a comparison or a stage of several parts is computing, as `now.json` has it.

    Attributes:
        part: the folder beside the file that it is logged in; empty: the run's own log.
        what: what it is.
        done: how much of all is done.
        total: how much there is.
        steps: steps of what is logged meanwhile.
    """

    part: str
    what: str
    done: int
    total: int
    steps: NotRequired[int | None]


class ForecastRecord(TypedDict):
    """What a recovery was expected to come to.

    Attributes:
        step: steps that were done.
        teacher: the teacher's loss.
        curve: [steps, expected loss, lowest, highest] from then to the end, the steps ascending.
        limit: the loss at which it stops, if there is one.
        reached: the steps after which it is expected to be reached, the fewest and the most; None for never.
    """

    step: int
    teacher: float
    curve: list[list[float]]
    limit: float | None
    reached: list[float | None] | None


class Forecasts(TypedDict):
    """The first forecast of a recovery, and the newest."""

    format_version: int
    first: ForecastRecord
    newest: ForecastRecord


class LogLine(TypedDict):
    """What is in a line of `metrics.jsonl` for certain; a stage adds numbers of its own."""

    stage: str
    step: int
    loss: NotRequired[float | None]
    seconds: NotRequired[float]
    skipped: NotRequired[int]
    bad_samples: NotRequired[int]
    gt: NotRequired[float | None]
    confidence: NotRequired[float]
    decision: NotRequired[list[int]]
    marginals: NotRequired[list[float]]


def log_line(line: bytes) -> dict[str, Any] | None:
    """Return what is in a line of `metrics.jsonl`, numbers that are not finite as None; None if it is no such line."""
    try:
        entry = json.loads(line, parse_constant=lambda name: None)
        shaped(entry, LogLine, "", "")
    except (ValueError, RecursionError, UserError):
        return None
    return dict(entry)
