"""What a recovery by LoRA has added to its sliced teacher, as an adapter that peft, transformers and diffusers load."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UserError, need
from ...protocols.task import Task
from ...pruning.decision import Decision
from ...pruning.prune import model_card
from ...pruning.record import DECISION
from ...pruning.removal import without
from ...pruning.weight_update import LoRA, WeightUpdate
from ...runtime.files import save_tensors, write_json, write_text
from ...selection.search import Search
from ...training.starts.inherit import Inherit
from ..recipe import Recipe
from .adapters import CONFIG, WEIGHTS

INSTEAD = "export the student itself: --to transformers or diffusers"
LORA_FILE = "pytorch_lora_weights.safetensors"
"""Where diffusers looks for an adapter in a folder."""
USAGE = """This folder is an adapter: what LoRA has added to the blocks that stay. It goes onto the checkpoint without
the others, which any recipe of the checkpoint writes; on the whole checkpoint it would land on the wrong blocks.

```bash
tinyfusion run RECIPE --run-dir sliced --recover null --evaluate '[]' \\
  --search '{class_path: Keep, init_args: {decision: path/to/this/folder/decision.json}}'
```

```python
import tinyfusion_core as tiny
from peft import PeftModel

sliced = tiny.load_pretrained("sliced/student")
model = PeftModel.from_pretrained(sliced, "path/to/this/folder")
```"""
"""How an adapter is used, for its model card."""


def rank_of(recipe: Recipe) -> int:
    """Return the largest rank that the difference of a run's student from its sliced teacher can have.

    Args:
        recipe: the run's. What several rounds, or a search and the recovery that inherits from it, have added counts
            together.

    Raises:
        UserError: something else than LoRA has changed the weights.
    """
    rank = 0
    for key, update in _updates(recipe):
        if not isinstance(update, LoRA):
            kind = "null" if update is None else type(update).__name__
            raise UserError(f"{key}: {kind} moves the weights, and an adapter holds what LoRA adds; {INSTEAD}")
        rank += update.rank
    if not rank:
        raise UserError(f"recover: nothing was trained, so the student is its sliced teacher; {INSTEAD}")
    return rank


def _updates(recipe: Recipe) -> Iterator[tuple[str, WeightUpdate | None]]:
    """Yield what has moved the weights of a run's student, by key."""
    for name, step in recipe.each_round().items():
        prefix, how = f"rounds.{name}." if name else "", step.recover
        if how is None:
            continue
        if isinstance(how.start, Inherit):
            assert isinstance(step.search, Search)  # else the plan has refused it
            yield f"{prefix}search.update", step.search.update
        elif how.start is not None:
            kind = type(how.start).__name__
            raise UserError(f"{prefix}recover.start: {kind} changes weights that an adapter would lie on; {INSTEAD}")
        if how.steps:
            yield f"{prefix}recover.update", how.update


def adapter_files(task: Task, student: nn.Module, decision: Decision, rank: int) -> dict[str, Callable[[Path], object]]:
    """Return what writes an adapter, by the names of its files.

    Args:
        task: the teacher.
        student: what became of it.
        decision: which of its blocks the student kept.
        rank: how large the rank of their difference may be.

    Raises:
        UserError: they differ by more.
    """
    teacher = task.teacher
    decision.check_fits(task.blocks, "the checkpoint")
    base = without(task, decision.removed, shared=chain(teacher.parameters(), teacher.buffers()))
    factors = factors_of(base, student, rank)
    named = {f"{path}.lora_{side}.weight": factor for path, pair in factors.items() for side, factor in pair.items()}

    def weights(prefix: str) -> Callable[[Path], object]:
        return partial(save_tensors, tensors={f"{prefix}.{name}": factor for name, factor in named.items()})

    return {
        WEIGHTS: weights("base_model.model"),
        CONFIG: partial(write_json, value=settings_of(base, factors, rank)),
        **({LORA_FILE: weights("transformer")} if task.backbone.library == "diffusers" else {}),
        DECISION: decision.save,
        "README.md": partial(write_text, text=model_card(student, task, decision, "peft", USAGE)),
    }


def factors_of(base: nn.Module, student: nn.Module, rank: int) -> dict[str, dict[str, Tensor]]:
    """Return factors of what a student's layers have more than those of its sliced teacher.

    They are those of the singular values, of float32 as peft has them: the weight is the teacher's and B A.

    Args:
        base: the sliced teacher.
        student: a network of the same layers.
        rank: the rank of each product.

    Returns:
        By the path of each layer that has changed: A, (rank, in, ...), and B, (out, rank, ...).

    Raises:
        UserError: more than that has changed.
    """
    plain, found = base.state_dict(), dict[str, dict[str, Tensor]]()
    for key, ours in student.state_dict().items():
        if torch.equal(ours, theirs := plain[key]):
            continue
        path, _, name = key.rpartition(".")
        added = _as_matrix(base.get_submodule(path), ours.double() - theirs.double()) if name == "weight" else None
        if added is None:
            raise _more(key, rank)
        a, b = _factors(added, rank)
        # As large as rounding of the sum, which of weights in half precision takes more away than of the factors.
        if (b.double() @ a.double() - added).norm() > 2 * torch.finfo(ours.dtype).eps * ours.double().norm():
            raise _more(key, rank)
        kernel = ours.shape[2:]
        found[path] = {"A": a.view(rank, -1, *kernel), "B": b.view(-1, rank, *(1 for _ in kernel))}
    return found


def _more(key: str, rank: int) -> UserError:
    return UserError(
        f"{key}: the student's differs from the checkpoint's by more than LoRA of rank {rank} adds to a layer; give "
        f"the checkpoint of the run, or {INSTEAD}"
    )


def _as_matrix(layer: nn.Module, weight: Tensor) -> Tensor | None:
    """A layer's weight as (out, in), as peft understands it; None if peft adapts no such layer by two matrices."""
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return weight.flatten(1)
    if isinstance(layer, _transposed()):
        return weight.T
    return weight if isinstance(layer, nn.Linear) else None


def _transposed() -> type[nn.Module]:
    kind: type[nn.Module] = need("transformers.pytorch_utils", "tinyfusion[lora]", "--to adapter").Conv1D  # of GPT-2
    return kind


def _factors(difference: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The factors A, (rank, in), and B, (out, rank), nearest to a matrix, (out, in)."""
    some = min(rank, *difference.shape)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(difference, q=min(some + 8, *difference.shape))
    half = s[:some].sqrt()
    a, b = torch.zeros(rank, difference.shape[1]), torch.zeros(difference.shape[0], rank)
    a[:some], b[:, :some] = (half * v[:, :some]).T, half * u[:, :some]
    return a, b


def settings_of(base: nn.Module, factors: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """Return the settings of peft with which it loads factors.

    No checkpoint is named in them: libraries would load the whole one, on whose blocks the adapter would be wrong.

    Args:
        base: the sliced teacher.
        factors: of its layers, by path.
        rank: of each.
    """
    transposed = any(isinstance(base.get_submodule(path), _transposed()) for path in factors)
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "fan_in_fan_out": transposed,
        "target_modules": "|".join(map(re.escape, factors)),
    }
