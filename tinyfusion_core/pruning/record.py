"""What is recorded beside a saved network, and the decision of a run. Reading them imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

from ..errors import UserError
from ..parsing.records import check_inside, read_as
from ..runtime.files import sha256
from ..runtime.run_folder import RunFolder
from ..runtime.stages import RECOVER, SEARCH, Stage
from .decision import Decision

DECISION = "decision.json"
RECORDS = ("tinyfusion.json", "config.json")
"""Record file of a saved folder: the second, unless the model family writes a file of that name itself."""


class Record(TypedDict):
    """What is known of a saved network: its family and sizes, the SHA-256 of its files, and where it came from."""

    format_version: Literal[1]
    backbone: str
    network: dict[str, Any]
    sha256: dict[str, str]
    source: dict[str, Any]
    plugin: NotRequired[dict[str, str]]


def read_record(folder: Path) -> Record:
    """Read the record of `save_network`.

    Raises:
        UserError: it is missing, damaged or incomplete.
    """
    path = record_path(folder)
    record = read_as(path, Record, "restore the whole folder")
    if not record["sha256"]:
        raise UserError(f"{path}: incomplete; expected the files' sha256")
    check_inside(record["sha256"], path)
    return record


def record_path(folder: Path) -> Path:
    """Return the record file of a saved folder, or where it should be."""
    return next((folder / name for name in RECORDS if (folder / name).exists()), folder / RECORDS[-1])


def decision_of(run: RunFolder, round: str = "") -> Decision:
    """Read the decision of a run, or of one of its rounds: the only way to it, for whoever says what the student has.

    Raises:
        UserError: there is none, or the student that was made from it has other blocks, because a file was edited.
    """
    folder = run.round(round)
    path, made = folder / DECISION, folder / "student" / DECISION
    decision = Decision.load(path)
    if not made.exists() or not record_path(made.parent).exists():  # not made yet, or not whole
        return decision
    hashed = read_record(made.parent)["sha256"].get(DECISION)
    whole = hashed in (None, sha256(made))
    if not whole or Decision.load(made) != decision:
        raise UserError(
            f"{path if whole else made}: not the decision that student/ was made from; restore it, or "
            f"run with --restart-from {Stage(SEARCH, round).key}, or {Stage(RECOVER, round).key} to use it"
        )
    return decision
