"""Weights that are trained once under many masks, and then stand still while masks are searched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from typing_extensions import override

from ...errors import require
from ...protocols.task import Task
from ...protocols.undisturbed import restored
from ...pruning.decision import Decision, provenance
from ...pruning.weight_update import Full, WeightUpdate
from ...runtime.run_folder import RunFolder
from ...training.trainer import Trainer
from ..base import Decisive, Proposals, prepared
from ..constrained import Constrained
from ..criteria.sensitivity import Greedy
from ..search import Search


@dataclass(frozen=True, kw_only=True)
class CoTrained(Constrained):
    """Train the weights once under random masks, then search for a mask while they stand still.

    The training is that of `Search`: its masks are random at first, and concentrate on those that lose least. Then
    blocks are removed as `Greedy` does, and exchanged, by the loss of these weights on the same samples: a one-shot
    search (SPOS, arXiv:1904.00420, whose masks stay uniform). Afterwards the network has its own weights again, bit for
    bit. It shows what weights that serve many masks recover, not what those of one mask would: let it propose in a
    `Race`.

    Args:
        steps: updates of the weights.
        batch_size: samples per update, each under several masks as in `Search`; default the trainer's.
        update: which weights are trained, and how.
        lr: learning rate of the weights.
        samples: training samples that masks are compared on.
        swaps: how often, at most, a kept and a removed block are exchanged in the end, as long as it lowers the loss.
    """

    steps: int = 300
    batch_size: int | None = None
    update: WeightUpdate = Full()
    lr: float = 3e-4
    samples: int = 256
    swaps: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.samples >= 1, "search.samples", self.samples, "at least 1")
        require(self.swaps >= 0, "search.swaps", self.swaps, "0 or more")
        require(self.lr > 0, "search.lr", self.lr, "a rate above 0")
        self.learned()  # what is wrong with the others is said there

    @override
    def learned(self) -> Search:
        how: dict[str, Any] = {"steps": self.steps, "batch_size": self.batch_size, "update": self.update, "lr": self.lr}
        return Search(**self.allowed(), **how, keep_update=True)

    @override
    def trainings(self, trainer: Trainer, processes: int) -> Sequence[Search]:
        return (self.learned(),)

    @override
    def decisive(self, trainer: Trainer) -> Decisive:
        return Decisive(trainer.with_batch_size(self.batch_size), but=("batch_size",))

    @override
    def __call__(self, task: Task, trainer: Trainer, run: RunFolder | None = None) -> Decision:
        return self.propose(task, trainer, run, 1).decision

    @override
    def propose(self, task: Task, trainer: Trainer, run: RunFolder | None, num: int) -> Proposals:
        """Train and search, and name the masks with the lowest losses of those that were tried.

        Raises:
            UserError: the network cannot be pruned so, or a loss was not finite for too long.
            Interrupted: a signal arrived; the same call with the same run folder resumes.
        """
        how, costs = prepared(self, task, trainer, run)
        constraints = how.compiled(task.blocks)
        learned = how.learned().learn(task, trainer, run)
        greedy = Greedy(**how.allowed(), samples=self.samples, swaps=self.swaps)
        weights = {p: learned.weights[name] for name, p in task.teacher.named_parameters() if name in learned.weights}
        with restored(weights):
            with torch.no_grad():
                for p, value in weights.items():
                    p.copy_(value)
            found = greedy.decide(constraints, task, trainer)
        tried = sorted(filter(constraints.accepts, found.seen), key=found.seen.__getitem__)
        masks = tried or [tuple(found.kept)]  # where nothing has to go
        record = {"steps": learned.num_steps, **found.record(), **costs}
        record["evaluations"] = learned.evaluations + found.evaluations
        where = {**provenance(trainer.seed, task.source), **record}
        decision = how._decision(task.blocks, constraints, masks[0], where)
        return Proposals(replace(decision, marginals=tuple(learned.sampler.marginals().tolist())), masks[:num])
