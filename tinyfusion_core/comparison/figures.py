"""Figures of a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.ticker import LogLocator, NullLocator

from ..reporting.figures import INK, KEPT, STYLE, save_figure

GREY = "#b3bcc7"
Point = tuple[float, float]


def draw_scatter(subsets: Sequence[Point], marks: Mapping[str, Point], learned: Sequence[str], path: Path) -> None:
    """Plot the loss right after pruning against the loss after recovery.

    Args:
        subsets: points of the random subsets.
        marks: points of the candidates, by name.
        learned: names of the searches among them.
        path: the image file.
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(8.4, max(4.4, 0.26 * len(marks))))
        figure.subplots_adjust(left=0.09, right=0.74, top=0.97, bottom=0.12)
        if subsets:
            x, y = zip(*subsets, strict=True)
            axes.scatter(x, y, s=24, color=GREY, linewidths=0, label="random subsets")
            axes.legend(loc="best", frameon=False, fontsize=9, labelcolor=INK, handletextpad=0.2)
        for name, point in marks.items():
            color = KEPT if name in learned else INK
            axes.scatter(*point, s=44, color=color, edgecolor="white", linewidth=0.8, zorder=3)
        points = [*subsets, *marks.values()]
        for side, values in (("x", [x for x, _ in points]), ("y", [y for _, y in points])):
            if values and 0 < 20 * min(values) < max(values):
                axes.set(**{f"{side}scale": "log"})
                axis = axes.xaxis if side == "x" else axes.yaxis
                axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.set_major_formatter("{x:g}")
                axis.set_minor_locator(NullLocator())
        axes.margins(0.05)
        axes.set(
            xlabel="calibration loss (held out, right after pruning)",
            ylabel="recovered loss (held out, after recovery)",
        )
        _label_at_the_side(axes, marks, learned)
        save_figure(figure, path)


def draw_kept(fractions: Mapping[str, Sequence[float]], path: Path) -> None:
    """Plot which blocks each candidate keeps: one row per candidate, shaded by the fraction of seeds."""
    names = list(fractions)
    values = np.array([fractions[name] for name in names])
    count = values.shape[1]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(8.4, 0.7 + 0.27 * len(names)))
        shades = LinearSegmentedColormap.from_list("kept", ["#eef1f5", KEPT])
        axes.pcolormesh(values, cmap=shades, vmin=0, vmax=1, edgecolors="white", linewidth=2)
        axes.set_yticks(np.arange(len(names)) + 0.5, names, parse_math=False)
        axes.set(xlabel="block", xticks=np.arange(count) + 0.5, xticklabels=range(count))
        axes.invert_yaxis()
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        if count > 16:
            axes.tick_params(axis="x", labelsize=7.5)
        save_figure(figure, path)


def draw_distribution(
    subsets: Sequence[float], choices: Mapping[str, Sequence[float]], learned: Sequence[str], path: Path
) -> None:
    """Plot a histogram of the random subsets' recovered losses, and below it each candidate's, one mark per seed."""
    names = list(choices)
    with plt.rc_context(STYLE):
        figure, (top, bottom) = plt.subplots(
            2,
            1,
            figsize=(8.4, 2.4 + 0.27 * len(names)),
            sharex=True,
            height_ratios=[2.0, 0.27 * len(names) + 0.1],
            layout="constrained",
        )
        top.hist(subsets, bins=min(30, max(8, len(subsets) // 4)), color=GREY, edgecolor="white", linewidth=0.6)
        top.set(ylabel="random subsets")
        top.tick_params(axis="x", length=0)
        for row, name in enumerate(names):
            color = KEPT if name in learned else INK
            bottom.axhline(row, color="#e4e7eb", linewidth=0.8, zorder=0)
            bottom.scatter(choices[name], [row] * len(choices[name]), s=34, color=color, alpha=0.75, linewidths=0)
        bottom.set_yticks(range(len(names)), names, parse_math=False)
        bottom.set_ylim(len(names) - 0.4, -0.6)
        bottom.set(xlabel="recovered loss (held out, after recovery)")
        bottom.tick_params(axis="y", length=0)
        for axes in (top, bottom):
            axes.axvline(min(subsets), color=GREY, linewidth=1, linestyle=":", zorder=0)
        save_figure(figure, path)


def _label_at_the_side(axes: Axes, marks: Mapping[str, Point], learned: Sequence[str]) -> None:
    """Labels in a column at the right, in the order of their points and connected by lines, without overlaps."""
    to_axes = axes.transData + axes.transAxes.inverted()
    heights = {name: float(to_axes.transform(point)[1]) for name, point in marks.items()}
    names = sorted(marks, key=lambda name: (heights[name], marks[name][0]))
    gap = min(0.052, 1 / max(1, len(names)))
    places: list[float] = []
    for name in names:  # upwards, as low as the point and the name below allow
        places.append(max(heights[name], places[-1] + gap) if places else max(0.0, heights[name]))
    for i in reversed(range(len(places))):
        limit = 1.0 if i == len(places) - 1 else places[i + 1] - gap
        places[i] = min(places[i], limit)
    for name, place in zip(names, places, strict=True):
        color = KEPT if name in learned else INK
        axes.annotate(
            name,
            xy=marks[name],
            xytext=(1.03, place),
            textcoords="axes fraction",
            va="center",
            color=color,
            fontsize=9,
            fontweight="bold" if name in learned else "normal",
            arrowprops={"arrowstyle": "-", "color": color, "alpha": 0.35, "linewidth": 0.8, "shrinkB": 4},
            annotation_clip=False,
            parse_math=False,
        )
