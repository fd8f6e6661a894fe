"""The results of a comparison, and their file format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NotRequired, Self, TypedDict

from ..errors import UserError
from ..evaluation import DISTANCE
from ..parsing.records import read_as, shaped
from ..runtime.files import write_json
from ..runtime.locking import check_free
from ..runtime.run_folder import COMPARISON, COMPARISON_RESULTS, RUN_RECORD
from ..samplers.demands import Budget, budget_text

FORMAT_VERSION = 1
AGAIN = "delete it and give the command again, which computes nothing twice"
ANEW = "delete it to compute that again"
FILE_NAMES = {"entries": "trials", "recovered": "healed", DISTANCE: "frechet"}
"""Attributes and metrics whose names in files differ."""
OF_RECOVERIES = ("recovery", "recovery_seconds")
"""Attributes that are in files only where they say something: where several recoveries are compared."""
NEEDED = {"decision": ("kept", "scores", "seconds", "evaluations"), "calibration": ("loss",), "healing": ("loss",)}
"""What a result of each kind has for certain."""


class CachedResult(TypedDict):
    """A result, of whichever kind, and what decides it."""

    of: dict[str, Any]
    kept: NotRequired[list[int]]
    scores: NotRequired[list[float | None] | None]
    seconds: NotRequired[float]
    evaluations: NotRequired[int]
    loss: NotRequired[float | None]


class _Trial(TypedDict):
    method: str
    seed: int
    kept: list[int]
    calibration: NotRequired[float | None]
    healed: NotRequired[float | None]
    frechet: NotRequired[float | None]
    metrics: NotRequired[dict[str, float]]
    scores: NotRequired[list[float | None] | None]
    seconds: NotRequired[float]
    evaluations: NotRequired[int]
    recovery: NotRequired[str]
    recovery_seconds: NotRequired[float | None]


class Viewed(TypedDict):
    """Of which command the results are."""

    format_version: Literal[1]
    view: Literal["compare", "audit"]


class _Findings(Viewed):
    blocks: list[str]
    budget: int | dict[str, int] | str
    num_masks: int
    steps: int
    seeds: list[int]
    teacher: float | None
    learned: list[str]
    trials: list[_Trial]
    masks: list[_Trial]
    left_out: NotRequired[dict[str, str]]
    note: NotRequired[str]
    recoveries: NotRequired[dict[str, int]]


@dataclass(frozen=True)
class Entry:
    """One subset of blocks, recovered with one seed.

    Attributes:
        method: name of the candidate that chose it; empty for a random subset.
        seed: seed of the choice and of the recovery.
        kept: indices of the kept blocks.
        calibration: held-out loss right after pruning; None if not finite.
        recovered: held-out loss after recovery; None if it has diverged.
        metrics: the other metrics after recovery, by the name of their column; one without a value is missing.
        scores: what the candidate gave each block, if it scores blocks; higher ones are kept, None is not finite.
        seconds: time that the choice took.
        evaluations: samples that the network was run on for it.
        recovery: name of the recovery among those that are compared; empty: the recipe's.
        recovery_seconds: time that the recovery took; None if nobody has measured it.
    """

    method: str
    seed: int
    kept: tuple[int, ...]
    calibration: float | None = None
    recovered: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    scores: tuple[float | None, ...] | None = None
    seconds: float = 0.0
    evaluations: int = 0
    recovery: str = ""
    recovery_seconds: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return it as in `findings.json`. What format_version 1 had no name for at first is only added if present."""
        others = dict(self.metrics)
        own = {DISTANCE: others.pop(DISTANCE, None)}
        made = in_files({f.name: own if f.name == "metrics" else getattr(self, f.name) for f in fields(self)})
        later = {name: made.pop(name) for name in OF_RECOVERIES}
        return {**made, **({"metrics": others} if others else {}), **{k: v for k, v in later.items() if v}}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Return the entry that `to_json` has written."""
        given = from_files(data)
        distance = given.pop(DISTANCE, None)
        metrics = {} if distance is None else {DISTANCE: distance}
        given = {name: value for name, value in given.items() if name in {f.name for f in fields(cls)}}
        return cls(**{**given, "metrics": {**metrics, **given.get("metrics", {})}})


@dataclass(frozen=True)
class ComparisonResults:
    """The results of a comparison.

    Attributes:
        view: `compare` or `audit`.
        blocks: paths of the blocks, in execution order.
        budget: how many blocks are kept: in total, or of every block list; or a limit of their costs, as a sentence.
        num_masks: number of subsets within the budget.
        steps: steps of every recovery.
        seeds: the seeds of every candidate.
        teacher: held-out loss of the full network.
        learned: names of the candidates that are searches.
        entries: results of the candidates.
        masks: results of the random subsets.
        left_out: criteria that are not available at this budget, and why.
        note: how the loss was measured.
        recoveries: steps of each recovery that the candidates have, by name; empty: all have the recipe's.
    """

    view: str
    blocks: tuple[str, ...]
    budget: Budget | str
    num_masks: int
    steps: int
    seeds: tuple[int, ...]
    teacher: float | None
    learned: tuple[str, ...]
    entries: tuple[Entry, ...]
    masks: tuple[Entry, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)
    note: str = ""
    recoveries: Mapping[str, int] = field(default_factory=dict)

    @property
    def kept(self) -> str:
        """What is kept, formatted for a sentence."""
        return self.budget if isinstance(self.budget, str) else f"{budget_text(self.budget)} blocks"

    def steps_of(self, recovery: str) -> int:
        """Return the steps of a recovery that is compared, or of the recipe's, which has no name."""
        return self.recoveries.get(recovery, self.steps)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the metrics besides the held-out loss that any entry has a value of."""
        return tuple(dict.fromkeys(name for entry in self.entries for name in entry.metrics))

    def save(self, path: Path) -> None:
        """Write `findings.json`."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "recoveries" or self.recoveries}
        own |= {name: [entry.to_json() for entry in own[name]] for name in ("entries", "masks")}
        write_json(path, {"format_version": FORMAT_VERSION, **in_files(own)})

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read `findings.json`.

        Raises:
            UserError: the file is missing or is not such a file.
        """
        data = read_as(path, _Findings, AGAIN)
        given = {name: value for name, value in from_files(data).items() if name in {f.name for f in fields(cls)}}
        given["entries"], given["masks"] = (tuple(map(Entry.from_json, data[name])) for name in ("trials", "masks"))
        _check(path, cls(**given))
        return cls(**given)


def _check(path: Path, results: ComparisonResults) -> None:
    """Raise UserError if numbers of blocks do not go together."""
    blocks = range(len(results.blocks))
    if not results.seeds:
        raise UserError(f"{path}: 'seeds' is []; expected at least one; {AGAIN}")
    for entry in (*results.entries, *results.masks):
        if not set(entry.kept) <= set(blocks):
            raise UserError(f"{path}: 'kept' is {list(entry.kept)}; expected some of {len(blocks)} blocks; {AGAIN}")
        if entry.scores is not None and len(entry.scores) != len(blocks):
            raise UserError(f"{path}: 'scores' has {len(entry.scores)}; expected one for each block; {AGAIN}")


def check_folder(folder: Path, view: str) -> None:
    """Check that the command `view` may write its results here.

    Raises:
        UserError: the folder holds a run, the results of another command, or other files.
    """
    what = "a run" if (folder / RUN_RECORD).exists() else ""
    found = folder / COMPARISON_RESULTS
    if found.exists() and (other := read_as(found, Viewed, AGAIN)["view"]) != view:
        what = f"the results of another command ({other})"
    if what:
        raise UserError(f"{folder}: holds {what}; choose another --run-dir")
    check_free(folder, COMPARISON)


def in_files(figures: Mapping[str, Any], missing: Any = None) -> dict[str, Any]:
    """Rename attributes to the names that files use, and expand `metrics`.

    The Fréchet distance always takes the place of `metrics`, as `missing` if it was not measured; other metrics go
    last.
    """
    made: dict[str, Any] = {}
    last: dict[str, Any] = {}
    for name, value in figures.items():
        if name == "metrics":
            last = dict(value)
            made[FILE_NAMES[DISTANCE]] = last.pop(DISTANCE, missing)
        else:
            made[FILE_NAMES.get(name, name)] = value
    return {**made, **last}


def from_files(data: Mapping[str, Any]) -> dict[str, Any]:
    """Undo `in_files`, with lists as tuples."""
    names = {there: name for name, there in FILE_NAMES.items()}
    return {names.get(name, name): _tuples(value) for name, value in data.items()}


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def read_cached(kind: str, path: Path, num_blocks: int) -> dict[str, Any]:
    """Read the file of a result.

    Args:
        kind: a key of `NEEDED`.
        path: the file.
        num_blocks: how many blocks the network has.

    Raises:
        UserError: it is damaged.
    """
    content: dict[str, Any] = dict(read_as(path, CachedResult, ANEW))
    if missing := [name for name in NEEDED[kind] if name not in content]:
        raise UserError(f"{path}: {missing[0]!r} is missing; {ANEW}")
    for name in content.keys() - CachedResult.__annotations__.keys():  # metrics, by the hash of how they were measured
        shaped(content[name], float | None, f"{path}: {name!r}", ANEW)  # type: ignore[arg-type]  # a type all the same
    kept, scores, blocks = content.get("kept"), content.get("scores"), range(num_blocks)
    if kind == "decision" and not (kept and kept == sorted(set(kept)) and set(kept) <= set(blocks)):
        raise UserError(f"{path}: 'kept' is {kept!r:.60}; expected some of 0 to {num_blocks - 1}, ascending; {ANEW}")
    if scores is not None and len(scores) != num_blocks:
        raise UserError(f"{path}: 'scores' has {len(scores)}; expected one for each of {num_blocks} blocks; {ANEW}")
    return content
