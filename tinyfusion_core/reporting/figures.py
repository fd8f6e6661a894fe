"""Figures of a report, drawn from the files of a run folder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from ..protocols.blocks.paths import block_lists, numbers_of
from .drawing import GREY, INK, KEPT, RED, SHADES, STYLE, WIDTH, hover, legend_above, save_figure

Entries = Sequence[Mapping[str, Any]]
FEW = 10
"""Logged steps of a loss from which on a running mean is drawn."""


def decided(entries: Entries, num_blocks: int) -> Entries:
    """Return those logged lines of a search that have a decision about so many blocks."""
    return [e for e in entries if len(e.get("marginals", ())) == num_blocks and {"confidence", "decision"} <= e.keys()]


def draw_dynamics(entries: Entries, blocks: Sequence[str], decided: Path, marginals: Path) -> None:
    """Plot the decision over the search: kept blocks, and every block's probability of being kept.

    Args:
        entries: the logged lines of the search that `decided` returns.
        blocks: paths of the blocks.
        decided: the file of the kept blocks.
        marginals: the file of the probabilities.
    """
    steps = [e["step"] for e in entries]
    with plt.rc_context(STYLE):
        size = (WIDTH, 1.1 + 0.17 * max(14, len(blocks)))
        figure, axes = plt.subplots(figsize=size, layout="constrained")
        opacity = np.clip([e["confidence"] for e in entries], 0.2, 1)
        counts = [len(e["decision"]) for e in entries]  # under a budget of cost, not always the same
        kept = [block for e in entries for block in e["decision"]]
        x, alpha = np.repeat(steps, counts), np.repeat(opacity, counts)
        axes.scatter(x, kept, s=30, marker="s", color=KEPT, alpha=alpha, linewidths=0, rasterized=True)  # type: ignore[arg-type]
        axes.set(title="kept blocks", xlabel="search step")
        _along(axes, steps)
        _blocks_upwards(axes, blocks)
        save_figure(figure, decided)
        figure, axes = plt.subplots(figsize=size, layout="constrained")
        values = np.array([e["marginals"] for e in entries]).T
        columns: Sequence[float] = steps
        if len(steps) == 1:  # a column has its width from the next one
            columns, values = [steps[0] - 0.25, steps[0] + 0.25], np.repeat(values, 2, axis=1)
        image = axes.pcolormesh(
            columns, range(len(blocks)), values, cmap=SHADES, vmin=0, vmax=1, shading="nearest", rasterized=True
        )
        axes.set(title="probability that a block is kept", xlabel="search step")
        _along(axes, steps)
        _blocks_upwards(axes, blocks)
        figure.colorbar(image, ax=axes, ticks=[0, 0.5, 1], pad=0.02).outline.set_visible(False)
        save_figure(figure, marginals)


def _along(axes: Axes, steps: Sequence[int]) -> None:
    """Whole steps to the right, of which there may be one."""
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
    if len(steps) == 1:
        axes.set_xlim(steps[0] - 1.5, steps[0] + 1.5)


def _blocks_upwards(axes: Axes, blocks: Sequence[str]) -> None:
    """Blocks upwards; several block lists are told apart by lines, with their names beside them."""
    every = 1 if len(blocks) <= 16 else 2 if len(blocks) <= 40 else 5
    axes.set(ylabel="block", ylim=(-0.6, len(blocks) - 0.4), yticks=range(0, len(blocks), every))
    axes.set_yticklabels([str(number) for number in numbers_of(blocks)[::every]])
    lists = block_lists(blocks)
    for name, members in lists.items() if len(lists) > 1 else ():
        if members[0]:
            axes.axhline(members[0] - 0.5, color=INK, linewidth=0.8, linestyle=":")
        axes.annotate(
            name,
            (1, (members[0] + members[-1]) / 2),
            xycoords=("axes fraction", "data"),
            xytext=(3, 0),
            textcoords="offset points",
            rotation=-90,
            va="center",
            fontsize=8,
            parse_math=False,
        )


def draw_race(number: int, entries: Entries, path: Path) -> None:
    """Plot how far the entrants of a round of a race are behind its leader, and how sure that is.

    Args:
        number: of the round, from 1.
        entries: its entrants as `provenance.race` has them, best first; the first 12 are shown.
        path: the file to write.
    """
    finite = [e for e in entries if e["behind"] is not None]
    shown = finite[:12]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(WIDTH, 1.2 + 0.24 * len(shown)), layout="constrained")
        for place, entry in enumerate(shown):
            behind, error = entry["behind"], entry["standard_error"]
            axes.errorbar(behind, place, xerr=error, color=GREY, linewidth=1.5)
            (dot,) = axes.plot(behind, place, "o", color=KEPT, markersize=5)
            kept = " ".join(map(str, entry["kept"]))
            hover(dot, f"keeps {kept}: {behind:.4g} ± {error:.2g} behind")
        names = [", ".join(dict.fromkeys(e["of"])) for e in shown]
        axes.set_yticks(range(len(shown)), [n if len(n) < 34 else f"{n[:32]}…" for n in names], parse_math=False)
        axes.tick_params(axis="y", labelsize=8)
        axes.invert_yaxis()
        axes.xaxis.set_major_locator(MaxNLocator(5))
        left = f", best {len(shown)} of {len(entries)}" if len(shown) < len(entries) else ""
        axes.set(title=f"round {number}: {entries[0]['steps']} steps{left}", xlabel="loss behind the leader")
        save_figure(figure, path)


def draw_quality(depths: Entries, recovered: tuple[int, float] | None, path: Path) -> None:
    """Plot the losses of the depths that were tried.

    Args:
        depths: what was found at each depth, as `provenance.quality` has it.
        recovered: the depth that was taken, and its loss after the recovery as a multiple of the teacher's; None if it
            was not measured.
        path: the file to write.
    """
    kept, teacher = [len(e["kept"]) for e in depths], depths[0]["teacher"]
    short = [(len(e["kept"]), loss) for e in depths for loss in e["measured"].values() if loss < math.inf]
    predicted = np.array([e["predicted"] for e in depths])
    measures = depths[0].get("measures")  # a metric, of whose values no interval is known
    around = None if measures else np.abs(np.array([e["interval"] for e in depths]).T - predicted)
    label = "predicted" if measures else "predicted, with a 90 % interval"
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(WIDTH, 3.8), layout="constrained")
        axes.plot(*np.array(short).T, ".", color=GREY, label="measured after short recoveries")
        axes.errorbar(kept, predicted, yerr=around, fmt="o-", color=KEPT, label=label)
        axes.axhline(depths[0]["limit"], color=GREY, linestyle="--", linewidth=1, label="allowed")
        axes.axhline(teacher, color=GREY, linestyle=":", linewidth=1, label="teacher")
        if recovered:
            label = "recovered, as held-out samples say"
            axes.plot(recovered[0], recovered[1] * teacher, "*", color=RED, markersize=11, label=label)
        axes.set(xlabel="blocks kept", ylabel=measures or "loss", xticks=kept)
        legend_above(axes)
        save_figure(figure, path)


def draw_budgets(rows: Entries, teacher: float | None, path: Path) -> None:
    """Plot the held-out losses of several depths.

    Args:
        rows: what was measured at each depth, as `budgets.json` has it.
        teacher: the teacher's held-out loss.
        path: the file to write.
    """
    looks = {"pruned": (GREY, "right after pruning"), "recovered": (KEPT, "recovered")}
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(WIDTH, 3.8), layout="constrained")
        for key, (color, label) in looks.items():
            points = sorted((len(row["kept"]), row[key]) for row in rows if row[key] is not None)
            for position, (kept, loss) in enumerate(points):
                (dot,) = axes.plot(kept, loss, "o", color=color, markersize=6, label="" if position else label)
                hover(dot, f"{kept} blocks, {label}: {loss:.4g}")
            axes.plot(*np.array(points).reshape(-1, 2).T, color=color, linewidth=1.2, zorder=1)
        if teacher is not None:
            axes.axhline(teacher, color=GREY, linestyle=":", linewidth=1, label="teacher")
        axes.set(xlabel="blocks kept", ylabel="held-out loss", xticks=sorted({len(row["kept"]) for row in rows}))
        legend_above(axes, columns=3)
        save_figure(figure, path)


def draw_loss(stage: str, entries: Entries, path: Path) -> None:
    """Plot the loss of a stage that trained: what was logged, and a running mean if that is much.

    For distillation also the training loss alone, and what judged it on the way.
    """
    entries = [e for e in entries if e.get("loss") is not None]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(WIDTH, 3.2), layout="constrained")
        axes.set(title=f"training loss: {stage}", xlabel="step")
        _along(axes, [e["step"] for e in entries])
        if entries:
            _curves(axes, entries)
            legend_above(axes)
        save_figure(figure, path)


def _curves(axes: Axes, entries: Entries) -> None:
    steps, losses = [e["step"] for e in entries], [e["loss"] for e in entries]
    many = len(losses) >= FEW
    alpha, thick = (0.4, 1.0) if many else (1.0, 1.8)
    label = "loss, mean between logged steps"
    axes.plot(steps, losses, color=KEPT, alpha=alpha, linewidth=thick, label=label, marker="" if steps[1:] else "o")
    if many:
        width = max(3, len(losses) // 20)
        smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
        axes.plot(steps[width - 1 :], smooth, color=KEPT, linewidth=1.8, label=f"running mean of {width}")
    told = [e for e in entries if e.get("gt") is not None]
    plain = [e["gt"] for e in told]
    if plain:
        axes.plot([e["step"] for e in told], plain, color=GREY, linewidth=1, label="without the teacher's terms")
    _without_outliers(axes, [*losses, *plain, *_judgements(axes, entries)])


def _without_outliers(axes: Axes, drawn: Sequence[float]) -> None:
    """Show the losses but for the highest twentieth, if those are far above, and say how many are."""
    low, high = np.percentile(drawn, [0, 95])
    margin = 0.15 * (high - low) or 0.1 * abs(high) or 1.0
    axes.set_ylim(low - margin, high + margin)
    above = [value for value in drawn if value > high + margin]
    if above:
        points = "1 point is" if len(above) == 1 else f"{len(above)} points are"
        axes.set_xlabel(f"step ({points} above, up to {max(above):.3g})")


def _judgements(axes: Axes, entries: Entries) -> list[float]:
    """The losses on samples that were set apart, of which the lowest was kept; nothing if there are none."""
    judged = [(e["step"], e["validation"]) for e in entries if e.get("validation") is not None]
    if judged:
        step, lowest = min(judged, key=lambda pair: pair[1])
        axes.plot(*zip(*judged, strict=True), ".-", color=RED, linewidth=1, markersize=4, label="on samples set apart")
        axes.plot(step, lowest, "*", color=RED, markersize=11, label=f"the best, kept: step {step:,}")
    return [loss for _, loss in judged]


def draw_errors(network: str, blocks: Sequence[str], errors: Sequence[Sequence[float | None]], path: Path) -> None:
    """Plot how much what blocks change differs from the call before, over the calls of one sampling.

    Args:
        network: its name.
        blocks: paths of the blocks.
        errors: (num_blocks, calls) relative differences; None where there is nothing to compare with.
        path: the file to write.
    """
    with plt.rc_context(STYLE):
        size = (WIDTH, 1.3 + 0.17 * max(10, len(blocks)))
        figure, axes = plt.subplots(figsize=size, layout="constrained")
        values = np.array(errors, dtype=float)
        image = axes.pcolormesh(
            range(values.shape[1]), range(len(blocks)), values, cmap=SHADES, vmin=0, vmax=1, shading="nearest",
            rasterized=True,
        )  # fmt: skip
        axes.set(title=f"difference to the call before: {network}", xlabel="call in a sampling")
        _along(axes, range(values.shape[1]))
        _blocks_upwards(axes, blocks)
        figure.colorbar(image, ax=axes, ticks=[0, 0.5, 1], pad=0.02, extend="max").outline.set_visible(False)
        save_figure(figure, path)


def draw_trade(points: Entries, path: Path) -> None:
    """Plot the quality of samples against the speed of sampling, with and without caches.

    Args:
        points: what each `network` has at each `threshold`: `speed_up` and `distance`, None if it is not finite.
        path: the file to write.
    """
    networks = list(dict.fromkeys(point["network"] for point in points))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(WIDTH, 3.8), layout="constrained")
        for name, color in zip(networks, cycle((GREY, KEPT, RED, INK))):
            own = [p for p in points if p["network"] == name and p["distance"] is not None]
            axes.plot([p["speed_up"] for p in own], [p["distance"] for p in own], "-", color=color, label=name)
            for point in own:
                threshold, cache = point["threshold"], f"cache {point['threshold']:g}"
                (dot,) = axes.plot(point["speed_up"], point["distance"], "o" if threshold else "s", color=color)
                hover(dot, f"{name}, {cache if threshold else 'no cache'}: {point['distance']:.4g}")
                if threshold:
                    at = (point["speed_up"], point["distance"])
                    axes.annotate(f"{threshold:g}", at, (4, 4), textcoords="offset points", fontsize=8)
        axes.set(xlabel="sampling speed-up (squares: no cache)", ylabel="Fréchet distance")
        legend_above(axes)
        save_figure(figure, path)
