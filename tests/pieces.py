"""What workers do in tests: a module, since their processes import what they are handed."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from tinyfusion_core.errors import UserError


def note(folder: Path, piece: int) -> None:
    """Leave a file for each time that a piece is done; 1 dies the first time, 3 is refused, 5 is a bug."""
    if piece == 3:
        raise UserError("no third piece")
    if piece == 5:
        raise ZeroDivisionError("of the work's own")
    begun = folder / f"{piece} begun"
    if piece == 1 and not begun.exists():
        begun.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    (folder / str(piece)).write_text(str(os.getpid()))
