"""Predicts how much memory a stage needs on every device, before anything is loaded.

Activations have no closed formula: the stage's own forward pass runs on fake tensors, which have shapes and storages
but no memory, and what autograd saves for the backward pass is added up, each storage once.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from ...errors import first_line
from ...protocols.backbone import Backbone, Batch
from ...protocols.blocks.batch import BatchDim, named_batch_dims, probed_batch_dims
from ...protocols.blocks.paths import list_lengths
from ...protocols.loss import LossAdapter
from ...protocols.task import Task
from ...pruning.decision import Decision
from ...pruning.gating import Gates
from ...pruning.weight_update import of_stage
from ...runtime.seeding import Rng
from ...selection.search import Search
from ...training.distillation import OutputKD
from ...training.distilling.distilled import Distilled
from ...training.distilling.quantised import num_bytes, quantised
from ...training.recover import Recover
from ...training.teacher_cache.settings import PREFIX
from ...training.teacher_cache.writing import kept_of
from ...training.trainer import Trainer
from .activations import Saved, saved_by
from .amounts import gigabytes


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How a stage is distributed over devices.

    Attributes:
        batch_size: samples per update, over all devices.
        devices: number of devices.
        sharding: `ddp` keeps everything on every device, `fsdp` a share of it.
        micro_batch_size: samples per forward pass and device; None: its whole share of the batch.
        checkpointing: whether the blocks' activations are recomputed in the backward pass.
        precision: precision of the autocast.
    """

    batch_size: int
    devices: int = 1
    sharding: Literal["ddp", "fsdp"] = "ddp"
    micro_batch_size: int | None = None
    checkpointing: bool = False
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"

    @classmethod
    def of(cls, trainer: Trainer, devices: int) -> Setup:
        """Return the setup of a trainer.

        Raises:
            UserError: its batch cannot be split over so many devices.
        """
        trainer.split(devices)
        return cls(
            batch_size=trainer.batch_size,
            devices=devices,
            sharding=trainer.sharding,
            micro_batch_size=trainer.micro_batch_size,
            checkpointing=trainer.activation_checkpointing,
            precision=trainer.precision,
        )

    @property
    def rows(self) -> int:
        """Samples per forward pass and device."""
        share = -(-self.batch_size // self.devices)
        return share if self.micro_batch_size is None else min(share, self.micro_batch_size)


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Bytes on every device.

    Attributes:
        parameters: weights and buffers of what is trained, and of the network around it.
        gradients: gradients of the trained weights.
        optimizer: AdamW's two moments.
        ema: the averaged copy.
        teacher: weights of the teacher.
        communication: DDP's buckets, or what FSDP has gathered at one time.
        start: what is there at most while the start of a recovery works, before the rest is; its passes do not count.
        activations: saved activations; None if they cannot be counted.
        dense: for a search, the activations of the dense formula instead.
        rows: samples per forward pass and device.
        note: why activations cannot be counted.
    """

    parameters: int
    gradients: int
    optimizer: int
    ema: int = 0
    teacher: int = 0
    communication: int = 0
    start: int = 0
    activations: Saved | None = None
    dense: Saved | None = None
    rows: int = 1
    note: str = ""

    def total(self, checkpointing: bool) -> int:
        """Return the sum, without temporary buffers of kernels, fragmentation and the driver's context."""
        fixed = self.parameters + self.gradients + self.optimizer + self.ema + self.teacher + self.communication
        return max(self.start, fixed + (_chosen(self.activations, checkpointing) if self.activations else 0))

    def describe(self, setup: Setup) -> str:
        """Return one line for the plan."""
        names = ("parameters", "gradients", "optimizer", "ema", "teacher", "communication")
        parts = [f"{name} {gigabytes(getattr(self, name))}" for name in names if getattr(self, name)]
        if self.activations is None:
            parts.append(f"activations cannot be counted ({self.note})")
        else:
            others = (
                [] if self.dense is None else [f"dense gating {gigabytes(_chosen(self.dense, setup.checkpointing))}"]
            )
            other = "without" if setup.checkpointing else "with"
            change = _chosen(self.activations, not setup.checkpointing)
            others.append(f"{other} activation checkpointing {gigabytes(change)}")
            parts.append(
                f"activations {gigabytes(_chosen(self.activations, setup.checkpointing))} ({', '.join(others)})"
            )
        if self.start:
            parts.append(f"before that its start, beside its passes up to {gigabytes(self.start)}")
        where = f"each of {setup.devices} devices ({setup.sharding})" if setup.devices > 1 else "1 device"
        total = gigabytes(self.total(setup.checkpointing))
        return f"{total} on {where}, {self.rows} samples at once: {', '.join(parts)}"


def search_needs(backbone: Backbone, loss: LossAdapter, model: nn.Module, search: Search, setup: Setup) -> Needs:
    """Return what a learned search needs: the gated network with its weight update, under sampled masks.

    Args:
        backbone: the model family.
        loss: the objective.
        model: the network, on the meta device.
        search: the search.
        setup: how it is distributed.
    """
    blocks, streams = backbone.unit_paths(model), backbone.unit_streams(model)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    sampler = search.make_sampler(list_lengths(blocks))
    rows = setup.rows * sampler.masks_per_sample
    inputs = _inputs(backbone, loss, 1)
    mask = sampler.sample(rows, Rng(0, "plan", 0)).mask
    mask = mask.detach().requires_grad_(mask.requires_grad)
    everywhere = torch.ones_like(mask).requires_grad_()

    def gated(mask: Tensor) -> Tensor:
        with Gates(network, blocks, dims, streams, backbone.unneeded) as gates:
            with unset_fake_temporarily():  # which rows are kept is a matter of values
                gates.set(mask, torch.zeros_like(mask))  # dropped rows keep nothing, so they need not be run
            return loss.losses(network, _fake(inputs, rows))

    note = ""
    try:
        dims = _batch_dims(backbone, loss, model, blocks)
    except NotImplementedError as e:  # an operation without a meta kernel
        note = f"{type(e).__name__}: {first_line(e)}"
    planned = copy.deepcopy(model)
    with of_stage(search.update.applied(planned.train(), backbone.block_paths(model)), "search"), mode:
        network = _faked(planned)
        needs = _spread(setup, network, blocks)
        if note:
            return replace(needs, rows=setup.rows, note=note)
        try:
            sparse, dense = (
                saved_by(functools.partial(gated, m), network, blocks, setup.precision) for m in (mask, everywhere)
            )
        except (RuntimeError, NotImplementedError) as e:
            return replace(needs, rows=setup.rows, note=f"{type(e).__name__}: {first_line(e)}")
    return replace(needs, activations=sparse, dense=dense, rows=setup.rows)


def training_needs(
    backbone: Backbone,
    loss: LossAdapter,
    student: nn.Module,
    recover: Recover,
    setup: Setup,
    teacher: nn.Module | None = None,
    decision: Decision | None = None,
) -> Needs:
    """Return what a training needs: a recovery, with its teacher if it has one, or the training of a fresh network.

    Args:
        backbone: the model family.
        loss: the objective.
        student: the network to train, on the meta device.
        recover: the training.
        setup: how it is distributed.
        teacher: the teacher, on the meta device.
        decision: how the student was made from the teacher.
    """
    inputs = _inputs(backbone, loss, 1)
    blocks = backbone.block_paths(student)
    planned = copy.deepcopy(student).train()
    with recover.moving(planned, blocks, "recover"), FakeTensorMode(allow_non_fake_inputs=True):
        network = _faked(planned)
        needs = _spread(setup, network, blocks)
        if recover.ema != 0:
            needs = replace(needs, ema=needs.parameters)
        forward: Callable[[], Any] = lambda: loss.losses(network, _fake(inputs, setup.rows)).mean()  # noqa: E731
        if recover.start is not None and teacher is not None and decision is not None:
            held = recover.start.planned(Task.without_data(backbone, loss, teacher), decision)[1]
            both = (t for model in (student, teacher) for t in (*model.parameters(), *model.buffers()))
            needs = replace(needs, start=num_bytes(both) + held)
        if recover.kd is not None and teacher is not None and decision is not None:
            task, stored = Task.without_data(backbone, loss, _faked(teacher).requires_grad_(False)), {}
            if (cache := recover.kd.cache) is not None:
                with torch.no_grad():
                    kept = kept_of(task, task.teacher, _fake(inputs, setup.rows), cache.blocks)
                stored = {PREFIX + name: t for name, t in kept.items()}
            else:
                theirs = _of_teacher(setup, teacher, recover.kd, backbone.block_paths(teacher))
                communication = needs.communication + theirs.communication
                needs = replace(needs, teacher=theirs.parameters, communication=communication)
            distilled = Distilled(network, task, decision, recover.kd)
            own = recover.on_policy == 1  # they are made before anything is saved
            forward = lambda: distilled.minimised({**_fake(inputs, setup.rows), **stored}, own).mean()  # noqa: E731
        try:
            activations = saved_by(forward, network, blocks, setup.precision)
        except (RuntimeError, NotImplementedError) as e:
            return replace(needs, rows=setup.rows, note=f"{type(e).__name__}: {first_line(e)}")
    if recover.depths:  # the passes of a step are kept until one backward: two of shallower students, at most
        shallowest, *others = sorted(recover.depths)
        share = 1 + (shallowest + max(others, default=0)) / len(backbone.unit_paths(student))
        activations = Saved(round(share * activations.whole), round(share * activations.checkpointed))
    return replace(needs, activations=activations, rows=setup.rows)


def _spread(setup: Setup, model: nn.Module, blocks: Sequence[str]) -> Needs:
    """Weights, gradients and moments on every device."""
    moving = num_bytes(p for p in model.parameters() if p.requires_grad)
    weights = num_bytes((*model.parameters(), *model.buffers()))
    if setup.sharding == "ddp" or setup.devices == 1:
        buckets = moving if setup.devices > 1 else 0
        return Needs(parameters=weights, gradients=moving, optimizer=2 * moving, communication=buckets)
    of_blocks = [num_bytes(model.get_submodule(path).parameters()) for path in blocks]
    # One block is in use while the next one is gathered; what stands outside of the blocks stays gathered.
    gathered = weights - sum(of_blocks) + 2 * max(of_blocks)
    share = [-(-size // setup.devices) for size in (weights, moving, 2 * moving)]
    return Needs(parameters=share[0], gradients=share[1], optimizer=share[2], communication=gathered)


def _of_teacher(setup: Setup, teacher: nn.Module, kd: OutputKD, blocks: Sequence[str]) -> Needs:
    """Weights of the teacher that answers, on every device."""
    with unset_fake_temporarily():
        answers = copy.deepcopy(teacher) if kd.quantise is None else quantised(teacher, kd.quantise)
        return _spread(setup, answers.requires_grad_(False), blocks)


def _inputs(backbone: Backbone, loss: LossAdapter, rows: int) -> Batch:
    return loss.prepare(backbone.example(rows), Rng(0, "plan"))


def _batch_dims(backbone: Backbone, loss: LossAdapter, model: nn.Module, blocks: Sequence[str]) -> BatchDim:
    if backbone.batched is not None:
        return named_batch_dims(backbone.batched)

    def run(num_rows: int) -> None:
        inputs = _inputs(backbone, loss, num_rows)
        loss.predict(model, {name: t.to("meta") for name, t in inputs.items()})

    return probed_batch_dims(model.eval(), blocks, run)


def _faked(model: nn.Module) -> nn.Module:
    """A copy on a fake CPU, whose kernels, unlike the meta device's, are those of a real one; in a fake mode."""
    copies: dict[int, Any] = {}  # in place of `to_empty`, which cannot replace a tensor that has weak references
    for t in (*model.parameters(), *model.buffers()):
        made = torch.empty_like(t, device="cpu")
        copies[id(t)] = nn.Parameter(made, t.requires_grad) if isinstance(t, nn.Parameter) else made
    return copy.deepcopy(model, copies)


def _fake(inputs: Batch, rows: int) -> Batch:
    """Inputs of this many rows like the first of these, without memory; in a fake mode."""
    return {name: torch.empty((rows, *t.shape[1:]), dtype=t.dtype) for name, t in inputs.items()}


def _chosen(saved: Saved, checkpointing: bool) -> int:
    return saved.checkpointed if checkpointing else saved.whole
