"""What recoveries were expected to come to, drawn and said beside what they came to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator

from ..runtime.run_folder import RunFolder
from ..runtime.stages import RECOVER, ForecastRecord
from .drawing import GREY, KEPT, RED, STYLE, WIDTH, legend_above, save_figure
from .page import Figures, Picture

Judged = Sequence[tuple[int, float]]


def draw_expectations(folder: RunFolder) -> list[Figures]:
    """Draw the first forecast of every judged recovery of a run; nothing if there is none."""
    pictures, told = list[Picture](), list[str]()
    for stage in folder.stages():
        own = folder.round(stage.round)
        judged = [(e["step"], e["validation"]) for e in own.metrics(RECOVER) if e.get("validation") is not None]
        if stage.name == RECOVER and judged and (found := own.forecasts()) is not None:
            path = folder / "figures" / f"forecast_{stage.key}.svg"
            draw_forecast(stage.title, found["first"], judged, path)
            pictures.append(Picture(path))
            told.append(f"{stage.title.capitalize()}: {what_came(found['first'], judged)}")
    if not pictures:
        return []
    law = (
        "The forecast is a power law, through what the judgements until then lacked to the teacher's loss. Its range "
        "would hold 90 % of errors like those that it had made before. It knows nothing of the learning rate to come."
    )
    return [Figures("What was expected, and what came", " ".join([*told, law]), pictures)]


def what_came(made: ForecastRecord, judged: Judged) -> str:
    """Return in words what was expected of a recovery, and what it came to.

    Args:
        made: a forecast of it.
        judged: steps and loss of all judgements, in order.
    """
    steps, *losses = np.array(made["curve"]).T
    end, best = min(judged[-1][0], int(steps[-1])), min(loss for step, loss in judged if step <= steps[-1])
    likely, low, high = (float(np.interp(end, steps, loss)) for loss in losses)
    text = f"after {made['step']:,} steps {likely:.4g} was expected at step {end:,} ({low:.4g} to {high:.4g})"
    text += f", and the best was {best:.4g}"
    if made["limit"] is not None and made["reached"] is not None:
        there = next((step for step, loss in judged if loss <= made["limit"]), None)
        at = made["reached"][0]
        text += f"; {made['limit']:.4g}, to stop at, was "
        text += "not in sight" if at is None else f"expected at step {at:,.0f}"
        text += ", and was not reached" if there is None else f", and was reached at step {there:,}"
    return f"{text}."


def draw_forecast(stage: str, made: ForecastRecord, judged: Judged, path: Path) -> None:
    """Plot a forecast with its range, and what came.

    Args:
        stage: title of the recovery.
        made: the forecast.
        judged: steps and loss of all judgements, in order.
        path: the file to write.
    """
    steps, likely, low, high = np.array(made["curve"]).T
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(WIDTH, 3.2), layout="constrained")
        axes.fill_between(steps, low, high, color=RED, alpha=0.14, linewidth=0, label="range of the forecast")
        axes.plot(steps, likely, "--", color=RED, linewidth=1.6, label=f"forecast after {made['step']:,} steps")
        axes.plot(
            *zip(*judged, strict=True), ".-", color=KEPT, linewidth=1.4, markersize=4, label="on samples set apart"
        )
        axes.axhline(made["teacher"], color=GREY, linestyle=":", linewidth=1.2, label="teacher")
        if made["limit"] is not None:
            axes.axhline(made["limit"], color=GREY, linestyle="--", linewidth=1, label="to stop at")
        axes.set(title=f"forecast and judgements: {stage}", xlabel="step", ylabel="loss")
        axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
        legend_above(axes)
        save_figure(figure, path)
