"""Knowledge distillation from the teacher to the pruned student (TinyFusion, arXiv:2412.01199, section 3.4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from ..errors import UserError, require
from ..parsing.settings import Settings
from ..protocols.backbone import Batch
from ..protocols.blocks.outputs import captured
from ..protocols.blocks.paths import block_lists
from ..protocols.loss import LossAdapter, Prediction
from ..protocols.task import Task
from ..pruning.decision import Decision
from ..runtime.files import NEUTRAL
from ..runtime.seeding import Rng
from .objective import Objective
from .teacher_cache.settings import PREFIX, TeacherCache

Tap = tuple[int, int]
"""A student block and the teacher block whose output it should match, as positions among all blocks."""


def derive_taps(decision: Decision) -> list[Tap]:
    """Match the last kept block of every segment with the end of that segment in the teacher.

    Segments are the groups that were decided independently. A decision without groups has a segment end wherever a run
    of removed blocks ends, because the kept block before the run has to stand in for it. Segments never cross block
    lists; a segment that keeps nothing is merged into the one before it, or at the start of a list into the one after
    it.
    """
    position = {block: j for j, block in enumerate(decision.kept)}
    ends = {blocks[-1] for blocks in decision.choices}
    if not ends:
        ends = {i for i in decision.removed if i + 1 in position}
    taps: dict[int, int] = {}
    for members in block_lists(decision.blocks).values():
        last = None
        for i in members:
            last = position.get(i, last)
            if last is not None and (i in ends or i == members[-1]):
                taps[last] = i
    return list(taps.items())


@dataclass(frozen=True, kw_only=True)
class OutputKD(Settings):
    """Match the teacher's prediction on the same inputs, in addition to the training loss.

    Args:
        alpha_kd: weight of the distance to the teacher's prediction, as the objective defines it.
        alpha_gt: weight of the training loss.
        cache: the teacher's predictions, written beforehand by `tinyfusion cache-teacher`; null runs the teacher.
    """

    alpha_kd: float = 0.9
    alpha_gt: float = 0.1
    cache: TeacherCache | None = field(default=None, metadata={NEUTRAL: None})

    def __post_init__(self) -> None:
        for name in ("alpha_kd", "alpha_gt"):
            require(getattr(self, name) >= 0, f"recover.kd.{name}", getattr(self, name), "0 or more")
        require(self.alpha_kd + self.alpha_gt > 0, "recover.kd.alpha_kd", self.alpha_kd, "it or alpha_gt above 0")

    def taps_for(self, decision: Decision) -> list[Tap]:
        """Return the pairs of blocks whose outputs are compared: none."""
        return []

    def compared(self, decision: Decision, final: bool) -> set[int]:
        """Return the teacher's blocks whose outputs are compared: none.

        Args:
            decision: how the student is made.
            final: whether it is the decision; if not, other blocks may be kept.
        """
        return set()

    def check_cache(self, decision: Decision, final: bool = True) -> None:
        """Check that a cache, if there is one, keeps the outputs of the teacher's blocks that are compared.

        Args:
            decision: how the student is made.
            final: whether it is the decision; if not, other blocks may be kept.

        Raises:
            UserError: it lacks one.
        """
        lacking = self.compared(decision, final).difference(self.cache.blocks if self.cache else ())
        if self.cache is not None and lacking:
            blocks = ", ".join(map(str, sorted(lacking)))
            raise UserError(
                f"recover.kd.cache.blocks: lacks {blocks}, blocks of the teacher that the student may be compared "
                "with; add them and write the cache anew, say which in recover.kd.taps, or distil with OutputKD"
            )


@dataclass(frozen=True, kw_only=True)
class MaskedKD(OutputKD):
    """Also match the outputs of the teacher's blocks, leaving out extreme activations.

    The feature loss is the mean over taps of the mean squared difference. An activation is extreme if it is not within
    `sigma` standard deviations of the mean of its sample (over tokens and channels).

    Args:
        alpha_kd: weight of the distance to the teacher's prediction, as the objective defines it.
        alpha_gt: weight of the training loss.
        cache: the teacher's predictions, written beforehand; its `blocks` must hold those that the taps name.
        beta: weight of the feature loss at the first and at the last step, linear in between.
        sigma: standard deviations beyond which an activation is extreme; null leaves none out. The paper's 2 does as
            well as 4 on its large models and worse on our small ones, which have no massive activations.
        mask: `joint` counts an element only where neither is extreme (the paper's text); `separate` sets the extreme
            activations of student and teacher to zero, each by its own mask (the reference code). The default samples
            best in `benchmarks/RESULTS.md`.
        taps: pairs of (student block, teacher block), counted from 0; by default derived from the decision.
    """

    beta: tuple[float, float] = (1e-2, 0.0)
    sigma: float | None = 4.0
    mask: Literal["joint", "separate"] = "joint"
    taps: list[tuple[int, int]] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(min(self.beta) >= 0, "recover.kd.beta", self.beta, "weights of 0 or more")
        require(self.sigma is None or self.sigma > 0, "recover.kd.sigma", self.sigma, "a number above 0, or null")
        require(self.taps is None or len(self.taps) > 0, "recover.kd.taps", self.taps, "at least one pair, or null")

    @override
    def taps_for(self, decision: Decision) -> list[Tap]:
        """Return the pairs of blocks whose outputs are compared.

        Raises:
            UserError: a given tap is out of range.
        """
        if self.taps is None:
            return derive_taps(decision)
        depths = len(decision.kept), len(decision.blocks)
        for tap in self.taps:
            if not all(0 <= i < depth for i, depth in zip(tap, depths, strict=True)):
                raise UserError(
                    f"recover.kd.taps: [{tap[0]}, {tap[1]}] is out of range; the student has blocks 0 to "
                    f"{depths[0] - 1}, the teacher 0 to {depths[1] - 1}"
                )
        return [(s, t) for s, t in self.taps]

    @override
    def compared(self, decision: Decision, final: bool) -> set[int]:
        if not final and self.taps is None and not decision.choices:
            return set(range(len(decision.blocks)))
        return {block for _, block in self.taps_for(decision)}


class Distilled(Objective):
    """alpha_kd * distance to the teacher + alpha_gt * training loss + beta * feature loss.

    Args:
        student: the network to train.
        task: the objective, and the teacher.
        decision: how the student was made from the teacher, in whole blocks; see `in_blocks`.
        kd: the terms and their weights.

    Raises:
        UserError: a tap is out of range.
    """

    def __init__(self, student: nn.Module, task: Task, decision: Decision, kd: OutputKD) -> None:
        super().__init__()
        self.model, self.kd = student, kd
        self.taps = kd.taps_for(decision)
        kd.check_cache(decision)
        ours, theirs = task.backbone.block_paths(student), task.backbone.block_paths(task.teacher)
        self.paths = [ours[s] for s, _ in self.taps], [theirs[t] for _, t in self.taps]
        self.blocks = [student.get_submodule(path) for path in ours]
        # The teacher is not trained: in a tuple it is not registered, so that nobody averages or saves it.
        self.unregistered = task.loss, task.teacher, task.backbone.streams
        blocks = [task.teacher.get_submodule(path) for path in theirs]
        self.predicting = [] if kd.cache else [(_Prediction(task.teacher, task.loss), blocks)]
        self.beta = 0.0

    @override
    def frozen_modules(self) -> list[tuple[nn.Module, Sequence[nn.Module]]]:
        return list(self.predicting)

    @override
    def forward(self, inputs: Batch, rng: Rng) -> tuple[Tensor, Tensor]:
        loss, _, streams = self.unregistered
        stored = {name.removeprefix(PREFIX): t for name, t in inputs.items() if name.startswith(PREFIX)}
        inputs = {name: t for name, t in inputs.items() if not name.startswith(PREFIX)}
        told = None if self.kd.cache else self._run_teacher(inputs)
        with captured(self.model, self.paths[0], streams) as ours:
            prediction = self.prediction = loss.predict(self.model, inputs)
        if told is not None:
            _check_shapes(prediction, told[0], "the student predicts", "the teacher")
        target, theirs = told or self._as_stored(stored, prediction)
        terms = {"kd": loss.distance(prediction, target, inputs), "gt": loss.loss(prediction, inputs)}
        total = self.kd.alpha_kd * terms["kd"] + self.kd.alpha_gt * terms["gt"]
        if isinstance(self.kd, MaskedKD):
            for tap, s, t in zip(self.taps, ours, theirs, strict=True):
                _check_shapes(s, t, f"block {tap[0]} of the student gives", f"block {tap[1]} of the teacher")
            pairs = [(s, t) for tap in zip(ours, theirs, strict=True) for s, t in zip(*tap, strict=True)]
            compared = [feature_loss(s, t, self.kd.sigma, self.kd.mask) for s, t in pairs]
            terms["feature"], terms["masked"] = (torch.stack(parts).mean(0) for parts in zip(*compared, strict=True))
            total = total + self.beta * terms["feature"]
        self.terms = {name: term.detach() for name, term in terms.items()}
        return total.mean(), total.detach()

    def _run_teacher(self, inputs: Batch) -> tuple[Prediction, list[list[Tensor]]]:
        """The teacher's prediction, and the outputs of its tapped blocks."""
        _, teacher, streams = self.unregistered
        ((predict, _),) = self.predicting
        with torch.no_grad(), captured(teacher, self.paths[1], streams) as outputs:
            return predict(inputs), outputs

    def _as_stored(self, stored: Batch, like: Prediction) -> tuple[Prediction, list[list[Tensor]]]:
        """The same from what a cache keeps; the prediction as the objective's `distance` takes it."""
        outputs = [list(_named(stored, f"block.{block}.").values()) for _, block in self.taps]
        return self.unregistered[0].kept(_named(stored, "prediction."), like), outputs

    @override
    def before_step(self, progress: float) -> None:
        if isinstance(self.kd, MaskedKD):
            first, last = self.kd.beta
            self.beta = first + (last - first) * progress

    @override
    def metrics(self) -> dict[str, Any]:
        return {"beta": self.beta} if isinstance(self.kd, MaskedKD) else {}


def _named(columns: Batch, prefix: str) -> dict[str, Tensor]:
    """The columns whose names begin so, without that beginning, in the order of what is left."""
    return {name.removeprefix(prefix): columns[name] for name in sorted(columns) if name.startswith(prefix)}


class _Prediction(nn.Module):
    """The teacher with its objective: one call runs all of it, as FSDP requires."""

    def __init__(self, model: nn.Module, loss: LossAdapter) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    @override
    def forward(self, inputs: Batch) -> Prediction:
        return self.loss.predict(self.model, inputs)


def feature_loss(student: Tensor, teacher: Tensor, sigma: float | None, mask: str) -> tuple[Tensor, Tensor]:
    """Compare the outputs of a matched pair of blocks.

    Args:
        student: (batch, ...) output of the student's block.
        teacher: the same of the teacher's block.
        sigma: (unbiased) standard deviations from the sample's mean beyond which an activation is extreme; None leaves
            none out.
        mask: "joint" or "separate", see `MaskedKD`.

    Returns:
        Mean squared differences, (batch,), and the fractions of the activations left out, (batch,).
    """
    precision = torch.promote_types(student.dtype, torch.float32)  # squares of half precision overflow
    s, t = student.flatten(1).to(precision), teacher.flatten(1).to(precision)
    if sigma is None:
        return (s - t).square().mean(1), s.new_zeros(len(s))
    keep_s, keep_t = _usual(s, sigma), _usual(t, sigma)
    if mask == "joint":
        keep = keep_s & keep_t
        return ((s - t) * keep).square().sum(1) / keep.sum(1).clamp(min=1), 1 - keep.to(s).mean(1)
    left_out = 1 - (keep_s.to(s) + keep_t.to(s)).mean(1) / 2
    return (s * keep_s - t * keep_t).square().mean(1), left_out


def _usual(x: Tensor, sigma: float) -> Tensor:
    x = x.detach()
    return (x - x.mean(1, keepdim=True)).abs() < sigma * x.std(1, keepdim=True)


def _check_shapes(student: Any, teacher: Any, ours: str, theirs: str) -> None:
    shapes = [[tuple(x.shape) for x in tree_leaves(p) if isinstance(x, Tensor)] for p in (student, teacher)]
    if shapes[0] != shapes[1]:
        raise UserError(
            f"recover.kd: {ours} {shapes[0]}, {theirs} {shapes[1]}; distillation compares what has the same shape"
        )
