"""One set of weights for several depths: shallower students inside of a student, trained with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from typing_extensions import override

from ..errors import UserError
from ..protocols.backbone import Batch
from ..protocols.loss import LossAdapter
from ..protocols.task import Task
from ..pruning.decision import Decision
from ..pruning.gating import Gates
from ..runtime.seeding import Rng
from .distilling.distilled import Distilled
from .objective import Objective
from .teacher_cache.settings import PREFIX

SHARE = 0.3
"""Weight of a shallower student's loss, beside 1 for the whole one: the best of 0.1, 0.3 and 1 on the digits."""


def masks_inside(decision: Decision, depths: Sequence[int]) -> dict[int, Tensor]:
    """Return for every depth the mask of the student that keeps so many of a student's blocks, (num_blocks,).

    Args:
        decision: how the student was made.
        depths: numbers of blocks, or of branches where the decision is about those.

    Raises:
        UserError: there are not so many, or the decision does not say which.
    """
    every = range(len(decision.kept))
    try:
        return {depth: torch.tensor([float(i in decision.inside(depth)) for i in every]) for depth in sorted(depths)}
    except UserError as e:
        raise UserError(f"recover.depths: {e}") from None


class EveryDepth(Objective):
    """The losses of a student and of shallower ones inside of it.

    The sandwich rule of universally slimmable networks (arXiv:1903.05134): every step trains the whole student, the
    shallowest one and one of the others, drawn at random. Where the whole one is distilled, the others learn what it
    predicts; else they have the training loss. The mean of the losses is minimised, weighted by 1 and `SHARE`.

    Args:
        whole: the objective of the whole student.
        student: the network.
        loss: the task's objective.
        gates: gates of what can go in the student.
        masks: by depth, (num_blocks,) zeros and ones.
    """

    def __init__(
        self, whole: Objective, student: nn.Module, loss: LossAdapter, gates: Gates, masks: Mapping[int, Tensor]
    ) -> None:
        super().__init__()
        self.whole, self.blocks, self.distilled = whole, whole.blocks, isinstance(whole, Distilled)
        self.shallowest, *self.others = sorted(masks)
        # In a tuple the student is not registered: it is a part of `whole`.
        self.unregistered = loss, student, gates, masks

    @override
    def forward(self, inputs: Batch, rng: Rng) -> tuple[Tensor, Tensor]:
        loss, student, gates, masks = self.unregistered
        total, losses = self.whole(inputs, rng)
        told = tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, self.whole.prediction)
        inputs = {name: t for name, t in inputs.items() if not name.startswith(PREFIX)}
        depths, terms = [self.shallowest, *self._drawn(rng)], dict(self.whole.terms)
        for depth in depths:
            gates.mask = masks[depth].to(losses.device).expand(len(losses), -1)
            found = loss.predict(student, inputs)
            own = loss.distance(found, told, inputs) if self.distilled else loss.loss(found, inputs)
            terms["shallowest" if depth == self.shallowest else "between"] = own.detach()
            total = total + SHARE * own.mean()
        gates.mask = None  # whoever runs the student between two passes runs all of it
        self.terms = terms
        return total / (1 + SHARE * len(depths)), losses

    def _drawn(self, rng: Rng) -> list[int]:
        """One of the other depths, the same for all samples of a step."""
        if not self.others:
            return []
        return [self.others[int(torch.randint(len(self.others), (), generator=rng.batch("depth")))]]

    @override
    def before_step(self, progress: float) -> None:
        self.whole.before_step(progress)

    @override
    def metrics(self) -> dict[str, Any]:
        return self.whole.metrics()

    @override
    def frozen_modules(self) -> list[tuple[nn.Module, Sequence[nn.Module]]]:
        return self.whole.frozen_modules()


@contextmanager
def at_every_depth(
    objective: Objective, task: Task, student: nn.Module, decision: Decision | None, depths: Sequence[int]
) -> Iterator[Objective]:
    """Return what trains a student, and the shallower ones inside it if there are any.

    Args:
        objective: the objective of the student.
        task: what it was pruned from.
        student: the network.
        decision: how it was made.
        depths: numbers of its blocks.

    Raises:
        UserError: the decision does not say which blocks these are.
    """
    if not depths or decision is None:
        yield objective
        return
    masks, within = masks_inside(decision, depths), replace(task, model=student)
    dims = within.batch_dim(student)
    with Gates(student, within.blocks, dims, within.streams, task.backbone.unneeded) as gates:
        yield EveryDepth(objective, student, task.loss, gates, masks)
