"""Validation: a network is judged while it is trained, the best is kept, and the training stops when it may."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..dataloading.set_apart import Part, set_apart, without
from ..errors import UserError, require
from ..parsing.settings import Settings
from ..protocols.backbone import Batch
from ..protocols.data import Samples
from ..protocols.task import Task
from ..protocols.undisturbed import evaluating
from ..runtime.distributed import batches, map_sharded
from ..runtime.seeding import Rng
from ..runtime.stages import Forecasts
from .forecasting.forecast import forecasts
from .teacher_cache.samples import open_cache
from .teacher_cache.settings import TeacherCache
from .trainer import Trainer


@dataclass(frozen=True, kw_only=True)
class Validation(Settings):
    """Judge a network on training samples that are set apart, keep the best, and say early what it will come to.

    Args:
        every: steps from one judgement to the next; the last step is judged too.
        samples: training samples to set apart, at most half of all.
        patience: judgements in a row without a new best after which the training stops; null goes on to the end.
        until: the training stops when the loss is no higher than this: `1.03x` of the teacher's on the same samples,
            or a number.
    """

    every: int = 500
    samples: int = 256
    patience: int | None = None
    until: str | float | None = None

    def __post_init__(self) -> None:
        of = "validation (of recover)"
        require(self.every >= 1, f"every, {of}", self.every, "at least 1 step")
        require(self.samples >= 1, f"samples, {of}", self.samples, "at least 1")
        require(self.patience is None or self.patience >= 1, f"patience, {of}", self.patience, "at least 1, or null")
        self.limit(1.0)

    @property
    def relative(self) -> bool:
        """Whether `until` is a multiple of the teacher's loss."""
        return str(self.until).endswith("x")

    def limit(self, teacher: float) -> float | None:
        """Return the loss at which to stop, for the teacher's loss; None if there is none.

        Raises:
            UserError: it is no loss.
        """
        return None if self.until is None else parse_loss(self.until, teacher, "until, validation (of recover)")

    def check_teacher(self, task: Task, trainer: Trainer) -> None:
        """Check that the teacher has a loss that `until` can be a multiple of, before anything is spent.

        Processes share the samples: all must call it.

        Args:
            task: the objective, the teacher and the data.
            trainer: device, precision and seed.

        Raises:
            UserError: its loss is 0, as that of a network that is its own target.
        """
        if self.relative:
            _, _, apart = training_samples(task, trainer, self, None)
            assert apart is not None  # it judges
            self.validator(task.teacher, task, apart, trainer, beside=False)

    def validator(self, model: nn.Module, task: Task, samples: Samples, trainer: Trainer, beside: bool) -> Validator:
        """Return what judges a training so.

        Args:
            model: what is judged: the network in training, or the average of its weights.
            task: the objective and the teacher.
            samples: the samples that judge.
            trainer: device, precision and seed.
            beside: whether the teacher, which is judged first if `until` is a multiple of its loss, may be judged on
                the device else too.
        """
        teacher = None
        if self.relative or beside:
            before = next(task.teacher.parameters()).device
            teacher = mean_loss(task, trainer.to_device(task.teacher), samples, trainer)
            task.teacher.to(before)
        limit = self.limit(1.0 if teacher is None else teacher)
        return Validator(self, model, task, samples, trainer, limit, teacher)


@dataclass
class Validator:
    """Judges one training, and foretells what it will come to.

    Attributes:
        how: when, and when to stop.
        model: what is judged: the network in training, or the average of its weights.
        task: the objective.
        samples: the samples that judge.
        trainer: device, precision and seed.
        limit: the loss at which to stop; None: none.
        teacher: the teacher's loss on these samples; None if it is not known, and then nothing is foretold.
        history: steps and loss of every judgement.
        best: lowest loss so far.
        best_step: the step it was found at; 0 before there is one.
        weights: the state dict of then, on the CPU.
        judged: judgements since then.
        latest: what the last judgement found; None if it was not at the last step.
    """

    how: Validation
    model: nn.Module
    task: Task
    samples: Samples
    trainer: Trainer
    limit: float | None = None
    teacher: float | None = None
    history: list[tuple[int, float]] = field(default_factory=list)
    best: float = math.inf
    best_step: int = 0
    weights: dict[str, Tensor] = field(default_factory=dict)
    judged: int = 0
    latest: float | None = None

    def after(self, step: int, last: bool) -> bool:
        """Judge, if it is time to. Returns whether to stop, the same on every process. A collective call.

        Args:
            step: steps done.
            last: whether it was the last one.
        """
        self.latest = None
        if step % self.how.every and not last:
            return False
        self.latest = mean_loss(self.task, self.model, self.samples, self.trainer)
        self.history.append((step, self.latest))
        self.judged += 1
        if self.latest < self.best:
            self.best, self.best_step, self.judged = self.latest, step, 0
            self.weights = {name: t.detach().cpu().clone() for name, t in self.model.state_dict().items()}
        return self.ended_by is not None

    @property
    def ended_by(self) -> str | None:
        """What ends the training at this judgement, in words; None if nothing does."""
        if self.limit is not None and self.best <= self.limit:
            return f"{self.best:.4g} is within until ({self.limit:.4g})"
        if self.how.patience is not None and self.judged >= self.how.patience:
            return f"{self.judged} judgements brought no new best ({self.best:.4g} at step {self.best_step:,})"
        return None

    def metrics(self) -> dict[str, float | None]:
        """Return what to log after a step: the loss, if it was judged, and None in its place if it is not finite."""
        if self.latest is None:
            return {}
        return {"validation": self.latest if math.isfinite(self.latest) else None}

    def forecasts(self, begin: int, end: int) -> Forecasts | None:
        """Return what the training is expected to come to; see `forecasting.forecast.forecasts`."""
        if self.teacher is None or self.latest is None:
            return None
        return forecasts(self.history, self.teacher, begin, end, self.limit)

    def state_dict(self) -> dict[str, Any]:
        """Return its state, as checkpoints hold it."""
        found = {"best": self.best, "step": self.best_step, "weights": self.weights, "judged": self.judged}
        return {**found, "history": list(self.history)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a checkpoint."""
        self.best, self.best_step = state["best"], state["step"]
        self.weights, self.judged = state["weights"], state["judged"]
        self.history = list(state.get("history", ()))  # of earlier versions there is none

    def load_best(self, network: nn.Module) -> None:
        """Give a network the best weights.

        Raises:
            UserError: no judgement has found a finite loss.
        """
        if not self.weights:
            raise UserError("recover.validation: no judged loss was finite; lower recover.lr")
        network.load_state_dict(self.weights)


def parse_loss(given: str | float, teacher: float, key: str) -> float:
    """Return the loss, or another measurement, that a setting means.

    Args:
        given: a number, or a multiple of the teacher's, as `1.05x`.
        teacher: the teacher's.
        key: the setting, for the message.

    Raises:
        UserError: it is neither, or a multiple of nothing.
    """
    text = str(given)
    if text.endswith("x") and teacher <= 0:
        raise UserError(f"{key} is {given}, and the teacher's is {teacher:.3g}; give a number")
    try:
        value = float(text.removesuffix("x")) * (teacher if text.endswith("x") else 1.0)
    except ValueError:
        value = math.nan
    require(0 < value < math.inf, key, given, "a multiple of the teacher's, as 1.05x, or a number")
    return value


def mean_loss(task: Task, model: nn.Module, samples: Samples, trainer: Trainer) -> float:
    """Return the mean loss of a network on some samples, on random draws that are the same every time.

    Processes share the samples: all must call it, and get the same result.

    Args:
        task: the objective.
        model: the network, on the trainer's device; it is left as it was.
        samples: the samples.
        trainer: device, precision, seed and rows at once.
    """
    accelerator, num = trainer.accelerator, len(samples)

    def losses(rows: range) -> Tensor:
        batch = {name: t.to(accelerator.device) for name, t in samples.__getitems__(list(rows)).items()}
        inputs = task.loss.prepare(batch, Rng(trainer.seed, "validation", first=rows.start, strata=num))
        with accelerator.autocast():
            return task.loss.losses(model, inputs).float().cpu()

    with evaluating(model), torch.no_grad():
        parts = batches(num, trainer.micro_batch_size or trainer.batch_size)
        found = float(torch.cat(map_sharded(parts, losses)).double().mean())
    return found if math.isfinite(found) else math.inf


def training_samples(
    task: Task, trainer: Trainer, validation: Validation | None, cache: TeacherCache | None
) -> tuple[Samples, Callable[[Batch, Rng], dict[str, Tensor]], Samples | None]:
    """Return the samples to train on, what prepares them, (batch, ...), and those that are set apart to judge on.

    Args:
        task: the objective and the data.
        trainer: its seed says which are set apart.
        validation: how a training is judged; None sets none apart.
        cache: where the teacher's predictions are; None: nowhere.

    Raises:
        UserError: none are left to train on or to judge on, or the cache is not of this task.
    """
    data: Samples = task.train
    prepare, apart = task.loss.prepare, None
    if validation is not None:
        data, apart = set_apart(task.train, validation.samples, trainer.seed, "validation")
        require(len(apart) > 0, "recover.validation.samples", 0, "at least two training samples, to judge on one")
    if cache is not None:
        data = cached = open_cache(cache, task)
        prepare = cached.prepare
        if isinstance(apart, Part):
            data = without(cached, cached.draws.rows_of(apart.indices))
            require(len(data) > 0, "recover.kd.cache.samples", cache.samples, "more, to train on some")
    return data, prepare, apart
