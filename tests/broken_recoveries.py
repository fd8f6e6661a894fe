"""Weight updates, distillation losses and starts with one defect each, which a check of the kit notices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn

import tinyfusion_core as tiny


class ForgetsBuffers(tiny.WeightUpdate):
    """Brings parameters back, and no buffers."""

    @contextmanager
    def applied(self, model: nn.Module, blocks: Sequence[str]) -> Iterator[list[nn.Parameter]]:
        with tiny.Full().applied(model, blocks) as weights:
            yield weights
        for buffer in model.buffers():
            buffer.add_(1)


class ForgetsAfterAnException(tiny.WeightUpdate):
    @contextmanager
    def applied(self, model: nn.Module, blocks: Sequence[str]) -> Iterator[list[nn.Parameter]]:
        original = {name: t.clone() for name, t in model.state_dict().items()}
        yield [p for p in model.parameters() if p.requires_grad]
        model.load_state_dict(original)
        model.zero_grad()


class LeavesModules(tiny.WeightUpdate):
    @contextmanager
    def applied(self, model: nn.Module, blocks: Sequence[str]) -> Iterator[list[nn.Parameter]]:
        model.get_submodule(blocks[0]).register_forward_pre_hook(lambda *_: None)
        with tiny.Full().applied(model, blocks) as weights:
            yield weights


class YieldsAPart(tiny.WeightUpdate):
    @contextmanager
    def applied(self, model: nn.Module, blocks: Sequence[str]) -> Iterator[list[nn.Parameter]]:
        with tiny.Full().applied(model, blocks) as weights:
            yield weights[:-1]


class BeginsElsewhere(tiny.WeightUpdate):
    @contextmanager
    def applied(self, model: nn.Module, blocks: Sequence[str]) -> Iterator[list[nn.Parameter]]:
        with tiny.Full().applied(model, blocks) as weights:
            with torch.no_grad():
                weights[0].add_(1)
            yield weights


class ForgetsInTheEnd(tiny.LoRA):
    def merged(self, model: nn.Module, blocks: Sequence[str]) -> AbstractContextManager[list[nn.Parameter]]:
        return self.applied(model, blocks)


class StandsStillAfterwards(tiny.LoRA):
    @contextmanager
    def merged(self, model: nn.Module, blocks: Sequence[str]) -> Iterator[list[nn.Parameter]]:
        yield [*model.get_submodule(blocks[0]).parameters()]
        model.get_submodule(blocks[0]).requires_grad_(False)


class BeyondTheEnd(tiny.OutputKD):
    def taps_for(self, decision: tiny.Decision) -> list[tuple[int, int]]:
        return [(len(decision.blocks) - 1, len(decision.blocks) - 1)]


class Divided(tiny.MaskedKD):
    """Its terms are not finite."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "alpha_kd", float("inf"))


class Freezes(tiny.Start):
    def __call__(self, task: tiny.Task, student: nn.Module, *_: object) -> None:
        student.get_submodule("first").requires_grad_(False)


class DrawsWeights(tiny.Start):
    def __call__(self, task: tiny.Task, student: nn.Module, *_: object) -> None:
        with torch.no_grad():
            student.get_parameter("last.weight").copy_(torch.randn(4, 4))
