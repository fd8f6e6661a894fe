"""How well the judgements of a recovery foretell its end, of finished runs: a table in Markdown.

Run:  tinyfusion run recipes/quickstart.yaml --recover.validation "{every: 25}" --run-dir runs/forecast/digits
      python benchmarks/forecasts.py runs/forecast/digits
"""

from __future__ import annotations

import sys
from pathlib import Path

import tinyfusion_core as tiny
from tinyfusion_core.pipeline.tasks import make_task
from tinyfusion_core.training.forecasting.forecast import forecast
from tinyfusion_core.training.validation import training_samples

SHARES = (0.1, 0.25, 0.5, 0.75)
"""Of the steps, after which a forecast is made."""
REACHED = 0.75
"""Of the steps; when the best loss until then is reached is foretold too."""


def rows(path: Path) -> list[str]:
    """Return a row for each share of the steps that a forecast is made after."""
    recipe, folder = tiny.load_recipe(path / "recipe.yaml"), tiny.RunFolder(path)
    how = recipe.each_round()[""].recover
    assert how is not None and how.validation is not None, f"{path}: its recovery is not judged"
    task = make_task(recipe)
    _, _, apart = training_samples(task, recipe.trainer, how.validation, None)
    assert apart is not None
    teacher = how.validation.validator(task.teacher, task, apart, recipe.trainer, beside=True).teacher
    assert teacher is not None
    judged = [(e["step"], e["validation"]) for e in folder.metrics("recover") if e.get("validation") is not None]
    end, came = judged[-1][0], min(loss for _, loss in judged)
    goal = min(loss for step, loss in judged if step <= REACHED * end)
    there = next(step for step, loss in judged if loss <= goal)
    found = []
    for share in SHARES:
        made = forecast([(step, loss) for step, loss in judged if step <= share * end], teacher)
        if made is None:
            found.append(f"| {path.name} | {share:.0%} |" + " none |" * 7)
            continue
        likely, low, high = made.after(end)
        inside = "yes" if low <= came <= high else "no"
        off, lacked = likely / came - 1, (likely - teacher) / (came - teacher)
        columns = (path.name, f"{share:.0%}", f"{made.best:.4g}", f"{likely:.4g} ({low:.4g} to {high:.4g})")
        at, first, last = (f"{step:,.0f}" if step < 1e6 else "never" for step in made.reaching(goal))
        steps = "reached" if made.best <= goal else f"{at} ({first} to {last}), came {there}"
        found.append(f"| {' | '.join(columns)} | {came:.4g} | {off:+.1%} | {lacked:.2f}x | {inside} | {steps} |")
    return found


if __name__ == "__main__":
    columns = (
        "run",
        "made at",
        "loss then",
        "forecast of the end",
        "came",
        "off",
        "lacking",
        "in the range",
        "steps to a loss",
    )
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for given in sys.argv[1:]:
        print("\n".join(rows(Path(given))), flush=True)
