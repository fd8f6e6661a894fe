"""Whatever looks at a network leaves it as it was: a stranger's network with running statistics, in training mode."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tinyfusion_core as tiny
from planted_search import TRAINER
from tinyfusion_core.evaluation.evaluate import evaluate
from tinyfusion_core.testing.small_network import changes, modes_of, values_of


class Normed(nn.Module):
    """x + BatchNorm(tanh(Linear(x)))."""

    def __init__(self, track: bool = True) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8, track_running_stats=track)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(torch.tanh(self.linear(x)))


class Stack(nn.Module):
    def __init__(self, block: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(block() for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def wrapped(model: nn.Module, **how: Any) -> tiny.Task:
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    loss = lambda model, batch: (model(batch["x"]) - batch["y"]).square().mean(1)  # noqa: E731
    return tiny.wrap(model, **{"blocks": "layers.*", "loss_fn": loss, "data": {"x": x, "y": x.roll(1, 1)}, **how})


@pytest.fixture
def model() -> nn.Module:
    """Half of it is in training mode, one weight is frozen, and a gradient waits for its step."""
    model = Stack(Normed)
    model.train()
    model.layers[1].eval()
    model.layers[2].linear.weight.requires_grad_(False)
    model(torch.randn(16, 8)).sum().backward()
    return model


def task_with_nan(task: tiny.Task) -> tiny.Task:
    loss = lambda model, batch: model(batch["x"]).square().mean(1) * torch.nan  # noqa: E731
    return wrapped(task.teacher, loss_fn=loss)


def recovered(task: tiny.Task) -> None:
    decision = tiny.Uniform(keep=3)(task, TRAINER)
    tiny.Recover(steps=3)(task, tiny.prune(task, decision), decision, TRAINER)


STAGES: dict[str, Callable[[tiny.Task], object]] = {
    "search with LoRA": lambda task: tiny.Search(keep=3, steps=4)(task, TRAINER),
    "search with all weights": lambda task: tiny.Search(keep=3, steps=4, update=tiny.Full())(task, TRAINER),
    "search with frozen weights": lambda task: tiny.Search(keep=3, steps=4, update=tiny.Frozen())(task, TRAINER),
    "search of groups": lambda task: tiny.Search(pattern=(1, 2), steps=4)(task, TRAINER.with_batch_size(2)),
    "search that fails": lambda task: tiny.Search(keep=3, steps=100)(task_with_nan(task), TRAINER),
    **{
        kind.__name__: lambda task, kind=kind: kind(keep=3)(task, TRAINER)
        for kind in (tiny.Greedy, tiny.LeaveOneOut, tiny.Taylor, tiny.BlockInfluence, tiny.SpanSimilarity)
    },
    "finals": lambda task: tiny.Finals(search=tiny.Search(keep=3, steps=2), masks=2, steps=2)(task, TRAINER),
    "race": lambda task: tiny.Race(keep=3, steps=32)(task, TRAINER),
    "recovery": recovered,
    "evaluation": lambda task: evaluate(task, {"teacher": task.teacher}, [tiny.HeldOutLoss()], TRAINER),
    "wrap": lambda task: None,
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_leaves_the_network_as_it_was(stage: str, model: nn.Module) -> None:
    values, modes, grads = values_of(model), modes_of(model), {n: p.grad for n, p in model.named_parameters()}
    kept = {n: None if g is None else g.clone() for n, g in grads.items()}
    state = torch.get_rng_state()
    task = wrapped(model)
    torch.set_rng_state(state)
    fails = stage == "search that fails"
    with pytest.raises(tiny.UserError, match="not finite") if fails else nullcontext():
        STAGES[stage](task)
    assert torch.equal(torch.get_rng_state(), state), f"{stage} draws from the global generator"
    assert changes(modes, modes_of(model)) == []
    after = values_of(model)
    assert after.keys() == values.keys()
    assert [name for name in values if not torch.equal(after[name], values[name])] == []
    for name, p in model.named_parameters():
        assert p.grad is grads[name] and (p.grad is None or torch.equal(p.grad, kept[name]))


def test_a_batch_norm_without_running_statistics_is_refused_before_the_search() -> None:
    task = wrapped(Stack(lambda: Normed(track=False)))
    with pytest.raises(tiny.UserError, match=r"'layers\.0\.norm' is a batch norm without running statistics"):
        tiny.Search(keep=3, steps=2)(task, TRAINER)


def test_an_exception_while_lora_wraps_the_layers_leaves_the_network(model: nn.Module, monkeypatch) -> None:
    import peft

    class Stop(BaseException):
        pass

    wrap = peft.LoraModel._create_and_replace
    calls = []

    def stop_in_the_middle(self, *args, **kwargs):
        wrap(self, *args, **kwargs)
        calls.append(1)
        if len(calls) == 3:
            raise Stop

    monkeypatch.setattr(peft.LoraModel, "_create_and_replace", stop_in_the_middle)
    values, modes = values_of(model), modes_of(model)
    with pytest.raises(Stop):
        tiny.Search(keep=3, steps=2)(wrapped(model), TRAINER)
    assert len(calls) == 3 and changes(modes, modes_of(model)) == [] and values_of(model).keys() == values.keys()


class Remembering(Normed):
    """Keeps its last output, as recurrent layers do, with the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.last = super().forward(x)
        return self.last


def test_what_layers_remember_of_a_search_does_not_stay() -> None:
    x = torch.randn(64, 8)
    model = Stack(Remembering)
    loss = lambda network, batch: network(batch["x"]).square().mean(1)  # noqa: E731
    task = tiny.wrap(model, blocks="layers.*", loss_fn=loss, data={"x": x})
    decision = tiny.Search(keep=4, steps=2)(task, TRAINER)
    assert [layer.last for layer in model.layers] == [None] * 6
    assert len(tiny.prune(task, decision).layers) == 4  # copies it
