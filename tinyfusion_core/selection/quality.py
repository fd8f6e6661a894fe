"""Prune to a quality: the fewest blocks that are predicted to recover within a loss, or what a metric measures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from ..errors import UserError, require
from ..evaluation.metrics import Metric
from ..protocols.task import Task
from ..pruning.decision import Decision, provenance
from ..runtime.files import NEUTRAL
from ..runtime.run_folder import RunFolder
from ..runtime.seeding import generator
from ..samplers.constraints import Rules
from ..training.forecasting.power_law import PowerLaw
from ..training.recover import Recover
from ..training.starts.base import Start
from ..training.trainer import Trainer
from ..training.validation import parse_loss
from .base import FOLLOWS, Selector, prepared
from .judging.heats import Heats
from .judging.measured import MeasuredRecoveries
from .judging.recoveries import ShortRecoveries
from .race import CRITERIA, Race

_ALONE = {"interval": None, "probability": None}
DRAWS = 1000
"""Bootstrap draws of the samples that judge."""


@dataclass(frozen=True, kw_only=True)
class Shallowest(Selector):
    """Keep the fewest blocks that are predicted to recover within a loss, or within what a metric may measure.

    Depths are bisected. At each one a race between the choices of criteria finds the mask, which is then recovered by
    what is left of that depth's steps. What its loss lacks to the teacher's falls as a power of the steps: a line
    through the lengths that the mask was recovered by, in logarithms, says what the recipe's recovery will come to.
    How sure that is comes from a bootstrap over the samples that judge; another seed of the recovery is not in it. A
    metric measures the mask after three lengths of its own, on the samples that judge; it is one number, so how sure
    that is stays unknown.

    Args:
        loss: the most that the recovered network's loss may be: `1.05x` of the teacher's, or a number.
        metric: what to measure in its place.
        within: what it may measure at worst: a multiple of the teacher's, such as `1.1x`, or `0.98x` where more is
            better; or a number.
        steps: updates of all short recoveries together.
        recover_steps: steps of the recovery to predict for; default the recipe's `recover.steps`, or `steps`.
        lr: learning rate of the short recoveries; default the recipe's `recover.lr`, or 1e-3.
        batch_size: samples per update; default the trainer's.
        samples: training samples set apart to judge on, at most half of all.
        sure: how probable a depth must be within the loss.
        protect: indices of blocks that must be kept.
        constraints: further rules for masks.
        start: what the short recoveries begin with. Default the recipe's `recover.start`, or nothing.
    """

    loss: str | float | None = None
    metric: Metric | None = field(default=None, metadata={NEUTRAL: None})
    within: str | float | None = field(default=None, metadata={NEUTRAL: None})
    steps: int = 10_000
    recover_steps: int | None = field(default=None, metadata={FOLLOWS: "steps"})
    lr: float | None = field(default=None, metadata={FOLLOWS: "lr"})
    batch_size: int | None = None
    samples: int = 512
    sure: float = 0.5
    protect: Sequence[int] = field(default_factory=tuple)
    constraints: Rules | None = None
    start: Start | None = field(default=None, metadata={FOLLOWS: "start", NEUTRAL: None})

    hands_out: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(0 < self.sure < 1, "search.sure", self.sure, "a probability between 0 and 1")
        steps = self.recover_steps
        require(steps is None or steps >= 1, "search.recover_steps", steps, "at least 1")
        if (self.loss is None) == (self.metric is None) or (self.metric is None) != (self.within is None):
            raise UserError("search: give either loss, or metric and within")
        self.limit(1.0)
        self._race(1, 4)  # what is wrong with the others is said there

    def limit(self, teacher: float) -> float:
        """Return the worst loss that is allowed, or value of the metric, for the teacher's.

        Raises:
            UserError: it is none.
        """
        key, allowed = self._allowed
        return parse_loss(allowed, teacher, f"search.{key}")

    @property
    def _allowed(self) -> tuple[str, str | float]:
        """The option that says what is allowed, and what it says."""
        return ("within", self.within) if self.within is not None else ("loss", self.loss or 0.0)

    def _race(self, keep: int, steps: int) -> Race:
        """The race at one depth."""
        of: dict[str, Any] = {"keep": keep, "protect": self.protect, "constraints": self.constraints}
        criteria = [criterion(**of) for criterion in CRITERIA]
        of |= {"lr": self.lr, "batch_size": self.batch_size, "samples": self.samples, "start": self.start}
        # What is predicted is a recovery by whole batches.
        return Race(**of, steps=steps, updates_per_batch=1, rounds=2, proposers=criteria)

    def depths(self, blocks: Sequence[str]) -> list[int]:
        """Return how many blocks may be kept, ascending.

        Raises:
            UserError: the rules leave no choice.
        """
        found, problem = [], ""
        for keep in range(1, len(blocks)):
            try:
                self._race(keep, 4).compiled(blocks)
                found.append(keep)
            except UserError as e:
                problem = str(e)
        if not found:
            raise UserError(f"search: no number of blocks fits the rules; {problem}")
        return found

    @override
    def preview(self, blocks: Sequence[str]) -> Decision:
        """Return the deepest choice there is, which needs most memory."""
        return replace(self._race(self.depths(blocks)[-1], 4).preview(blocks), method=type(self).__name__)

    @override
    def metrics(self) -> Sequence[Metric]:
        return () if self.metric is None else (self.metric,)

    @override
    def keeps(self, blocks: Sequence[str]) -> None:
        return None

    @override
    def trainings(self, trainer: Trainer, processes: int) -> Sequence[Recover]:
        return (self._race(1, 4).recovery(self.steps, trainer, processes),)

    @override
    def __call__(self, task: Task, trainer: Trainer, run: RunFolder | None = None) -> Decision:
        """Decide.

        Raises:
            UserError: no depth is predicted to recover within the loss, or there are too few steps.
        """
        how, _ = prepared(self, task, trainer, run)
        return how._decide(task, trainer, run)

    def _decide(self, task: Task, trainer: Trainer, run: RunFolder | None) -> Decision:
        depths = self.depths(task.blocks)
        share = self.steps // len(depths).bit_length()  # as many as a bisection visits at most
        if share < 12:
            raise UserError(f"search.steps is {self.steps}: too few to try depths with; give at least 12 for each")
        of = (task, trainer, run, self._race(1, 4).recovering(trainer), self.samples, 0)
        recoveries = ShortRecoveries(*of)
        measured = None if self.metric is None else MeasuredRecoveries(*of, metric=self.metric)
        teacher = (measured or recoveries).judge(task.teacher)
        sign = 1.0 if measured is None else measured.sign
        self.limit(sign * float(teacher.mean()))  # what is wrong with it is said before a race
        resampled = _bootstrap(len(teacher), trainer.seed)
        tried: dict[int, dict[str, Any]] = {}
        low, high = 0, len(depths)  # the answer is in depths[low:high], or there is none
        while low < high:
            middle = (low + high) // 2
            lengths, kept = self._lengths(depths[middle], share, recoveries, measured)
            found = self._predicted(kept, lengths, teacher, resampled, sign)
            low, high = (low, middle) if found["probability"] >= self.sure else (middle + 1, high)
            # Of one number no interval is known.
            tried[depths[middle]] = found | ({} if measured is None else {**_ALONE, "measures": measured.measures})
        if low == len(depths):
            best, (key, allowed) = min(tried.values(), key=lambda found: sign * found["predicted"]), self._allowed
            raise UserError(
                f"search.{key} is {allowed}: no depth is predicted to recover within it. Of those tried "
                f"{len(best['kept'])} of {len(task.blocks)} blocks is the best, predicted at {best['predicted']:.4g} "
                f"where the teacher has {best['teacher']:.4g}; allow a worse one, or recover for more steps"
            )
        evaluations = recoveries.evaluations + len(teacher)
        where = {**provenance(trainer.seed, task.source), "evaluations": evaluations}
        where["quality"] = [tried[depth] for depth in sorted(tried)]
        kept = tuple(tried[depths[low]]["kept"])
        return Decision(blocks=tuple(task.blocks), kept=kept, method=type(self).__name__, provenance=where)

    def _lengths(
        self, depth: int, steps: int, recoveries: ShortRecoveries, measured: MeasuredRecoveries | None
    ) -> tuple[dict[int, Tensor], Sequence[int]]:
        """Find the mask of a depth: its (samples,) losses by the steps of its recoveries, and its blocks."""
        until = recoveries.spent + steps
        race = self._race(depth, max(4, 2 * steps // 3))
        recoveries.steps = recoveries.spent + race.steps
        kept = Heats(race, recoveries).decision().kept
        recoveries.steps = until
        if measured is None:
            recoveries.losses([kept], "race, last", recoveries.left)
            return recoveries.known[kept], kept
        left, measured.steps, measured.spent = recoveries.left, until, recoveries.spent
        for share in (1, 2, 4):
            measured.losses([kept], f"measured {share}", max(1, share * left // 7))
        recoveries.spent, recoveries.evaluations = until, recoveries.evaluations + measured.evaluations
        measured.evaluations = 0
        return measured.known[kept], kept

    def _predicted(
        self, kept: Sequence[int], lengths: Mapping[int, Tensor], teacher: Tensor, resampled: Tensor, sign: float
    ) -> dict[str, Any]:
        """What a mask is predicted to recover to, for the record."""
        until = self.recover_steps or self.steps
        evenly = torch.full((1, len(teacher)), 1 / len(teacher), dtype=torch.float64)
        (at,), (predicted,) = predicted_losses(lengths, teacher, until, evenly)
        teachers, draws = predicted_losses(lengths, teacher, until, resampled)
        within = sign * torch.tensor([self.limit(sign * float(loss)) for loss in teachers], dtype=torch.float64)
        return {
            "kept": list(kept),
            "measured": {str(steps): sign * float(losses.mean()) for steps, losses in sorted(lengths.items())},
            "teacher": sign * float(at),
            "limit": self.limit(sign * float(at)),
            "predicted": sign * float(predicted),
            "interval": [float(at + (draws - teachers).quantile(share)) for share in (0.05, 0.95)],
            "probability": float((draws <= within).double().mean()),
            "steps": until,
        }


def _bootstrap(num: int, seed: int) -> Tensor:
    """(draws, samples) weights of samples drawn with replacement."""
    drawn = torch.randint(num, (DRAWS, num), generator=generator(seed, "quality", "bootstrap"))
    counts = torch.zeros(DRAWS, num, dtype=torch.float64)
    return counts.scatter_add_(1, drawn, torch.ones_like(counts)) / num


def predicted_losses(
    lengths: Mapping[int, Tensor], teacher: Tensor, until: int, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Predict the loss after a longer recovery, for several weightings of the samples.

    Args:
        lengths: (samples,) losses after recoveries of so many steps.
        teacher: (samples,) losses of the teacher.
        until: steps of the recovery to predict.
        weights: (draws, samples) weights that sum to 1.

    Returns:
        (draws,) losses of the teacher, and (draws,) predicted ones: what the shorter recoveries lack to the teacher
        falls as a power of their steps, or stays where it does not fall.
    """
    steps = sorted(lengths)
    at = weights @ teacher
    behind = torch.stack([weights @ lengths[length] for length in steps], dim=1) - at[:, None]  # (draws, lengths)
    line = PowerLaw.through(steps, behind).after(until)
    return at, at + torch.where(behind[:, -1] > 0, line, behind[:, -1])
