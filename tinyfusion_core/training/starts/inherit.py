"""A start with what the search has made of the weights, which otherwise it throws away."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from typing_extensions import override

from ...errors import UserError, first_line
from ...protocols.task import Task
from ...pruning.decision import Decision
from ...pruning.removal import without
from ...runtime.files import save_tensors, sha256
from ...runtime.run_folder import RunFolder
from ...runtime.stages import UPDATE
from ..trainer import Trainer
from .base import Start

KEPT = "kept"
"""Entry of the file's metadata: which blocks its weights are of."""
HASH = "weight_update_sha256"
"""Entry of the decision's provenance: the hash of the file."""
FIX = "restore it, or let the search decide again"


@dataclass(frozen=True, kw_only=True)
class Inherit(Start):
    """Begin with the weights that the search has trained beside its gates, instead of the teacher's.

    The search writes those that stay to the run folder, if its `keep_update` is set; in a recipe this start sets it.
    """

    @classmethod
    def is_start_of(cls, recovery: Mapping[str, Any]) -> bool:
        """Return whether a recovery begins with it.

        Args:
            recovery: its section of a recipe, with full class paths.
        """
        start = recovery.get("start")
        return isinstance(start, Mapping) and start.get("class_path") == f"{cls.__module__}.{cls.__name__}"

    @override
    def check_left(self, run: RunFolder, decision: Decision) -> None:
        _read(run, decision)

    @override
    def __call__(
        self,
        task: Task,
        student: nn.Module,
        decision: Decision,
        trainer: Trainer,
        stage: str,
        run: RunFolder | None = None,
    ) -> None:
        if run is None:
            raise UserError("recover.start: Inherit reads what the search has left in its run folder; give it as run")
        weights, values = dict(student.named_parameters()), _read(run, decision)
        if other := [name for name, t in values.items() if name not in weights or t.shape != weights[name].shape]:
            raise UserError(f"{run / UPDATE}: is of another network: {other[0]} is not in this one; {FIX}")
        with torch.no_grad():
            for name, value in values.items():
                weights[name].copy_(value)


def leave(values: Mapping[str, Tensor], task: Task, decision: Decision, run: RunFolder) -> dict[str, str]:
    """Write what a search has made of the weights that stay, for `Inherit`. Returns how the decision knows them again.

    Args:
        values: the weights that have changed, of any shape, by their names in the teacher.
        task: the teacher.
        decision: what stays of it.
        run: where to.

    Raises:
        UserError: the folder is not writable.
    """
    model = task.teacher
    changed = {id(p): values[name] for name, p in model.named_parameters() if name in values}
    # A student that shares its tensors with the teacher tells what each of them is called in a student.
    student = without(task, decision.removed, shared=chain(model.parameters(), model.buffers()))
    staying = {name: changed[id(p)] for name, p in student.named_parameters() if id(p) in changed}
    save_tensors(run / UPDATE, staying, {KEPT: json.dumps(decision.kept)})
    return {HASH: sha256(run / UPDATE)}


def _read(run: RunFolder, decision: Decision) -> dict[str, Tensor]:
    """The weights that a search has left, by their names in the student."""
    path = run / UPDATE
    if not path.is_file():
        raise UserError(f"{path}: no such file, in which the search leaves what it has trained; {FIX}")
    try:
        with safe_open(path, framework="pt") as file:
            kept, values = json.loads(file.metadata()[KEPT]), {name: file.get_tensor(name) for name in [*file.keys()]}
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path}: not what a search has left ({first_line(e)}); {FIX}") from None
    if decision.provenance.get(HASH, found := sha256(path)) != found:
        raise UserError(f"{path}: is not what the search has left for this decision; {FIX}")
    if kept != list(decision.kept):
        raise UserError(f"{path}: is of a student with blocks {kept}, this one has {list(decision.kept)}; {FIX}")
    return values
