"""Walks over a few states: a network that can write its own, in milliseconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tinyfusion_core as tiny
from tinyfusion_core.protocols.data import Tensors
from tinyfusion_core.runtime.seeding import Rng, generator
from toys import Planted

STATES, LENGTH = 8, 6


@dataclass(frozen=True)
class Walker(Planted):
    """A chain that reads states and foretells the next one."""

    def example(self, num_rows: int) -> dict[str, Tensor]:
        return {"x": torch.zeros(num_rows, LENGTH, dtype=torch.long)}


@dataclass(frozen=True)
class Walk(tiny.LossAdapter):
    """Cross-entropy of the next state; the distance is KL(student || teacher)."""

    def predict(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        return logits(model, inputs["x"])

    def loss(self, prediction: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        losses = F.cross_entropy(prediction[:, :-1].flatten(0, 1), inputs["x"][:, 1:].flatten(), reduction="none")
        return losses.view(len(prediction), -1).mean(1)

    def distance(self, student: Tensor, teacher: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        q, p = student.log_softmax(-1), teacher.log_softmax(-1)
        return (q.exp() * (q - p)).sum(-1).mean(1)

    def generated(self, model: nn.Module, batch: tiny.Batch, conditions: str, rng: Rng) -> dict[str, Tensor]:
        assert not model.training
        assert not torch.is_grad_enabled()
        walk = batch["x"][:, :1]
        for step in range(1, LENGTH):
            below = logits(model, walk[:, -1]).double().softmax(-1).cumsum(-1)
            u = rng.uniform(f"state {step}", len(walk))
            walk = torch.cat([walk, (below < u[:, None]).sum(-1, keepdim=True).clamp(max=STATES - 1)], 1)
        return {"x": walk}


def logits(model: nn.Module, states: Tensor) -> Tensor:
    """(..., states) of states (...): what the network makes of the state that comes next in a circle."""
    return 3 * model(F.one_hot((states + 1) % STATES, STATES).float())


def task(states: int = STATES) -> tiny.Task:
    """Walks that only see the first of the states."""
    x = torch.randint(states, (64, LENGTH), generator=generator("walks"))
    return tiny.Task(backbone=Walker(), loss=Walk(), train=Tensors({"x": x}), held_out=Tensors({"x": x}))


def decision(work: tiny.Task) -> tiny.Decision:
    return tiny.Decision(blocks=tuple(work.blocks), kept=(1, 4), method="Keep")
