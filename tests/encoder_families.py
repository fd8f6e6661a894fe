"""Random models of every masked language model that transformers has, and what holds of each.

`python tests/encoder_families.py` writes `docs/encoder-families.md`; a test says when that is out of date.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

import llm_families
import tinyfusion_core as tiny
from encoder_toys import BATCH, PARTS, folder, output, recipe_of, task_of
from llm_families import KEPT, TRAINER, check_gates, in_words, masks_within, one_line
from llm_toys import decide
from places import ROOT
from sweeps import write_page
from tinyfusion_core.pipeline.planning.plan import make_plan

FAMILIES = tuple(MODEL_FOR_MASKED_LM_MAPPING_NAMES)
PAGE = ROOT / "docs" / "encoder-families.md"
MORE: dict[str, dict[str, Any]] = {
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "esmc": {"num_key_value_heads": 4},
    "esm": {"position_embedding_type": "rotary", "token_dropout": False, "mask_token_id": 3},
    "layoutlm": {"max_2d_position_embeddings": 64},
    "longformer": {"attention_window": [4] * 6, "max_position_embeddings": 66},
    "mobilebert": {"true_hidden_size": 32, "intra_bottleneck_size": 32, "embedding_size": 32},
    "neomme": {"head_dim": 32},
    "reformer": {"is_decoder": False},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
}


def settings(family: str) -> dict[str, Any]:
    """The sizes of a family, no decoder."""
    found = llm_families.settings(family) | MORE.get(family, {})
    return {key: value for key, value in found.items() if key != "model_type"} | (
        {"is_decoder": False} if "is_decoder" in found else {}
    )


@dataclass
class Found(llm_families.Found):
    """What holds of a family; `notes` say what is refused without a head."""

    classes: ClassVar[Mapping[str, str]] = MODEL_FOR_MASKED_LM_MAPPING_NAMES


def examine(family: str, work: Path) -> Found:
    """Prune a family with its head, and without.

    Raises:
        AssertionError: what is promised of every family does not hold.
    """
    try:
        path = folder(work / "full", family, **settings(family))
        output(transformers.AutoModelForMaskedLM.from_pretrained(path).eval())
    except Exception as e:  # of any family's code
        return Found(unbuilt=one_line(e))
    (work / "head").mkdir()
    limits, refused = _pruned(path, work / "head", head=True)
    if refused:
        return Found(refused=refused.replace(str(work / "full"), "the folder"))
    (work / "bare").mkdir()
    try:
        bare = folder(work / "bare" / "full", family, head=False, **settings(family))
    except Exception as e:  # of any family's code
        return Found(limits=in_words(limits), notes=[f"not without its head: {one_line(e)}"])
    of_bare, refused = _pruned(bare, work / "bare", head=False)
    assert refused or of_bare == limits
    return Found(limits=in_words(limits), notes=[f"not without its head: {refused}"] if refused else [])


def _pruned(path: Path, work: Path, head: bool) -> tuple[Any, str]:
    """Its limits, and why it is refused, which is said before anything is spent."""
    task = task_of(path, head)
    try:
        for problem in make_plan(tiny.load_recipe(recipe_of(path, work, head))).problems:
            raise tiny.UserError(problem)
        decision = tiny.Search(keep=4, steps=3)(task, TRAINER)
    except tiny.UserError as e:
        return None, one_line(e, path.parent)
    limits = task.backbone.limits(task.teacher)
    masks = masks_within(limits)
    assert decision.kept in masks
    chosen = KEPT if KEPT in masks else decision.kept
    students = {kept: tiny.prune(task, decide(task, kept)) for kept in {masks[0], masks[-1], chosen}}
    check_gates(task, students, BATCH, lambda prediction: prediction.states if head else prediction)
    _check_reached(task)
    _check_files(task, students[chosen], chosen, work / "student", PARTS[head][2])
    return limits, ""


def _check_reached(task: tiny.Task) -> None:
    """Every weight that is trained has a gradient, or several processes would wait for it."""
    inputs = task.loss.prepare(BATCH, tiny.Rng(0, "test"))
    named = {name: p for name, p in task.teacher.named_parameters() if p.requires_grad}
    losses = task.loss.losses(task.teacher, inputs)
    found = torch.autograd.grad(losses.sum(), list(named.values()), allow_unused=True)
    unused = [name for name, gradient in zip(named, found, strict=True) if gradient is None]
    assert not unused, f"no gradient: {', '.join(unused)}"


def _check_files(task: tiny.Task, student: nn.Module, kept: tuple[int, ...], path: Path, kind: str) -> None:
    """Saving compares bit by bit what is read; transformers reads it without anything left over."""
    tiny.save_pretrained(student, task, decide(task, kept), path)
    again, loading = getattr(transformers, kind).from_pretrained(path, output_loading_info=True)
    assert not any(loading.values()), loading
    again.load_state_dict(student.state_dict(), assign=True)  # products may depend on where numbers lie
    assert torch.equal(output(again.eval()), output(student)), "read back"


HEAD = """# Families of encoders

Every masked language model of transformers {version}, as a random model of six layers, whose sizes one table of names
decides (`tests/encoder_families.py`). Of each that works, the recipe is validated, a search of three steps is made with
the defaults, and three masks are pruned, once with its head and once without. Under gates, with one mask for each
sample and with padding, the network computes what the pruned ones compute, and every gate has a gradient. What is saved
is what transformers reads, to the last bit.

`protect` and `period` are what [constraints](search.md) call them. They hold in every selection by themselves.

This page is generated: `python tests/encoder_families.py`.
"""


if __name__ == "__main__":
    write_page(PAGE, HEAD, "masks | but", FAMILIES, examine)
