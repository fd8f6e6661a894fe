"""Draws README's picture: `python benchmarks/draw_readme.py runs/quickstart docs/images/quickstart.png`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch
from safetensors.numpy import load_file

from tinyfusion_core.pruning.decision import Decision
from tinyfusion_core.reporting.drawing import INK, KEPT, STYLE, save_figure

GONE = "#c9d2db"


def stack(axes: Axes, count: int, kept: tuple[int, ...], title: str) -> None:
    """Blocks from left to right; those that are gone in outline."""
    for i in range(count):
        face, edge, line = (KEPT, KEPT, "-") if i in kept else ("white", GONE, "--")
        box = FancyBboxPatch((i + 0.1, 0), 0.8, 1, "round,pad=0,rounding_size=0.12", fc=face, ec=edge, ls=line, lw=1.3)
        axes.add_patch(box)
        ink = "white" if i in kept else "#9aa5b1"
        axes.text(i + 0.5, 0.5, str(i), ha="center", va="center", color=ink, weight="bold")
    axes.set(xlim=(-0.05, count + 0.05), ylim=(-0.08, 1.08))
    axes.set_title(title, fontsize=12, pad=8)
    axes.axis("off")


def grid(axes: Axes, images: np.ndarray, caption: str) -> None:
    """Images, (rows, columns, height, width) from 0 to 255, with a line below."""
    rows, columns, height, width = images.shape
    page = np.pad(images.astype(float), ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=np.nan)
    page = page.transpose(0, 2, 1, 3).reshape(rows * (height + 2), columns * (width + 2))
    axes.imshow(page, cmap="gray", vmin=0, vmax=255)
    axes.set_xlabel(caption, fontsize=10.5, color=INK, labelpad=7)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.set_anchor("N")


def main(folder: Path, path: Path) -> None:
    """Draw the blocks of teacher and student, and samples of both from the same noise."""
    decision = Decision.load(folder / "decision.json")
    measured = json.loads((folder / "metrics.json").read_text())["measurements"]
    found = {m["name"]: m["values"] for m in measured}
    samples = load_file(folder / "samples.safetensors")
    count = len(decision.blocks)
    with plt.rc_context({**STYLE, "axes.titlelocation": "center"}):
        figure, axes = plt.subplots(2, 2, figsize=(10, 3.75), height_ratios=[1, 3.1], layout="constrained")
        figure.get_layout_engine().set(wspace=0.08, hspace=0.06)
        stack(axes[0, 0], count, tuple(range(count)), f"teacher: {count} blocks")
        stack(axes[0, 1], count, decision.kept, f"student: {len(decision.kept)} blocks")
        for axis, name in zip(axes[1], ("teacher", "recovered"), strict=True):
            images = samples[name][:, 0].reshape(4, -1, *samples[name].shape[2:])
            loss, distance = found["held-out loss"][name], found["Fréchet distance"][name]
            speed = found["throughput"][name] / found["throughput"]["teacher"]
            text = f"held-out loss {loss:.4f}   Fréchet distance {distance:.2f}   speed {speed:.2g}x"
            grid(axis, images, text)
        save_figure(figure, path)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
