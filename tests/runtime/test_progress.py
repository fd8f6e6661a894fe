"""What a progress line says."""

from __future__ import annotations

import re

from tinyfusion_core.runtime.progress import track


def test_work_inside_work_shows_in_the_line_of_the_outer_one(capsys, monkeypatch) -> None:
    monkeypatch.setattr("tinyfusion_core.runtime.progress.SECONDS_BETWEEN_LINES", 0)
    with track("all", 2) as outer:
        outer.tell("this")
        with track("part", 3) as inner:
            inner.advance(note="loss 1")
        outer.advance(2)
    with track("alone", 1) as alone:
        alone.advance()
    lines = [re.sub(r" \(\d+ s\)$", "", line) for line in capsys.readouterr().err.splitlines()]
    assert lines == ["all: 0/2 this", "all: 0/2 this (part 1/3 loss 1)", "all: 2/2", "alone: 1/1"]
