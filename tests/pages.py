"""What the pages say and show."""

from __future__ import annotations

import re

from places import ROOT

SHORT = {
    "steps=300": "steps=4",
    "steps=400": "steps=3",
    "steps=900": "steps=36",
    "steps=120, samples=64": "steps=12, samples=8",
}
"""What examples do at length is done for a moment."""


def text(name: str) -> str:
    return (ROOT / name).read_text()


def examples(name: str) -> list[str]:
    """The Python examples of a page."""
    found = re.findall(r"```python\n(.*?)```", text(name), re.DOTALL)
    for long, short in SHORT.items():
        found = [example.replace(long, short) for example in found]
    return found
