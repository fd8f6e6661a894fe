"""How figures look and how they are written: with colours that a page can exchange, and values to hover over."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from ..runtime.files import write_atomic, write_text

KEPT, INK, GREY, RED = "#1b6ca8", "#23303d", "#9aa5b1", "#c0392b"
"""The colours of all figures; `page.html.j2` exchanges them in dark mode."""
SHADES = LinearSegmentedColormap.from_list("kept", [f"{KEPT}0f", KEPT])
"""From hardly there, which shows the page, to the colour of what is kept."""
WIDTH = 5.4
"""Of a figure in inches: its text can be read on a phone, and is not huge where the figure is alone on a wide page."""
STYLE: Any = {
    "font.size": 10,
    "text.color": INK,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlecolor": INK,
    "axes.titlesize": 10.5,
    "figure.dpi": 150,
    "svg.fonttype": "none",
}
_HOVER = "hover: "
_SVG, _LINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_HEADER = dict.fromkeys(("Creator", "Date", "Format", "Type"))
"""What matplotlib would write at the top of every file."""


def hover(artist: Artist, text: str) -> None:
    """Give what is drawn a text that is shown under the pointer."""
    artist.set_gid(_HOVER + text)


def legend_above(axes: Axes, columns: int = 2) -> None:
    """Put the legend between the title and the curves, where it covers none."""
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=columns,
        frameon=False,
        fontsize=8.5,
        borderaxespad=0.2,
        handlelength=1.4,
        columnspacing=1.2,
    )
    rows = -(-len(axes.get_legend_handles_labels()[0]) // columns)
    axes.set_title(axes.get_title(loc="left"), pad=6 + 13 * rows)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as SVG or as PNG, atomically, and close it."""
    # A layout that fits everything in needs no second look at what is drawn.
    box = None if figure.get_layout_engine() else "tight"
    if path.suffix == ".svg":
        with plt.rc_context({"svg.hashsalt": path.stem}):
            made = io.StringIO()
            figure.savefig(made, format="svg", bbox_inches=box, transparent=True, metadata=_HEADER)
        write_text(path, _finished(made.getvalue(), re.sub(r"\W", "_", path.stem)))
    else:
        write_atomic(path, lambda file: figure.savefig(file, format="png", bbox_inches=box, facecolor="white"))
    plt.close(figure)


def _finished(svg: str, name: str) -> str:
    """Turn what `hover` has marked into titles, and make the names in a file differ from those in all others."""
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _LINK)
    root = ElementTree.fromstring(re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f]", "\ufffd", svg))  # which XML cannot have
    for element in root.iter():
        own = element.get("id", "")
        if own.startswith(_HOVER):
            del element.attrib["id"]
            title = ElementTree.Element(f"{{{_SVG}}}title")
            title.text = own.removeprefix(_HOVER)
            element.insert(0, title)
        elif own:
            element.set("id", f"{name}-{own}")
        for key, value in element.attrib.items():
            if key == f"{{{_LINK}}}href" and value.startswith("#"):
                element.set(key, f"#{name}-{value[1:]}")
            elif value.startswith("url(#"):
                element.set(key, f"url(#{name}-{value[5:]}")
    return ElementTree.tostring(root, encoding="unicode") + "\n"
