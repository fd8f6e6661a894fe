"""Recovery: train a pruned network until its quality is restored. Fresh networks are trained the same way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from ..errors import UserError, require
from ..parsing.settings import Settings, check_arguments
from ..protocols.data import Samples
from ..protocols.task import Task
from ..protocols.undisturbed import evaluating
from ..pruning.decision import Decision
from ..pruning.removal import in_blocks
from ..pruning.weight_update import Full, WeightUpdate, hold_statistics, of_stage
from ..runtime.files import NEUTRAL
from ..runtime.run_folder import RunFolder
from ..runtime.seeding import seed_of
from .depths import at_every_depth
from .distillation import OutputKD
from .distilling.distilled import Distilled, objective_of
from .distilling.own_samples import Prepare, on_policy
from .distilling.shares import Shares
from .loop import Fit
from .objective import (
    Ema,
    LossFunction,
    MakeOptimizer,
    MakeScheduler,
    Objective,
    Optimization,
    cosine,
    ema_decay,
    parameter_groups,
    warmed,
)
from .starts.base import Start
from .starts.fresh import check_fresh
from .steps.optimizers import NamedOptimizer
from .trainer import Trainer
from .validation import Validation, Validator, training_samples


@dataclass(frozen=True, kw_only=True)
class Recover(Settings):
    """Fine-tune with the task's own loss, or with a distillation loss.

    Args:
        kd: distillation from the teacher: `OutputKD`, `MaskedKD` or others; null is plain fine-tuning.
        steps: optimizer updates.
        batch_size: samples per update; default the trainer's.
        lr: learning rate at the start.
        schedule: `cosine` falls to `lr_final`, `constant` stays.
        lr_final: learning rate at the end of the cosine.
        weight_decay: AdamW's weight decay.
        clip: largest norm of the gradient.
        ema: decay of the average of the weights, which is the result; default 1 - 10 / steps, which is the paper's
            0.9999 at 100,000 steps. 0 returns the last weights.
        warmup: fraction of the steps in which the learning rate rises to `lr`.
        gap_lr: factor on the learning rate of the kept blocks beside a removed one.
        validation: judges the network meanwhile on samples that are set apart; the best is the result. With `ema` it is
            the average that is judged.
        update: what moves: `LoRA`, `LastBlocks` or `Matching`, and is merged into the weights in the end; null is
            every weight.
        depths: smaller numbers of blocks at which the student is to work too, each with some of the next one's: every
            step also trains the shallowest and one of the others. `tinyfusion slice` writes them.
        start: what makes up for gaps before the first step: `Refit` or `Fuse`; or `Inherit`, the weights that the
            search has trained. With it `steps` may be 0.
        horizon: updates that the schedule, the warm-up and the default of `ema` are laid out over; those after them
            are as the last of these. Default: `steps`. `tinyfusion run --extend` sets it to the steps there were.
        optimizer: what moves the weights: a class of `torch.optim`, as `Muon`, or `class_path` and `init_args`; default
            AdamW. One of matrices alone gets those of the blocks, and AdamW the rest.
    """

    kd: OutputKD | None = None
    steps: int = 100_000
    batch_size: int | None = None
    lr: float = 2e-4
    schedule: Literal["cosine", "constant"] = "cosine"
    lr_final: float = 1e-4
    weight_decay: float = 0.0
    clip: float = 1.0
    ema: float | None = None
    warmup: float = field(default=0.0, metadata={NEUTRAL: 0.0})
    gap_lr: float = field(default=1.0, metadata={NEUTRAL: 1.0})
    validation: Validation | None = field(default=None, metadata={NEUTRAL: None})
    update: WeightUpdate | None = field(default=None, metadata={NEUTRAL: None})
    depths: Sequence[int] = field(default=(), metadata={NEUTRAL: []})
    start: Start | None = field(default=None, metadata={NEUTRAL: None})
    horizon: int | None = field(default=None, metadata={NEUTRAL: None})
    optimizer: str | dict[str, Any] | None = field(default=None, metadata={NEUTRAL: None})

    def __post_init__(self) -> None:
        stage = "(of recover or train)"
        some = self.steps >= (0 if self.start else 1)
        require(some, f"steps {stage}", self.steps, "at least 1, or 0 with start; null leaves the stage out")
        require(self.horizon is None or self.horizon >= 1, f"horizon {stage}", self.horizon, "at least 1 step, or null")
        require(self.batch_size is None or self.batch_size >= 1, f"batch_size {stage}", self.batch_size, "at least 1")
        require(self.lr > 0, f"lr {stage}", self.lr, "a rate above 0")
        require(self.ema is None or 0 <= self.ema < 1, f"ema {stage}", self.ema, "a decay from 0 to below 1")
        require(0 <= self.warmup < 1, f"warmup {stage}", self.warmup, "a fraction from 0 to below 1")
        require(self.gap_lr > 0, f"gap_lr {stage}", self.gap_lr, "a factor above 0")
        require(self.clip > 0, f"clip {stage}", self.clip, "a norm above 0")
        if self.update is not None and type(self.update).merged is WeightUpdate.merged:
            raise UserError(f"update {stage}: {type(self.update).__name__} leaves nothing in the weights; see LoRA")
        fit = all(d >= 1 for d in self.depths) and len(set(self.depths)) == len(self.depths)
        require(fit, f"depths {stage}", list(self.depths), "numbers of blocks from 1 on, each once")
        require(self.weight_decay >= 0, f"weight_decay {stage}", self.weight_decay, "0 or more")
        falls = self.schedule != "cosine" or 0 <= self.lr_final <= self.lr
        require(falls, f"lr_final {stage}", self.lr_final, f"a rate from 0 to lr, which is {self.lr}")
        if self.optimizer is not None:
            NamedOptimizer(self.optimizer)

    def with_steps(self, steps: int) -> Recover:
        """Return this recovery laid out over another number of steps, for which an average gets the default decay."""
        return replace(self, steps=steps, horizon=None, ema=None if self.ema else self.ema)

    @property
    def on_policy(self) -> float:
        """Share of the steps that learn from samples which the student makes itself."""
        return self.kd.on_policy if self.kd else 0.0

    def check_trainer(self, trainer: Trainer) -> None:
        """Check that these settings go with a trainer.

        Raises:
            UserError: sharded networks are to be judged, trained at several depths or on policy, by whole matrices, or
                from a quantised teacher.
        """
        if self.optimizer and trainer.shards() and not NamedOptimizer(self.optimizer).goes_by_element():
            raise UserError("recover.optimizer: sees whole matrices, which trainer.sharding: fsdp cuts; take ddp")
        whole: dict[str, Any] = {"validation": self.validation, "depths": self.depths, "kd.on_policy": self.on_policy}
        whole["kd.quantise"] = self.kd and self.kd.quantise
        for key in (key for key, given in whole.items() if given):
            if trainer.shards():
                raise UserError(f"recover.{key}: does not go with trainer.sharding: fsdp; take ddp, or leave it out")

    def moving(
        self, student: nn.Module, blocks: Sequence[str], stage: str
    ) -> AbstractContextManager[list[nn.Parameter]]:
        """Make what moves the only weights that are trained, and yield them; what they have learned stays.

        Args:
            student: the network.
            blocks: paths of its blocks.
            stage: name of the stage, for messages.

        Raises:
            UserError: nothing would move.
        """
        return of_stage((self.update or Full()).merged(student, blocks), stage)

    def __call__(
        self,
        task: Task,
        student: nn.Module,
        decision: Decision | None,
        trainer: Trainer,
        run: RunFolder | None = None,
        stage: str = "recover",
        *,
        loss_fn: LossFunction | None = None,
        optimizer: MakeOptimizer | None = None,
        scheduler: MakeScheduler | None = None,
    ) -> nn.Module:
        """Train a network in place.

        Args:
            task: the objective, the data and the teacher.
            student: the network, pruned or fresh.
            decision: how the student was made from the teacher; None for a fresh network, which has none.
            trainer: how to train.
            run: where to log and to keep checkpoints.
            stage: name of the stage, used in random streams and log lines.
            loss_fn: (student, teacher, inputs) -> losses, (batch,), in the place of `kd`. The inputs are what the
                task's loss prepares; the teacher is in eval mode, and nothing of it is trained.
            optimizer: parameter groups, with `lr` and `weight_decay` -> the optimizer, in the place of the one that the
                settings name. Its learning rates are those at the start of the schedule.
            scheduler: (optimizer, `horizon`) -> what sets the learning rates after every update, in the place of
                `schedule`, `lr_final` and `warmup`.

        Returns:
            `student` with its averaged weights, in eval mode.

        Raises:
            UserError: the loss was not finite for too long, or student, decision and teacher do not match.
            Interrupted: a signal arrived; the same call with the same run folder resumes.
        """
        of = {"task": (task, Task), "student": (student, nn.Module), "decision": (decision, Decision | None)}
        own: dict[str, Any] = {"loss_fn": loss_fn, "optimizer": optimizer, "scheduler": scheduler}
        functions = {name: (function, Callable[..., Any] | None) for name, function in own.items()}
        check_arguments(**of, trainer=(trainer, Trainer), run=(run, RunFolder | None), **functions)
        self._check(task, student, decision, loss_fn)
        trainer = trainer.with_batch_size(self.batch_size)
        self.check_trainer(trainer)
        trainer.to_device(student).train()
        if self.start is not None and decision is not None:
            data, _, _ = training_samples(task, trainer, self.validation, None)  # not on those that will judge
            self.start(replace(task, train=data, model=task.teacher), student, decision, trainer, stage, run)
        if self.steps == 0:
            return student.eval()
        with ExitStack() as stack:
            with torch.random.fork_rng():
                if self.update is not None:  # LoRA draws its initial values
                    torch.manual_seed(seed_of(trainer.seed, stage, "update"))
                weights = stack.enter_context(self.moving(student, task.backbone.block_paths(student), stage))
            if self.update is not None:
                hold_statistics(student, weights)
            whole, near = (None, ()) if decision is None else in_blocks(task.backbone, task.teacher, decision)
            objective = objective_of(task, student, whole, trainer, self.kd, loss_fn)
            near_gaps = [objective.blocks[i] for i in near]
            groups = parameter_groups(weights, near_gaps, self.lr, self.gap_lr, self.weight_decay)
            made_by = {name: own[name] for name in ("optimizer", "scheduler") if own[name] is not None}
            if self.optimizer is not None and optimizer is None:
                inside = [p for block in objective.blocks for p in block.parameters()]
                made_by["optimizer"] = partial(NamedOptimizer(self.optimizer), inside=inside)
            self._fit(task, student, decision, trainer, run, stage, objective, {"groups": groups, **made_by})
        return student.eval()

    def _check(self, task: Task, student: nn.Module, decision: Decision | None, loss_fn: LossFunction | None) -> None:
        """Raise UserError if these do not go together."""
        if loss_fn is not None and self.kd is not None:
            raise UserError("loss_fn stands in the place of kd, which the settings have; leave one of them out")
        if loss_fn is not None and decision is None:
            raise UserError("loss_fn compares a student with its teacher; give the decision that it was pruned by")
        if loss_fn is not None and self.depths:
            raise UserError("loss_fn returns losses, and at several depths predictions are compared; leave depths out")
        if decision is None:
            check_fresh(self)
            return
        decision.check_fits(task.blocks, "the task's network")
        if (depth := len(task.backbone.unit_paths(student))) != len(decision.kept):
            raise UserError(f"the decision keeps {len(decision.kept)} blocks, the student has {depth}: give its own")

    def _fit(
        self,
        task: Task,
        student: nn.Module,
        decision: Decision | None,
        trainer: Trainer,
        run: RunFolder | None,
        stage: str,
        objective: Objective,
        optimizing: Mapping[str, Any],
    ) -> None:
        """Train the student, by what the optimization takes; its weights become their average, if there is one."""
        cache = self.kd.cache if self.kd else None
        data, prepare, apart = training_samples(task, trainer, self.validation, cache)
        decay = ema_decay(stage, self.steps, self.ema, self.horizon)
        ema = Ema(student, decay) if decay else None
        averaged = ema.average.module if ema else None  # copied before the blocks' forward is taken over
        optimization = self._optimization(ema, optimizing)
        made = on_policy(self.kd, task, student, trainer, prepare)
        self._compare_terms(objective, trainer, data, prepare, made)
        frozen = objective.frozen_modules()
        # Of several depths what the gates enclose: inside of what is recomputed no mask may change.
        own = [student.get_submodule(p) for p in task.backbone.unit_paths(student)] if self.depths else objective.blocks
        blocks = [*own, *(block for _, blocks in frozen for block in blocks)]
        several = at_every_depth(objective, task, student, decision, self.depths)
        with evaluating(*(n for n, _ in frozen)), trainer.transformed(blocks), several as objective:
            for network, _ in frozen:
                network.requires_grad_(False)  # until it has left its evaluation
            validator = self._validator(task, averaged or student, decision, trainer, apart)
            Fit(trainer, stage, objective, data, made, optimization, run, validator).run()
        if validator is not None:
            validator.load_best(student)
        elif averaged is not None:
            student.load_state_dict(averaged.state_dict())

    def _validator(
        self, task: Task, model: nn.Module, decision: Decision | None, trainer: Trainer, apart: Samples | None
    ) -> Validator | None:
        if self.validation is None or apart is None:
            return None
        # A fresh network has no teacher, and a cache keeps it out of memory.
        teacher_here = decision is not None and not (self.kd and self.kd.cache)
        return self.validation.validator(model, task, apart, trainer, beside=teacher_here)

    def _compare_terms(
        self, objective: Objective, trainer: Trainer, data: Samples, prepare: Prepare, made: Prepare
    ) -> None:
        """Let a distillation log what its terms do, where one whole network is in one place."""
        if isinstance(objective, Distilled) and not (trainer.shards() or self.depths):
            objective.shares = Shares.on(trainer, data, made if self.on_policy == 1 else prepare)

    def _optimization(self, ema: Ema | None, optimizing: Mapping[str, Any]) -> Optimization:
        schedule = cosine(self.lr_final / self.lr) if self.schedule == "cosine" else lambda progress: 1.0
        schedule = warmed(schedule, self.horizon or self.steps, self.warmup)
        settings = {"steps": self.steps, "horizon": self.horizon, "clip": self.clip, **optimizing}
        return Optimization(schedule=schedule, ema=ema, **settings)
