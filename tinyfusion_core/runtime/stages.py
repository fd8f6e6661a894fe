"""The stages of a run: their names, their order, and what each leaves in the run folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

TRAIN, SEARCH, RECOVER, EVALUATE = "train", "search", "recover", "evaluate"
OUTPUTS = {
    TRAIN: ("teacher",),
    SEARCH: ("decision.json", "costs.json"),
    RECOVER: ("student",),
    EVALUATE: ("metrics.json", "evaluation", "figures", "report.html"),
}
"""What each stage leaves in its folder, besides its lines of `metrics.jsonl` and the exhibits of metrics."""


@dataclass(frozen=True)
class Stage:
    """A stage of a run.

    Attributes:
        name: one of `OUTPUTS`; also the section of the recipe that belongs to it, and how it is logged.
        round: name of the round it belongs to, empty where there are none.
        settings: its section of the recipe, in the form in which the recipe was given. None for a round without
            recovery, whose stage saves the student as it was pruned.
    """

    name: str
    round: str = ""
    settings: Any = field(default=None, compare=False)

    @property
    def key(self) -> str:
        """What tells it from the other stages: `search`, or `d14.search`."""
        return f"{self.round}.{self.name}" if self.round else self.name

    @property
    def title(self) -> str:
        """Its name for people: `search`, or `d14 search`."""
        return self.key.replace(".", " ")


def stages_of(sections: Mapping[str, Any]) -> list[Stage]:
    """The stages of a recipe in their order.

    Args:
        sections: the recipe's sections by name, as YAML has them or as the objects that were made of them; those of
            progressive pruning under `rounds`. A section that is None or missing is not part of the run.
    """
    stages = [Stage(TRAIN, settings=sections[TRAIN])] if sections.get(TRAIN) is not None else []
    for name, part in {"": sections, **(sections.get("rounds") or {})}.items():
        if part.get(SEARCH) is not None:
            stages += [Stage(SEARCH, name, part[SEARCH]), Stage(RECOVER, name, part.get(RECOVER))]
    return [*stages, Stage(EVALUATE, settings=sections.get(EVALUATE) or ())]
