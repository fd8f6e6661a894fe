"""Figures of a report, drawn from the files of a run folder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ..pruning.decision import Decision
from ..runtime.files import write_atomic

KEPT, INK = "#1b6ca8", "#23303d"
STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa5b1",
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlecolor": INK,
    "axes.titlesize": 10.5,
    "figure.dpi": 150,
}
Entries = Sequence[Mapping[str, Any]]


def draw_strip(decision: Decision, path: Path) -> None:
    """Draw the teacher's blocks in a row, kept and removed, with the confidence of each group's choice."""
    count = len(decision.blocks)
    choices = decision.choices or ([tuple(range(count))] if decision.confidences else [])  # all are one choice
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(max(6.0, 0.42 * count), 1.3))
        for i in range(count):
            kept = i in decision.kept
            face, edge, line = (KEPT, KEPT, "-") if kept else ("white", "#9aa5b1", "--")
            axes.add_patch(Rectangle((i + 0.06, 0), 0.88, 1, facecolor=face, edgecolor=edge, linestyle=line))
            axes.text(
                i + 0.5, 0.5, str(i), ha="center", va="center", color="white" if kept else "#7b8794", weight="bold"
            )
        for blocks in choices:
            left, right = blocks[0] + 0.06, blocks[-1] + 0.94
            axes.plot([left, left, right, right], [1.12, 1.22, 1.22, 1.12], color=INK, linewidth=1)
        for blocks, confidence in zip(choices, decision.confidences, strict=False):  # a criterion has none
            middle = (blocks[0] + blocks[-1] + 1) / 2
            axes.text(middle, 1.32, f"{confidence:.2f}", ha="center", va="bottom", color=INK, size=9)
        axes.set(xlim=(0, count), ylim=(-0.1, 1.75 if choices else 1.1), aspect="auto")
        axes.axis("off")
        save_figure(figure, path)


def draw_dynamics(entries: Entries, num_blocks: int, path: Path) -> None:
    """Plot the decision over the search: kept blocks, and every block's probability of being kept."""
    entries = [
        e for e in entries if len(e.get("marginals", ())) == num_blocks and {"confidence", "decision"} <= e.keys()
    ]
    steps = [e["step"] for e in entries]
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 0.9 + 0.17 * max(14, num_blocks)), layout="constrained")
        opacity = np.clip([e["confidence"] for e in entries], 0.08, 1)
        counts = [len(e["decision"]) for e in entries]  # under a budget of cost, not always the same
        kept = [block for e in entries for block in e["decision"]]
        x, alpha = np.repeat(steps, counts), np.repeat(opacity, counts)
        left.scatter(x, kept, s=26, marker="s", color=KEPT, alpha=alpha, linewidths=0)
        left.set(title="kept blocks (opacity: confidence)", xlabel="search step", ylabel="block")
        left.set(ylim=(-0.6, num_blocks - 0.4), yticks=range(0, num_blocks, 1 if num_blocks <= 16 else 2))
        marginals = np.array([e["marginals"] for e in entries]).T
        image = right.pcolormesh(
            steps, np.arange(num_blocks), marginals, cmap="Blues", vmin=0, vmax=1, shading="nearest"
        )
        right.set(title="probability that a block is kept", xlabel="search step", ylabel="block")
        right.set(yticks=range(0, num_blocks, 1 if num_blocks <= 16 else 2))
        figure.colorbar(image, ax=right)
        save_figure(figure, path)


def draw_race(rounds: Sequence[Entries], path: Path) -> None:
    """Plot how far the entrants of each round of a race are behind its leader, and how sure that is.

    Args:
        rounds: the entrants of every round as `provenance.race` has them, best first; the first 12 are shown.
        path: the file to write.
    """
    shown = [[e for e in entries if e["behind"] is not None][:12] for entries in rounds]
    with plt.rc_context(STYLE):
        height = 1.1 + 0.24 * max(map(len, shown))
        figure, panels = plt.subplots(
            1, len(shown), figsize=(4.6 * len(shown), height), layout="constrained", squeeze=False
        )
        for number, (axes, entries) in enumerate(zip(panels[0], shown, strict=True), start=1):
            places = range(len(entries))
            behind, errors = ([e[key] for e in entries] for key in ("behind", "standard_error"))
            axes.errorbar(behind, places, xerr=errors, fmt="o", color=KEPT, ecolor="#9aa5b1", markersize=4)
            axes.set(yticks=places, yticklabels=[", ".join(dict.fromkeys(e["of"])) for e in entries])
            axes.tick_params(axis="y", labelsize=8)
            axes.invert_yaxis()
            axes.set(title=f"round {number}: {entries[0]['steps']} steps", xlabel="loss behind the leader")
        save_figure(figure, path)


def draw_quality(depths: Entries, recovered: tuple[int, float] | None, path: Path) -> None:
    """Plot the losses of the depths that were tried.

    Args:
        depths: what was found at each depth, as `provenance.quality` has it.
        recovered: the depth that was taken, and its loss after the recovery as a multiple of the teacher's; None if it
            was not measured.
        path: the file to write.
    """
    kept, teacher, grey = [len(e["kept"]) for e in depths], depths[0]["teacher"], "#9aa5b1"
    short = [(len(e["kept"]), loss) for e in depths for loss in e["measured"].values() if loss < math.inf]
    predicted = np.array([e["predicted"] for e in depths])
    around = np.abs(np.array([e["interval"] for e in depths]).T - predicted)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(5.5, 3.2), layout="constrained")
        axes.plot(*np.array(short).T, ".", color=grey, label="measured after short recoveries")
        axes.errorbar(kept, predicted, yerr=around, fmt="o-", color=KEPT, label="predicted, with a 90 % interval")
        axes.axhline(depths[0]["limit"], color=grey, linestyle="--", linewidth=1, label="allowed")
        axes.axhline(teacher, color=grey, linestyle=":", linewidth=1, label="teacher")
        if recovered:
            label = "recovered, as held-out samples say"
            axes.plot(recovered[0], recovered[1] * teacher, "*", color="#c0392b", markersize=11, label=label)
        axes.set(xlabel="blocks kept", ylabel="loss", xticks=kept)
        axes.legend(frameon=False, fontsize=8)
        save_figure(figure, path)


def draw_losses(stages: Mapping[str, Entries], path: Path) -> None:
    """Plot one loss curve for each stage that trained."""
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(
            1, len(stages), figsize=(5 * len(stages), 2.9), layout="constrained", squeeze=False
        )
        for axes, (stage, entries) in zip(panels[0], stages.items(), strict=True):
            _curves(axes, [e for e in entries if e.get("loss") is not None])
            axes.set(title=f"training loss: {stage}", xlabel="step")
        save_figure(figure, path)


def _curves(axes: Axes, entries: Entries) -> None:
    """The logged means, with a running mean if there are many; for distillation also the training loss alone."""
    if not entries:
        return
    steps, losses = [e["step"] for e in entries], [e["loss"] for e in entries]
    axes.plot(steps, losses, color=KEPT, alpha=0.35, linewidth=1)
    width = max(1, len(losses) // 20)
    if width > 1:
        smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
        axes.plot(steps[width - 1 :], smooth, color=KEPT, linewidth=1.8)
    told = [e for e in entries if e.get("gt") is not None]
    plain = [e["gt"] for e in told]
    if plain:
        axes.plot([e["step"] for e in told], plain, color="#9aa5b1", linewidth=1, label="without the teacher's terms")
    judged = _judgements(axes, entries)
    if plain or judged:
        axes.legend(frameon=False, fontsize=8)
    low, high = np.percentile([*losses, *plain, *judged], [0, 95])
    margin = 0.15 * (high - low) + 1e-9
    axes.set_ylim(low - margin, high + margin)


def _judgements(axes: Axes, entries: Entries) -> list[float]:
    """The losses on samples that were set apart, of which the lowest was kept; nothing if there are none."""
    judged = [(e["step"], e["validation"]) for e in entries if e.get("validation") is not None]
    if judged:
        step, lowest = min(judged, key=lambda pair: pair[1])
        red = "#c0392b"
        axes.plot(*zip(*judged, strict=True), ".-", color=red, linewidth=1, markersize=4, label="on samples set apart")
        axes.plot(step, lowest, "*", color=red, markersize=11, label=f"the best, kept: step {step:,}")
    return [loss for _, loss in judged]


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, atomically, and close it."""
    # A layout that fits everything in needs no second look at what is drawn.
    box = None if figure.get_layout_engine() else "tight"
    write_atomic(path, lambda file: figure.savefig(file, format="png", bbox_inches=box, facecolor="white"))
    plt.close(figure)
