"""Figures of a comparison."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from ..reporting.drawing import GREY, INK, KEPT, SHADES, STYLE, WIDTH, hover, save_figure
from .statistics import RANDOM, MeanStd

Point = tuple[float, float]


def draw_scatter(
    subsets: Sequence[Point], marks: Mapping[str, tuple[MeanStd, MeanStd]], learned: Sequence[str], path: Path
) -> None:
    """Plot the loss right after pruning against the loss after recovery.

    Args:
        subsets: points of the random subsets.
        marks: both losses of the candidates, by name, with their deviations; numbered in this order.
        learned: names of the searches among them.
        path: the image file.
    """
    means = {name: (x.mean or 0.0, y.mean or 0.0) for name, (x, y) in marks.items()}
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(WIDTH, 4.2), layout="constrained")
        for x, y in subsets:
            (dot,) = axes.plot(x, y, "o", color=GREY, markersize=4, markeredgewidth=0)
            hover(dot, f"random subset: {x:.4g} right after pruning, {y:.4g} recovered")
        for name, (x, y) in means.items():
            color, top = (KEPT, 4) if name in learned else (INK, 3)
            across, along = (value.sd or 0.0 for value in marks[name])
            axes.errorbar(x, y, xerr=across, yerr=along, fmt="none", ecolor=color, elinewidth=0.9, alpha=0.6, zorder=2)
            (dot,) = axes.plot(x, y, "o", color=color, markersize=6, markeredgewidth=0, zorder=top)
            hover(dot, f"{name}: {marks[name][0].text()} right after pruning, {marks[name][1].text()} recovered")
        for side, values in zip("xy", zip(*subsets, *means.values(), strict=True), strict=True):
            if 0 < 20 * min(values) < max(values):
                axes.set(**{f"{side}scale": "log"})
                axis = axes.xaxis if side == "x" else axes.yaxis
                axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.set_major_formatter("{x:g}")
                axis.set_minor_locator(NullLocator())
        axes.margins(0.12, 0.07)
        axes.set(xlabel="loss right after pruning", ylabel="loss after recovery")
        figure.canvas.draw()  # which settles where the points are
        _number(axes, means, learned)
        save_figure(figure, path)


def _number(axes: Axes, means: Mapping[str, Point], learned: Sequence[str]) -> None:
    """Write the number of every mark beside it, where most room is; those that lie on each other share a text."""
    names, points = list(means), 72 / axes.figure.dpi
    places = {name: points * axes.transData.transform(point) for name, point in means.items()}
    groups: dict[str, list[int]] = {}  # by the first of those on one place
    for number, name in enumerate(names, start=1):
        first = next((other for other in groups if np.abs(places[other] - places[name]).max() < 5), name)
        groups.setdefault(first, []).append(number)
    taken = [places[name] for name in groups]
    for first, group in groups.items():
        text = ", ".join(map(str, group))
        half = 2.6 * len(text)  # about half as wide as it is drawn
        sides = [places[first] + (x * (6 + half), y * 7) for x in (1, -1) for y in (1, -1)]
        others = [place for place in taken if place is not places[first]]
        best = max(sides, key=lambda side: sum(sorted(_apart(side, other, half) for other in others)[:2]))
        taken.append(best)
        color = KEPT if any(names[number - 1] in learned for number in group) else INK
        axes.annotate(
            text, means[first], xytext=tuple(best - places[first]), textcoords="offset points", color=color,
            ha="center", va="center", fontsize=9, fontweight="bold", zorder=5,
        )  # fmt: skip


def _apart(text: np.ndarray, other: np.ndarray, half: float) -> float:
    """How far, in points and up to 20, a place is from a text that is as wide as twice `half`."""
    across, along = np.abs(text - other)
    return min(20.0, max(float(across) - half, float(along)))


def draw_kept(fractions: Mapping[str, Sequence[float]], path: Path) -> None:
    """Plot which blocks each candidate keeps: one row per candidate, shaded by the fraction of seeds."""
    names = list(fractions)
    count = len(fractions[names[0]])
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(WIDTH, 0.8 + 0.25 * len(names)), layout="constrained")
        for row, name in enumerate(names):
            for block, fraction in enumerate(fractions[name]):
                hover(
                    axes.barh(row, 0.92, 0.88, block + 0.04, color=SHADES(fraction), linewidth=0).patches[0],
                    f"{name}: block {block} kept with {fraction:.0%} of the seeds",
                )
        axes.set_yticks(range(len(names)), names, parse_math=False)
        every = 1 if count <= 20 else 2 if count <= 40 else 5
        axes.set(xlabel="block", xlim=(0, count), ylim=(len(names) - 0.5, -0.5))
        axes.set_xticks(np.arange(0, count, every) + 0.5, list(map(str, range(0, count, every))))
        axes.tick_params(length=0, labelsize=8.5)
        axes.spines[:].set_visible(False)
        save_figure(figure, path)


def draw_choices(
    subsets: Sequence[float], choices: Mapping[str, Sequence[float]], learned: Sequence[str], path: Path
) -> None:
    """Plot the recovered loss of every choice in a row for its candidate, and those of the random subsets below.

    Args:
        subsets: losses of the random subsets; there may be none.
        choices: losses of each candidate, one for each seed, best candidate first.
        learned: names of the searches among them.
        path: the image file.
    """
    rows = {**choices, **({RANDOM: subsets} if subsets else {})}
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(WIDTH, 0.8 + 0.27 * len(rows)), layout="constrained")
        for row, (name, losses) in enumerate(rows.items()):
            color = GREY if name == RANDOM and subsets else KEPT if name in learned else INK
            axes.axhline(row, color=GREY, linewidth=0.5, alpha=0.4, zorder=0)
            for loss in losses:
                (dot,) = axes.plot(loss, row, "|" if color == GREY else "o", color=color, markersize=7, alpha=0.75)
                hover(dot, f"{name}: {loss:.4g}")
            if len(losses) > 1:
                mean, sd = statistics.fmean(losses), statistics.stdev(losses)
                axes.errorbar(mean, row + 0.28, xerr=sd, fmt="d", color=color, markersize=3, elinewidth=1)
        if subsets:
            axes.axvline(min(subsets), color=GREY, linewidth=1, linestyle=":", zorder=0)
        axes.set_yticks(range(len(rows)), list(rows), parse_math=False)
        axes.set(ylim=(len(rows) - 0.4, -0.6), xlabel="loss after recovery")
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.tick_params(axis="y", length=0, labelsize=8.5)
        save_figure(figure, path)
