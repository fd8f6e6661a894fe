"""What a distillation minimises."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from ...errors import UserError
from ...protocols.backbone import Batch
from ...protocols.loss import LossAdapter, Prediction
from ...protocols.task import Task
from ...pruning.decision import Decision
from ...runtime.seeding import Rng
from ..distillation import FeatureKD, OutputKD, ends
from ..objective import FunctionLoss, LossFunction, Objective, PlainLoss
from ..teacher_cache.settings import PREFIX
from ..trainer import Trainer
from .quantised import quantised
from .shares import Shares


class Distilled(Objective):
    """alpha_kd * distance to the teacher + alpha_gt * training loss + beta * feature loss.

    Args:
        student: the network to train.
        task: the objective, and the teacher.
        decision: how the student was made from the teacher, in whole blocks; see `in_blocks`.
        kd: the terms and their weights.

    Attributes:
        shares: compares the gradients of the terms whenever something is logged; None: nothing does.

    Raises:
        UserError: a tap is out of range.
    """

    def __init__(self, student: nn.Module, task: Task, decision: Decision, kd: OutputKD) -> None:
        super().__init__()
        self.model, self.kd = student, kd
        self.taps = kd.taps_for(decision)
        kd.check_cache(decision)
        kd.check_makes(task.loss)
        ours, theirs = task.backbone.block_paths(student), task.backbone.block_paths(task.teacher)
        self.paths = [ours[s] for s, _ in self.taps], [theirs[t] for _, t in self.taps]
        self.blocks = [student.get_submodule(path) for path in ours]
        # The teacher is not trained: in a tuple it is not registered, so that nobody averages or saves it.
        self.unregistered = task.loss, task.teacher, task.backbone.streams
        blocks = [task.teacher.get_submodule(path) for path in theirs]
        self.predicting = [] if kd.cache else [(Predicting(task.teacher, task.loss), blocks)]
        self.weights: dict[str, float] = {}
        self.shares: Shares | None = None
        self.before_step(0.0)

    @override
    def frozen_modules(self) -> list[tuple[nn.Module, Sequence[nn.Module]]]:
        return list(self.predicting)

    @override
    def forward(self, inputs: Batch, rng: Rng) -> tuple[Tensor, Tensor]:
        total = self.minimised(inputs, own=self.kd.samples_itself(rng))
        return total.mean(), total.detach()

    def minimised(self, inputs: Batch, own: bool) -> Tensor:
        """Return the weighted sum of the terms, (batch,), which are kept, as the prediction is; see `compared`."""
        self.prediction, terms = self.compared(inputs, own)
        weighted = [weight * terms[name] for name, weight in self.weights.items() if name in terms]
        self.terms = {name: term.detach() for name, term in terms.items()}
        return sum(weighted[1:], start=weighted[0])

    def compared(self, inputs: Batch, own: bool = False) -> tuple[Prediction, dict[str, Tensor]]:
        """Return the student's prediction, and the terms that have weights, each (batch,), with what else is logged.

        Args:
            inputs: prepared tensors by name, each (batch, ...).
            own: whether the student has made the samples itself, which have no training loss.
        """
        loss, _, streams = self.unregistered
        stored = {name.removeprefix(PREFIX): t for name, t in inputs.items() if name.startswith(PREFIX)}
        inputs = {name: t for name, t in inputs.items() if not name.startswith(PREFIX)}
        told = None if self.kd.cache else self._run_teacher(inputs)
        with self.kd.watched(self.model, self.paths[0], streams) as ours:
            prediction = loss.predict(self.model, inputs)
        if told is not None:
            _check_shapes(prediction, told[0], "the student predicts", "the teacher")
        target, theirs = told or self._as_stored(stored, prediction)
        terms = {"kd": loss.distance(prediction, target, inputs)}
        if not own:
            terms["gt"] = loss.loss(prediction, inputs)
        if isinstance(self.kd, FeatureKD):
            terms |= self._features(self.kd, ours, theirs, len(terms["kd"]))
        return prediction, terms

    def _features(
        self, kd: FeatureKD, ours: Sequence[Sequence[Tensor]], theirs: Sequence[Sequence[Tensor]], num: int
    ) -> dict[str, Tensor]:
        """The terms of the features, each (batch,): means over taps and what each has, and over a sample's rows."""
        for tap, s, t in zip(self.taps, ours, theirs, strict=True):
            _check_shapes(s, t, f"block {tap[0]} of the student gives", f"block {tap[1]} of the teacher")
        pairs = [(s, t) for tap in zip(ours, theirs, strict=True) for s, t in zip(*tap, strict=True)]
        compared = [kd.compare(s, t) for s, t in pairs]
        if odd := [len(row) for found in compared for row in found.values() if len(row) % num]:
            raise UserError(f"recover.kd: a tapped block compares {odd[0]} rows of {num} samples; name other taps")
        # Windows and frames of a sample are rows of their own in its attention.
        rows = {name: [found[name].view(num, -1).mean(1) for found in compared] for name in compared[0]}
        return {name: torch.stack(values).mean(0) for name, values in rows.items()}

    def _run_teacher(self, inputs: Batch) -> tuple[Prediction, list[list[Tensor]]]:
        """The teacher's prediction, and the outputs of its tapped blocks."""
        _, teacher, streams = self.unregistered
        ((predict, _),) = self.predicting
        with torch.no_grad(), self.kd.watched(teacher, self.paths[1], streams) as outputs:
            return predict(inputs), outputs

    def _as_stored(self, stored: Batch, like: Prediction) -> tuple[Prediction, list[list[Tensor]]]:
        """The same from what a cache keeps; the prediction as the objective's `distance` takes it."""
        outputs = [list(_named(stored, f"block.{block}.").values()) for _, block in self.taps]
        return self.unregistered[0].kept(_named(stored, "prediction."), like), outputs

    @override
    def before_step(self, progress: float) -> None:
        given = {"kd": self.kd.alpha_kd, "gt": self.kd.alpha_gt if self.kd.on_policy < 1 else 0.0}
        given |= {"feature": self.kd.beta} if isinstance(self.kd, FeatureKD) else {}
        parts = {name: ends(weight) for name, weight in given.items()}
        self.weights = {name: first + (last - first) * progress for name, (first, last) in parts.items()}

    @override
    def metrics(self) -> dict[str, Any]:
        alphas = {"alpha_kd": self.kd.alpha_kd, "alpha_gt": self.kd.alpha_gt}
        moving = {name: self.weights[name[6:]] for name, weight in alphas.items() if isinstance(weight, tuple)}
        moving |= {"beta": self.weights["feature"]} if isinstance(self.kd, FeatureKD) else {}
        compared = partial(self.compared, own=self.kd.on_policy == 1)  # else of steps that have the training loss too
        shares = self.shares.of(self.model, self.weights, compared) if self.shares else {}
        return moving | {f"share_{name}": round(share, 6) for name, share in shares.items()}


def objective_of(
    task: Task,
    student: nn.Module,
    decision: Decision | None,
    trainer: Trainer,
    kd: OutputKD | None,
    loss_fn: LossFunction | None,
) -> Objective:
    """Return what a recovery minimises, its teacher where it is run.

    Args:
        task: the objective, and the teacher.
        student: the network to train.
        decision: how it was made, in whole blocks; None: it is fresh, and has no teacher.
        trainer: says where networks are run.
        kd: the distillation.
        loss_fn: what stands in its place.
    """
    if loss_fn is not None:
        trainer.to_device(task.teacher)
        return FunctionLoss(student, task, loss_fn)
    if kd is None or decision is None:
        return PlainLoss(student, task)
    if kd.cache is None and kd.quantise is None:
        trainer.to_device(task.teacher)
    else:
        task.teacher.cpu()  # the device is the student's
    if kd.quantise is not None:
        answers = quantised(task.teacher, kd.quantise, trainer.accelerator.device)
        task = replace(task, model=trainer.to_device(answers))
    return Distilled(student, task, decision, kd)


def _named(columns: Batch, prefix: str) -> dict[str, Tensor]:
    """The columns whose names begin so, without that beginning, in the order of what is left."""
    return {name.removeprefix(prefix): columns[name] for name in sorted(columns) if name.startswith(prefix)}


class Predicting(nn.Module):
    """A network with its objective: one call runs all of it, as FSDP requires.

    Args:
        model: the network.
        loss: the objective.
    """

    def __init__(self, model: nn.Module, loss: LossAdapter) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    @override
    def forward(self, inputs: Batch) -> Prediction:
        """Return what the network predicts of inputs, each (batch, ...)."""
        return self.loss.predict(self.model, inputs)


def _check_shapes(student: Any, teacher: Any, ours: str, theirs: str) -> None:
    shapes = [[tuple(x.shape) for x in tree_leaves(p) if isinstance(x, Tensor)] for p in (student, teacher)]
    if shapes[0] != shapes[1]:
        raise UserError(
            f"recover.kd: {ours} {shapes[0]}, {theirs} {shapes[1]}; distillation compares what has the same shape"
        )
