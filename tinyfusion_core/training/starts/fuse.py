"""A start that folds the weights of dropped blocks into the blocks beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.func import functional_call
from typing_extensions import override

from ...errors import UserError, require
from ...protocols.backbone import Batch
from ...protocols.blocks.paths import block_lists
from ...protocols.task import Task
from ...protocols.undisturbed import evaluating
from ...pruning.decision import Decision
from ...runtime.run_folder import RunFolder
from ...runtime.seeding import Rng, generator
from ..distilling.distilled import Predicting
from ..distilling.losses import feature_loss
from ..loop import Fit
from ..objective import Objective, Optimization, cosine
from ..trainer import Trainer
from .base import Start
from .reaching import call_of, device_of


@dataclass(frozen=True, kw_only=True)
class Fuse(Start):
    """Fold the weights of dropped blocks into the kept block before them, so that it does their work too.

    To each weight W of the kept block is added (A B) * V, entry by entry, where V is the weight of the same name and
    shape in a dropped block, and A B are coefficients of low rank (FuseGPT, arXiv:2411.14507). A begins at zero, where
    nothing is added. One kept block after another, in the order of execution, A and B are trained so that behind the
    block the stream is what the teacher's is behind the gap; then they become part of W, so that the network keeps its
    layers. Blocks that go at the beginning of a list are folded into the first that stays. Biases, norms and
    weights without a counterpart stay.

    Args:
        rank: rank of the coefficients.
        steps: updates for each kept block with a gap beside it, of as many samples as the recovery's.
        lr: learning rate at the start; falls along a cosine to a hundredth.
    """

    rank: int = 8
    steps: int = 100
    lr: float = 5e-2

    def __post_init__(self) -> None:
        for name in ("rank", "steps"):
            require(getattr(self, name) >= 1, f"recover.start.{name}", getattr(self, name), "at least 1")
        require(self.lr > 0, "recover.start.lr", self.lr, "a rate above 0")

    @override
    def check(self, task: Task) -> None:
        if task.backbone.units:
            raise UserError("recover.start: Fuse folds whole blocks, and backbone.units takes them apart; take Refit")
        blocks = task.backbone.block_paths(task.teacher)
        beside = (pair for members in block_lists(blocks).values() for pair in pairwise(members))
        if not any(matching(*(task.teacher.get_submodule(blocks[i]) for i in pair)) for pair in beside):
            raise UserError(
                "recover.start: Fuse finds no two blocks side by side with weights of the same names and shapes; leave "
                "it out"
            )

    @override
    def planned(self, task: Task, decision: Decision) -> tuple[str, int]:
        self.check(task)
        blocks = [task.teacher.get_submodule(path) for path in task.backbone.block_paths(task.teacher)]
        folds, held = folds_of(decision), [0]
        for own, dropped in folds.items():
            block = blocks[decision.kept[own]]
            weights = [weight for i in dropped for weight in matching(block, blocks[i]).values()]
            # Coefficients with gradient and moments; of each weight their product, what it adds and the sum.
            ours = (4 * self.rank * (len(w) + w[0].numel()) + 3 * w.numel() for w in weights)
            held.append(4 * sum(ours))
        stay = ", ".join(map(str, decision.kept))
        return f"Fuse by {self.steps:,} steps a gap ({self.steps * len(folds):,} if blocks {stay} stay)", max(held)

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
        self.check(task)
        before = {network: device_of(network) for network in (student, task.teacher)}
        # The networks are run whole: what is trained is small, and each process has all of it.
        trainer = replace(trainer.quiet(), sharding="ddp")
        with evaluating(*before):
            for network in before:
                network.to(trainer.accelerator.device).requires_grad_(False)
            for own, dropped in folds_of(decision).items():
                self._fold(task, student, decision, own, dropped, trainer, f"{stage} fuse {own}")
        for network, device in before.items():
            network.to(device)

    def _fold(
        self,
        task: Task,
        student: nn.Module,
        decision: Decision,
        own: int,
        dropped: Sequence[int],
        trainer: Trainer,
        stage: str,
    ) -> None:
        """Fold blocks of the teacher into one of the student; where no weights match, it stays as it is."""
        ours, theirs = task.backbone.block_paths(student)[own], task.backbone.block_paths(task.teacher)
        block = student.get_submodule(ours)
        others = [matching(block, task.teacher.get_submodule(theirs[i])) for i in dropped]
        draw = generator(trainer.seed, stage, "coefficients")
        grafts = Grafts(block, {n: [o[n] for o in others if n in o] for n in set().union(*others)}, self.rank, draw)
        if not grafts.plain:
            return
        end = theirs[max(decision.kept[own], *dropped)]
        optimization = Optimization(
            groups=[{"params": list(grafts.parameters()), "lr": self.lr}], steps=self.steps, schedule=cosine(0.01)
        )
        objective = _BehindGap(task, student, ours, end, grafts)
        Fit(trainer, stage, objective, task.train, task.loss.prepare, optimization, None).run()
        with torch.no_grad():
            for name, weight in grafts.weights().items():
                block.get_parameter(name).copy_(weight)


def folds_of(decision: Decision) -> dict[int, list[int]]:
    """Return the dropped blocks of the teacher that go into each block of the student, by its position.

    Args:
        decision: how the student was made, in whole blocks.
    """
    folds: dict[int, list[int]] = {}
    for members in block_lists(decision.blocks).values():
        kept = [i for i in members if i in decision.kept]
        for i in members if kept else ():
            if i not in kept:
                own = max((k for k in kept if k < i), default=kept[0])
                folds.setdefault(decision.kept.index(own), []).append(i)
    return dict(sorted(folds.items()))


def matching(block: nn.Module, other: nn.Module) -> dict[str, Tensor]:
    """Return the weights of another block, (rows, ...), by the names that weights of the same shape have in a block."""
    theirs = dict(other.named_parameters())
    return {
        name: theirs[name]
        for name, p in block.named_parameters()
        if p.ndim > 1 and p.is_floating_point() and name in theirs and theirs[name].shape == p.shape
    }


class Grafts(nn.Module):
    """Weights of a block, with those of others added, entry by entry times coefficients of low rank.

    Args:
        block: the block.
        others: for the names of its weights, those of other blocks, (rows, ...).
        rank: rank of the coefficients.
        draw: draws their right factors; the left ones are zero.
    """

    def __init__(self, block: nn.Module, others: Mapping[str, Sequence[Tensor]], rank: int, draw: torch.Generator):
        super().__init__()
        # Neither in a mapping nor in a list are they registered: they are not trained.
        self.plain = {name: weight for name, weight in block.named_parameters() if name in others}
        self.added = [(name, other) for name in self.plain for other in others[name]]
        self.left, self.right = nn.ParameterList(), nn.ParameterList()
        for _, other in self.added:
            kind = torch.promote_types(other.dtype, torch.float32)
            self.left.append(torch.zeros(len(other), rank, dtype=kind))
            self.right.append(torch.randn(rank, other[0].numel(), generator=draw, dtype=kind) / rank**0.5)

    def weights(self) -> dict[str, Tensor]:
        """Return the weights, (rows, ...), by name."""
        found: dict[str, Tensor] = dict(self.plain)
        for (name, other), left, right in zip(self.added, self.left, self.right, strict=True):
            with torch.autocast(other.device.type, enabled=False):
                found[name] = found[name] + (left @ right).view_as(other) * other
        return {name: weight.to(self.plain[name].dtype) for name, weight in found.items()}


class _BehindGap(Objective):
    """The mean squared difference of student and teacher behind a gap.

    Args:
        task: the teacher, and the objective.
        student: the network.
        own: path of the student's block before the gap.
        end: path of the teacher's block at the gap's end.
        grafts: what is trained.
    """

    def __init__(self, task: Task, student: nn.Module, own: str, end: str, grafts: Grafts) -> None:
        super().__init__()
        self.grafts = grafts
        # The networks are not trained: in a tuple they are not registered.
        self.unregistered = task, Predicting(student, task.loss), own, end

    @override
    def forward(self, inputs: Batch, rng: Rng) -> tuple[Tensor, Tensor]:
        task, student, own, end = self.unregistered
        fused = {f"model.{own}.{name}": weight for name, weight in self.grafts.weights().items()}
        with torch.no_grad():
            run = partial(task.loss.predict, task.teacher, inputs)
            wanted = call_of(task.backbone, task.teacher, end, run)
        found = call_of(task.backbone, student.model, own, partial(functional_call, student, fused, (inputs,)))
        pairs = [(stream.of(found.output), stream.of(wanted.output)) for stream in found.streams]
        losses = torch.stack([feature_loss(s, t, None, "joint")[0] for s, t in pairs]).mean(0)
        # A weight that the block does not use has a gradient of zero, not none: DDP waits for every gradient.
        unused = sum(p.sum() for p in self.grafts.parameters())
        return losses.mean() + 0 * unused, losses.detach()
