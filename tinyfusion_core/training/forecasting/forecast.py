"""What a training will come to by the end of its steps, foretold from the judgements of it so far."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ...runtime.progress import duration
from ...runtime.stages import ForecastRecord, Forecasts
from .power_law import PowerLaw

FEWEST = 3
"""Judgements that a forecast is made from at least: two for a law, and one to see how wrong it is."""
POINTS = 40
"""Of the curve that is kept, at most."""
SURE = 0.9
"""How much of the errors that earlier forecasts would have made the interval holds."""


@dataclass(frozen=True)
class Forecast:
    """A loss from now on: what it lacks to the teacher's falls as a power of the steps, never above the best so far.

    Attributes:
        step: steps done.
        teacher: the teacher's loss.
        best: lowest loss so far, which is kept.
        lacking: what is lacking now, by the law.
        exponent: of the law.
        spread: how far the exponent may be off, up and down.
    """

    step: int
    teacher: float
    best: float
    lacking: float
    exponent: float
    spread: float

    def after(self, steps: float) -> tuple[float, float, float]:
        """Return the loss after so many steps, and the lowest and the highest that may be expected.

        Args:
            steps: at least those that are done.
        """
        ahead = math.log(steps / self.step)
        # What is expected is never above the best, and may turn out as much better as the law has been off.
        likely = min(self.best - self.teacher, self._lacking(self.exponent * ahead))
        high = min(self.best - self.teacher, self._lacking((self.exponent + self.spread) * ahead))
        low = likely * math.exp(-self.spread * ahead)
        return self.teacher + likely, self.teacher + low, self.teacher + high

    def _lacking(self, power: float) -> float:
        """What is lacking now, times e to a power; far above the best it need not be exact, and no float holds it."""
        return self.lacking * math.exp(min(power, 100.0))

    def reaching(self, loss: float) -> tuple[float, float, float]:
        """Return the steps after which the loss is reached, the fewest and the most; infinity where it never is."""
        share = (loss - self.teacher) / self.lacking

        def steps(exponent: float) -> float:
            if loss >= self.best or share >= 1:
                return self.step
            # Beyond what a float holds it is never.
            ahead = math.log(share) / exponent if share > 0 and exponent < 0 else math.inf
            return self.step * math.exp(ahead) if ahead < 100 else math.inf

        return steps(self.exponent), steps(self.exponent - self.spread), steps(self.exponent + self.spread)


def forecast(judged: Sequence[tuple[int, float]], teacher: float) -> Forecast | None:
    """Foretell the losses of a training; None from fewer than three judgements, or once the teacher is undercut.

    The law is laid through all judgements. How wrong it is follows from laws through the first two, the first three and
    so on: how far each is off the newest loss, in logarithms and for each unit that it looks ahead. A 90 % interval of
    Student's t with that spread says where the exponent lies. So it knows how this training has bent so far. Of another
    seed, and of what a falling learning rate will do in the end, it knows nothing.

    Args:
        judged: steps and loss of each judgement, in order.
        teacher: the teacher's loss on the same samples.
    """
    from scipy.stats import t  # imports slowly

    judged = [(step, loss) for step, loss in judged if math.isfinite(loss)]
    best = min((loss for _, loss in judged), default=teacher)
    if len(judged) < FEWEST or best <= teacher:
        return None
    steps = [step for step, _ in judged]
    lacking = torch.tensor([[loss - teacher for _, loss in judged]], dtype=torch.float64)
    laws = [PowerLaw.through(steps[:n], lacking[:, :n]) for n in range(FEWEST - 1, len(steps) + 1)]
    reached = [float(law.after(steps[-1])) for law in laws]
    last = float(lacking[0, -1])
    off = [
        math.log(last / found) / math.log(steps[-1] / step)
        for found, step in zip(reached[:-1], steps[FEWEST - 2 : -1], strict=True)
    ]
    spread = float(t.ppf((1 + SURE) / 2, len(off))) * math.sqrt(sum(o * o for o in off) / len(off))
    return Forecast(steps[-1], teacher, best, reached[-1], float(laws[-1].exponent), spread)


def forecasts(
    judged: Sequence[tuple[int, float]], teacher: float, begin: int, end: int, limit: float | None
) -> Forecasts | None:
    """Return the first forecast and the newest; None while there is none, and at the end.

    Args:
        judged: steps and loss of each judgement, in order.
        teacher: the teacher's loss on the same samples.
        begin: the first is made once so many steps are done.
        end: steps of the training.
        limit: the loss at which it stops, if there is one.
    """
    due = (judged[:n] for n, (step, _) in enumerate(judged, 1) if step >= begin)
    first = next(filter(None, (forecast(some, teacher) for some in due)), None)
    newest = forecast(judged, teacher)
    if first is None or newest is None or newest.step >= end:
        return None
    first_made, newest_made = (_record(found, end, limit) for found in (first, newest))
    return {"format_version": 1, "first": first_made, "newest": newest_made}


def _record(found: Forecast, end: int, limit: float | None) -> ForecastRecord:
    """What is kept of a forecast: its curve, with points as dense as it bends, and when the limit is reached."""
    steps = sorted({round(step) for step in np.geomspace(found.step, end, POINTS)})
    # Nobody knows more of it than two figures.
    reached = None if limit is None else [float(f"{s:.2g}") if s < math.inf else None for s in found.reaching(limit)]
    curve = [[float(step), *found.after(step)] for step in steps]
    return {"step": found.step, "teacher": found.teacher, "curve": curve, "limit": limit, "reached": reached}


def sentence(made: ForecastRecord, seconds: float) -> str:
    """Return what is expected in words.

    Args:
        made: a forecast.
        seconds: the time of the steps that were done.
    """
    end, likely, low, high = made["curve"][-1]

    def at(step: float) -> str:
        return f"step {step:,.0f}, in about {duration(seconds * (step / made['step'] - 1))}"

    text = f"after {made['step']:,} of {end:,.0f} steps {likely:.4g} is expected at {at(end)} ({low:.4g} to {high:.4g})"
    if made["limit"] is not None and made["reached"] is not None:
        likely_at, first, last = made["reached"]
        text += f"; {made['limit']:.4g}, to stop at, "
        if likely_at is None or first is None:
            text += "is not in sight"
        else:
            text += f"at {at(likely_at)} (from step {first:,.0f}{f' to {last:,.0f}' if last else ', perhaps never'})"
    return text
