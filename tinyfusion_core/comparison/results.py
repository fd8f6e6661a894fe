"""What a comparison has found, as a file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..runtime.files import read_json, write_json
from ..samplers.constraints import Budget

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Trial:
    """One subset of blocks, healed with one seed.

    Attributes:
        method: name of the candidate that chose it; empty for a random subset.
        seed: of the choice and of the healing.
        kept: indices of the blocks that stay.
        calibration: held-out loss right after pruning; None where a loss is not finite.
        healed: held-out loss after recovery; None where it has diverged.
        frechet: Fréchet distance after recovery, where it is measured.
        scores: what the candidate gave each block, if it scores blocks; higher stays, None is not finite.
        seconds: that the choice took.
        evaluations: samples that the network was run on for it.
    """

    method: str
    seed: int
    kept: tuple[int, ...]
    calibration: float | None = None
    healed: float | None = None
    frechet: float | None = None
    scores: tuple[float | None, ...] | None = None
    seconds: float = 0.0
    evaluations: int = 0


@dataclass(frozen=True)
class Findings:
    """All that a comparison has found.

    Attributes:
        view: `compare` or `audit`.
        blocks: paths of the blocks, in execution order.
        budget: how many blocks stay: of all together, or of every block list.
        num_masks: how many subsets there are within the budget.
        steps: of every recovery.
        seeds: that every candidate was tried with.
        teacher: held-out loss of the whole network.
        learned: names of the candidates that are searches.
        trials: of the candidates.
        masks: of the random subsets.
        left_out: criteria that cannot be had at this budget, and why.
        note: how the loss was measured.
    """

    view: str
    blocks: tuple[str, ...]
    budget: Budget
    num_masks: int
    steps: int
    seeds: tuple[int, ...]
    teacher: float | None
    learned: tuple[str, ...]
    trials: tuple[Trial, ...]
    masks: tuple[Trial, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)
    note: str = ""

    def save(self, path: Path) -> None:
        write_json(path, {"format_version": FORMAT_VERSION, **dataclasses.asdict(self)})

    @classmethod
    def load(cls, path: Path) -> Findings:
        """Raises UserError when the file is missing or holds no findings."""
        data = read_json(path)
        if not isinstance(data, dict) or data.pop("format_version", None) != FORMAT_VERSION:
            raise UserError(f"{path}: not the findings of a comparison, format_version {FORMAT_VERSION}")
        for name in ("trials", "masks"):
            data[name] = tuple(Trial(**{k: _tuples(v) for k, v in t.items()}) for t in data[name])
        return cls(**{k: _tuples(v) for k, v in data.items()})


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
