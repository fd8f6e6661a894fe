"""Renders a self-contained HTML page from a template."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

TEMPLATES = Environment(
    loader=PackageLoader("tinyfusion_core.reporting"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


@dataclass(frozen=True)
class Picture:
    """A PNG file, or an SVG file of our own figures.

    Attributes:
        path: the file.
        shown: caption under it.
    """

    path: Path
    shown: str = ""

    @property
    def svg(self) -> str | None:
        """The elements of an SVG file, whose texts are escaped; None for a PNG file."""
        return self.path.read_text(encoding="utf-8") if self.path.suffix == ".svg" else None

    @property
    def data(self) -> str:
        """The file's content in base64."""
        return base64.b64encode(self.path.read_bytes()).decode()


@dataclass(frozen=True)
class Figures:
    """A section of a page: pictures beside each other, and a caption.

    Attributes:
        title: its title.
        caption: how to read the pictures.
        pictures: the pictures.
        command: what makes more of them, with `{run}` for the run folder; empty: nothing does.
    """

    title: str
    caption: str
    pictures: Sequence[Picture]
    command: str = ""


def render_page(
    template: str, title: str, figures: Sequence[Figures], command: str, recipe: str, brand: str, **more: Any
) -> str:
    """Return the HTML of a page. All texts are plain: the template escapes them.

    Args:
        template: name of a file in `templates/` that extends `page.html.j2`.
        title: title of the page.
        figures: the sections of pictures.
        command: the command that made it; empty leaves it out of the record.
        recipe: the resolved recipe, likewise.
        brand: text above the title.
        more: further variables of the template.
    """
    return TEMPLATES.get_template(template).render(
        title=title, figures=figures, command=command, recipe=recipe, brand=brand, **more
    )
