"""Training checkpoints of a stage, verified by hash; if the newest is damaged, the one before is used."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from ..errors import UserError
from ..parsing.records import read_as
from .files import sha256, write_atomic, write_json

MANIFEST = "manifest.json"


class Saved(TypedDict):
    """What the manifest says of a checkpoint.

    Attributes:
        file: its file in the folder.
        step: optimizer updates done.
        sha256: of the file.
        finished: whether the training had stopped by then, before its last step or at it.
    """

    file: str
    step: int
    sha256: str
    finished: NotRequired[bool]


class _Manifest(TypedDict):
    checkpoints: list[Saved]


class Checkpoints:
    """The checkpoints of one stage: one file each, and a manifest of their hashes, newest last.

    A file is valid once the manifest lists it, and is deleted only after the manifest has dropped it. So whenever the
    process is killed, every file in the manifest is complete.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def save(self, step: int, state: Mapping[str, Any], keep: int) -> Path:
        """Add a checkpoint and delete all but the last `keep`.

        Args:
            step: optimizer updates done.
            state: what `torch.save` can write and `weights_only=True` can read back.
            keep: how many checkpoints to keep.

        Returns:
            Its file.

        Raises:
            UserError: the disk is full or not writable; the older checkpoints are intact.
        """
        import torch  # only here and in `load`: how a run stands is read without it

        file = self.path / f"{step:08d}.pt"
        write_atomic(file, lambda target: torch.save(dict(state), target))
        # Later steps are there when the newest checkpoint was damaged: they have been made again.
        before = [entry for entry in self._entries() if entry["step"] < step]
        newest = Saved(file=file.name, step=step, sha256=sha256(file), finished=bool(state.get("finished")))
        self._keep([*before, newest][-keep:])
        return file

    def last(self) -> Saved | None:
        """Return what the manifest says of the newest checkpoint, whose file may be damaged; None if there is none."""
        return next(reversed(self._entries()), None)

    def keep_last(self) -> None:
        """Delete all but the newest."""
        self._keep(self._entries()[-1:])

    def _keep(self, entries: Sequence[Saved]) -> None:
        write_json(self.path / MANIFEST, {"format_version": 1, "checkpoints": entries})
        for other in self.path.iterdir():
            if other.is_file() and other.name not in (MANIFEST, *(entry["file"] for entry in entries)):
                other.unlink()

    def newest(self) -> str | None:
        """Return the file name of the newest undamaged checkpoint, or None if none was saved.

        Raises:
            UserError: all of them are damaged.
        """
        damaged: list[str] = []
        for entry in reversed(self._entries()):
            name = Path(entry["file"]).name
            file = self.path / name
            if file.is_file() and sha256(file) == entry["sha256"]:
                if damaged:
                    warnings.warn(
                        f"{', '.join(damaged)}: damaged checkpoint; going on from the one before, step {entry['step']}",
                        stacklevel=2,
                    )
                return name
            damaged.append(str(file))
        if damaged:
            raise UserError(f"{', '.join(damaged)}: damaged checkpoint; delete {self.path} to begin the stage again")
        return None

    def load(self, name: str) -> dict[str, Any]:
        """Read a checkpoint named by `newest`, with `weights_only=True`.

        Raises:
            UserError: this process cannot read the file.
        """
        import torch

        try:
            state: dict[str, Any] = torch.load(self.path / name, map_location="cpu", weights_only=True)
        except OSError as e:
            raise UserError(
                f"{self.path / name}: cannot be read ({e.strerror}); every process must see the run folder"
            ) from e
        except Exception as e:  # what is no checkpoint makes the reader fail in any way it can
            raise UserError(f"{self.path / name}: no checkpoint; delete {self.path} to begin the stage again") from e
        return state

    def _entries(self) -> list[Saved]:
        manifest, fix = self.path / MANIFEST, f"delete {self.path} to begin the stage again"
        if not manifest.exists():
            return []
        try:
            return read_as(manifest, _Manifest, fix)["checkpoints"]
        except UserError as e:
            raise UserError(f"{manifest}: damaged; {fix} ({e})") from e
