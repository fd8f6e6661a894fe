"""What a step waits for, and what it sends to a device: counted on a device that is not there."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import tinyfusion_core as tiny
from far_device import FAR, FarDevice, far_away
from marks import slow_but
from small_run import digits_task
from tinyfusion_core.protocols.blocks.rows import moved, split_rows
from tinyfusion_core.samplers.constraints import Rules
from tinyfusion_core.samplers.subset import GumbelTopK, ScoreFunction
from tinyfusion_core.training.steps.agreement import fingerprint

FEW, MORE = 2, 5
SEARCHES = {
    "score function": {"keep": 4},
    "score function, LoRA": {"keep": 4, "update": tiny.LoRA()},
    "control variate": {"sampler": partial(ScoreFunction, rules=Rules(keep=4), control=True)},
    "top k": {"sampler": partial(GumbelTopK, keep=4)},
    "groups": {"pattern": [1, 2]},
}


def trained(monkeypatch: pytest.MonkeyPatch, train: Any, steps: int) -> FarDevice:
    """A training on the far device, the tasks and all it needs made before."""
    task = digits_task()
    assert task.teacher is not None
    with far_away(monkeypatch) as device:
        train(task, tiny.Trainer(batch_size=4, precision="fp32"), steps)
    return device


def per_step(monkeypatch: pytest.MonkeyPatch, train: Any) -> tuple[Counter[str], Counter[str]]:
    """What more steps wait for and send, by where; of each step."""
    few, more = (trained(monkeypatch, train, steps) for steps in (FEW, MORE))
    return more.waits - few.waits, more.sent - few.sent


@pytest.mark.parametrize("name", slow_but(SEARCHES, "control variate", "groups"))
def test_a_search_waits_twice_a_step_once_with_nothing_to_do(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    waits, sent = per_step(
        monkeypatch,
        lambda task, trainer, steps: tiny.Search(**{"update": tiny.Full(), **SEARCHES[name]}, steps=steps)(
            task, trainer
        ),
    )
    # The report of the step ends it. The next begins with the logits, or the masks made of them: only its update is
    # under way then.
    assert sum(waits.values()) == 2 * (MORE - FEW), waits
    assert {place.split("(")[1] for place in waits} in ({"reduce)", "_subsets)"}, {"reduce)", "set)"})
    assert {place.split("(")[1] for place in sent} == {"to_device)"}, sent  # where it comes from pinned memory


@pytest.mark.parametrize("kd", slow_but([None, tiny.OutputKD(), tiny.MaskedKD()], tiny.MaskedKD()))
def test_a_recovery_waits_once_a_step(monkeypatch: pytest.MonkeyPatch, kd: Any) -> None:
    def recover(task: tiny.Task, trainer: tiny.Trainer, steps: int) -> None:
        decision = tiny.Decision(blocks=tuple(task.blocks), kept=(0, 1, 3, 6), method="any")
        tiny.Recover(steps=steps, ema=0.5, kd=kd)(task, tiny.prune(task, decision), decision, trainer)

    waits, sent = per_step(monkeypatch, recover)
    assert sum(waits.values()) == MORE - FEW, waits
    assert {place.split("(")[1] for place in waits} == {"reduce)"}
    assert {place.split("(")[1] for place in sent} == {"to_device)"}, sent


def test_the_far_device_computes_what_the_host_does(monkeypatch: pytest.MonkeyPatch) -> None:
    def marginals(task: tiny.Task) -> Any:
        return tiny.Search(keep=4, steps=3, lr_gates=0.5)(task, tiny.Trainer(batch_size=4, precision="fp32")).marginals

    here, task = marginals(digits_task()), digits_task()
    assert task.teacher is not None
    with far_away(monkeypatch):
        there = marginals(task)
    assert there == pytest.approx(here, abs=1e-6)
    assert here != pytest.approx([0.5] * 8, abs=1e-2)


def test_rows_of_all_blocks_are_one_transfer() -> None:
    torch.manual_seed(0)
    mask = (torch.rand(16, 28) < 0.5).float()
    mask[:, 3] = 0  # nobody keeps it: its first row runs all the same
    rows = [split_rows(column, torch.ones(16)) for column in mask.unbind(1)]
    with FarDevice() as device:
        found = moved(rows, FAR)
    assert device.sent.total() == 1
    assert not device.waits
    assert [[len(t) for t in block] for block in found] == [[len(t) for t in block] for block in rows]
    assert {t.device for block in found for t in block} == {FAR}
    assert moved(rows, torch.device("cpu")) is rows


@pytest.mark.parametrize("first", [0, 28])
def test_a_fingerprint_waits_for_nothing(first: int) -> None:
    tensors = [torch.randn(3, 4, generator=torch.Generator().manual_seed(j)) for j in range(first, first + 28)]
    with FarDevice() as device:
        there = [t.to(FAR, non_blocking=True) for t in tensors]
        found = fingerprint(there)
        assert not device.waits
        assert found.cpu().tolist() == fingerprint(tensors).tolist() == reference(tensors)


def reference(tensors: list[Tensor]) -> list[float]:
    """The same checksum in whole numbers without bounds."""
    total = sum(
        position * sum(t.contiguous().view(torch.int32).flatten().tolist()) for position, t in enumerate(tensors, 1)
    )
    return [float(total >> shift & 0xFFFF) for shift in (0, 16, 32)]
