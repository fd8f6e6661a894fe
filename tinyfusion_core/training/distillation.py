"""Settings of distillation from the teacher to the pruned student (TinyFusion, arXiv:2412.01199, section 3.4)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from ..errors import UserError, require
from ..parsing.settings import Settings
from ..protocols.blocks.outputs import captured
from ..protocols.blocks.paths import block_lists
from ..protocols.blocks.streams import Streams
from ..protocols.loss import LossAdapter
from ..pruning.decision import Decision
from ..runtime.files import NEUTRAL
from ..runtime.seeding import Rng
from .distilling.losses import feature_loss
from .distilling.quantised import NAMED
from .teacher_cache.settings import TeacherCache

Tap = tuple[int, int]
"""A student block and the teacher block whose output it should match, as positions among all blocks."""


Weight = float | tuple[float, float]
"""The weight of a term; or what it is at the first and at the last step, linear in between."""


def ends(weight: Weight) -> tuple[float, float]:
    """Return a weight at the first and at the last step."""
    return weight if isinstance(weight, tuple) else (weight, weight)


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
        alpha_kd: weight of the distance to the teacher's prediction, as the objective defines it; of a pair, the weight
            at the first and at the last step, linear in between.
        alpha_gt: weight of the training loss, or two.
        cache: the teacher's predictions, written beforehand by `tinyfusion cache-teacher`; null runs the teacher.
        on_policy: share of the steps that learn from samples which the student makes itself (the lambda of GKD,
            arXiv:2306.13649); these steps have no training loss.
        quantise: a config of torchao, as `Int8WeightOnlyConfig`, or its path as `class_path` with `init_args`. A copy
            of the teacher that is quantised so answers, and the teacher waits in main memory.
    """

    alpha_kd: Weight = 0.9
    alpha_gt: Weight = 0.1
    cache: TeacherCache | None = field(default=None, metadata={NEUTRAL: None})
    on_policy: float = field(default=0.0, metadata={NEUTRAL: 0.0})
    quantise: str | dict[str, Any] | None = field(default=None, metadata={NEUTRAL: None})

    def __post_init__(self) -> None:
        for name in ("alpha_kd", "alpha_gt"):
            require(min(ends(getattr(self, name))) >= 0, f"recover.kd.{name}", getattr(self, name), "0 or more")
        some = all(kd + gt > 0 for kd, gt in zip(ends(self.alpha_kd), ends(self.alpha_gt), strict=True))
        require(some, "recover.kd.alpha_kd", self.alpha_kd, "it or alpha_gt above 0")
        require(0 <= self.on_policy <= 1, "recover.kd.on_policy", self.on_policy, "a share of the steps, 0 to 1")
        if self.on_policy and self.cache is not None:
            raise UserError(
                "recover.kd.on_policy: no cache holds predictions on samples that are made in training; leave it or "
                "recover.kd.cache out"
            )
        if self.quantise is not None:
            if self.cache is not None:
                raise UserError("recover.kd.quantise: with recover.kd.cache no teacher is run; leave one of them out")
            NAMED.read(self.quantise)  # whether there is such a config, a plan finds out: torchao imports slowly

    def samples_itself(self, rng: Rng) -> bool:
        """Return whether the student makes the samples of a step itself: the same on every process.

        Args:
            rng: random streams of the step.
        """
        return self.on_policy > 0 and float(torch.rand((), generator=rng.batch("on policy"))) < self.on_policy

    def check_makes(self, loss: LossAdapter) -> None:
        """Check that an objective can make samples, if the student is to learn from its own.

        Raises:
            UserError: it cannot.
        """
        if self.on_policy and not loss.makes_data:
            raise UserError(
                f"recover.kd.on_policy: a network with {type(loss).__name__} makes no samples; leave it out, or take a "
                "loss that generates"
            )

    def taps_for(self, decision: Decision) -> list[Tap]:
        """Return the pairs of blocks whose outputs are compared: none."""
        return []

    def watched(
        self, model: nn.Module, paths: Sequence[str], streams: Streams
    ) -> AbstractContextManager[list[list[Tensor]]]:
        """Record what is compared of blocks while the context is open: their outputs, unless a subclass says otherwise.

        Args:
            model: the network that runs.
            paths: the blocks.
            streams: the network's streams.

        Returns:
            A context whose value has, for every path, the tensors that are compared one by one, each (rows, ...).
        """
        return captured(model, paths, streams)

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
class FeatureKD(OutputKD, ABC):
    """Also match the outputs of the teacher's blocks, in some way; the mean over taps counts.

    Args:
        alpha_kd: weight of the distance to the teacher's prediction, as the objective defines it; of a pair, the weight
            at the first and at the last step, linear in between.
        alpha_gt: weight of the training loss, or two.
        cache: the teacher's predictions, written beforehand; its `blocks` must hold those that the taps name.
        on_policy: share of the steps that learn from samples which the student makes itself, see `OutputKD`.
        quantise: how a copy of the teacher that answers is quantised, see `OutputKD`.
        beta: weight of the feature loss at the first and at the last step, linear in between.
        taps: pairs of (student block, teacher block), counted from 0; by default derived from the decision.
    """

    beta: tuple[float, float] = (1e-2, 0.0)
    taps: list[tuple[int, int]] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(min(self.beta) >= 0, "recover.kd.beta", self.beta, "weights of 0 or more")
        require(self.taps is None or len(self.taps) > 0, "recover.kd.taps", self.taps, "at least one pair, or null")

    @abstractmethod
    def compare(self, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        """Compare the outputs of a matched pair of blocks.

        Args:
            student: (batch, ...) output of the student's block.
            teacher: the same of the teacher's block.

        Returns:
            The loss of each sample as `feature`, (batch,), and whatever else is to be logged, each (batch,).
        """

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


@dataclass(frozen=True, kw_only=True)
class MaskedKD(FeatureKD):
    """Also match the outputs of the teacher's blocks, leaving out extreme activations.

    The feature loss is the mean over taps of the mean squared difference. An activation is extreme if it is not within
    `sigma` standard deviations of the mean of its sample (over tokens and channels).

    Args:
        alpha_kd: weight of the distance to the teacher's prediction, as the objective defines it; of a pair, the weight
            at the first and at the last step, linear in between.
        alpha_gt: weight of the training loss, or two.
        cache: the teacher's predictions, written beforehand; its `blocks` must hold those that the taps name.
        on_policy: share of the steps that learn from samples which the student makes itself, see `OutputKD`.
        quantise: how a copy of the teacher that answers is quantised, see `OutputKD`.
        beta: weight of the feature loss at the first and at the last step, linear in between.
        taps: pairs of (student block, teacher block), counted from 0; by default derived from the decision.
        sigma: standard deviations beyond which an activation is extreme; null leaves none out. The paper's 2 does as
            well as 4 on its large models and worse on our small ones, which have no massive activations.
        mask: `joint` counts an element only where neither is extreme (the paper's text); `separate` sets the extreme
            activations of student and teacher to zero, each by its own mask (the reference code). The default samples
            best in `benchmarks/RESULTS.md`.
    """

    sigma: float | None = 4.0
    mask: Literal["joint", "separate"] = "joint"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.sigma is None or self.sigma > 0, "recover.kd.sigma", self.sigma, "a number above 0, or null")

    @override
    def compare(self, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        feature, masked = feature_loss(student, teacher, self.sigma, self.mask)
        return {"feature": feature, "masked": masked}
