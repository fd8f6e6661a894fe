"""Notebooks for Jupyter from the pages that are notebooks: `make notebooks` writes them into `notebooks/`.

Such a page has Python, commands and files, each as a cell; the text block that follows a cell is what it has printed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

DOCS = Path(__file__).parent
PAGES = ["vit", "smollm2", "first-plugin"]
CELL = re.compile(r'^```(python|bash|yaml)(?: title="(.*?)")?\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?', re.M | re.S)


class Cell(NamedTuple):
    """A part of a page.

    Attributes:
        kind: prose, python, bash or yaml.
        file: the file that the source is, if it is one.
        source: what is run, or the Markdown of prose.
        output: what that has printed.
    """

    kind: str
    file: str
    source: str
    output: str = ""


def cells(page: str) -> Iterator[Cell]:
    """Take a page apart, in order."""
    end = 0
    for found in CELL.finditer(page):
        yield Cell("prose", "", page[end : found.start()])
        yield Cell(*(part or "" for part in found.groups()))
        end = found.end()
    yield Cell("prose", "", page[end:])


def notebook(page: str) -> dict[str, Any]:
    """Return a page as Jupyter's JSON, format 4.4."""
    made = []
    for cell in cells(page):
        if cell.kind == "prose":
            made.append({"cell_type": "markdown", "metadata": {}, "source": cell.source.strip()})
            continue
        source = cell.source.rstrip()
        if cell.file:
            source = f"%%writefile {cell.file}\n{source}"
        elif cell.kind == "bash":
            source = "\n".join(f"{'%' if line.startswith('cd ') else '!'}{line}" for line in source.splitlines())
        outputs = [{"output_type": "stream", "name": "stdout", "text": cell.output}] if cell.output else []
        code = {"execution_count": None, "metadata": {}, "outputs": outputs, "source": source}
        made.append({"cell_type": "code", **code})
    return {"cells": made, "metadata": {"language_info": {"name": "python"}}, "nbformat": 4, "nbformat_minor": 4}


if __name__ == "__main__":
    folder = DOCS.parent / "notebooks"
    folder.mkdir(exist_ok=True)
    for name in PAGES:
        (folder / f"{name}.ipynb").write_text(json.dumps(notebook((DOCS / f"{name}.md").read_text()), indent=1) + "\n")
        print(folder / f"{name}.ipynb")
