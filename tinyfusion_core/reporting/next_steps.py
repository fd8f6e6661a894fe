"""What to do with a finished run: lines to copy."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence

from ..protocols.blocks.paths import word_for
from ..pruning.decision import Decision
from ..runtime.run_folder import RunFolder
from ..runtime.stages import RECOVER, TRAIN
from .page import Figures

OTHERS = ("transformers", "diffusers", "mergekit", "llama.cpp", "peft")
"""Formats of `tinyfusion export` that are not for every network."""


def next_steps(
    folder: RunFolder, decisions: Mapping[str, Decision], exhibits: Sequence[Figures]
) -> list[tuple[str, list[str]]]:
    """Return what can be done next, and the lines for it.

    Args:
        folder: the run.
        decisions: its decisions by round; without rounds, the name is empty.
        exhibits: the sections of its metrics, which may say what makes more of what they show.
    """
    if not decisions:
        return []
    last, run = list(decisions)[-1], shlex.quote(str(folder.path))
    student = json.dumps(str(folder.round(last) / "student"), ensure_ascii=False)
    steps = [("Load it in Python", ["import tinyfusion_core as tiny", f"student = tiny.load_pretrained({student})"])]
    if word_for(decisions[last].blocks) == "blocks":
        what = f"Hand it to other tools; for some networks also --to {', '.join(OTHERS)}"
        steps.append((what, [f"tinyfusion export {run} --to indices"]))
    made = [section.command.format(run=run) for section in exhibits if section.command]
    steps += [("See more of what it generates", made)] if made else []
    if list(decisions) != [""]:
        return steps
    if decisions[""].marginals:
        steps.append(("See what other depths would cost, from the same search", [f"tinyfusion budgets {run}"]))
    stages = {stage.name: stage.settings for stage in folder.stages()}
    if depths := (stages.get(RECOVER) or {}).get("depths"):
        steps.append(("Cut a shallower student out of this one", [f"tinyfusion slice {run} --depth {min(depths)}"]))
    if stages.get(RECOVER) is not None and "quality" not in decisions[""].provenance:  # a comparison has one budget
        own = shlex.quote(f"{folder.path}-compare")
        line = f"tinyfusion compare {shlex.quote(str(folder / 'recipe.yaml'))} --run-dir {own}"
        if TRAIN in stages:
            line += f" --train null --backbone.checkpoint {shlex.quote(str(folder / 'teacher'))}"
        steps.append(("Compare the choice with every criterion and with random subsets", [line]))
    return steps
