"""The one training loop."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import forks
import tinyfusion_core as tiny
from tinyfusion_core.pruning.removal import remove_blocks
from tinyfusion_core.training.objective import cosine, ema_decay
from toys import Match, Planted, StopAt, planted_data

TRAINER = tiny.Trainer(batch_size=16, precision="fp32", seed=0, checkpoint_every=7)


def task(**options) -> tiny.Task:
    return tiny.Task(backbone=Planted(), loss=Match(), train=planted_data(), held_out=planted_data(16), **options)


def student(kept=(1, 3, 4)) -> nn.Module:
    """A chain that lost a block which does some of the work."""
    model = Planted().build()
    remove_blocks(Planted(), model, [f"blocks.{i}" for i in range(8) if i not in kept])
    return model


def test_recovery_lowers_the_loss_and_returns_the_average(tmp_path: Path) -> None:
    run = tiny.RunFolder(tmp_path)
    model = tiny.Recover(steps=200, lr=1e-2, lr_final=1e-4)(task(), student(), None, TRAINER, run)
    losses = [e["loss"] for e in run.metrics("recover")]
    assert losses[-1] < 0.3 * losses[0]
    assert not model.training
    last = tiny.Recover(steps=200, lr=1e-2, lr_final=1e-4, ema=0)(task(), student(), None, TRAINER)
    assert not torch.equal(last.blocks[0].linear.weight, model.blocks[0].linear.weight)
    assert torch.allclose(last.blocks[0].linear.weight, model.blocks[0].linear.weight, atol=0.1)


def test_the_average_weighs_the_past_by_its_decay() -> None:
    # Two steps: after the first the average is the weights, after the second decay * first + (1 - decay) * second.
    first = tiny.Recover(steps=1, lr=1e-2, schedule="constant", ema=0)(task(), student(), None, TRAINER)
    second = tiny.Recover(steps=2, lr=1e-2, schedule="constant", ema=0)(task(), student(), None, TRAINER)
    average = tiny.Recover(steps=2, lr=1e-2, schedule="constant", ema=0.4)(task(), student(), None, TRAINER)
    for a, b, c in zip(first.parameters(), second.parameters(), average.parameters(), strict=True):
        assert torch.allclose(c, 0.4 * a + 0.6 * b, atol=1e-6)
    assert ema_decay("recover", 10_000) == pytest.approx(0.999)
    assert ema_decay("recover", 100_000) == pytest.approx(0.9999)
    assert ema_decay("recover", 5) == 0
    assert ema_decay("recover", 150, 0.99) == 0.99
    with pytest.warns(UserWarning, match=r"Recover.ema: 0.9999 averages over the last 10,000 steps, and there are 150"):
        assert ema_decay("recover", 150, 0.9999) == 0.9999


def test_the_learning_rate_follows_its_schedule(tmp_path: Path) -> None:
    trainer = tiny.Trainer(batch_size=4, precision="fp32", log_every=1)
    tiny.Recover(steps=5, lr=2e-4, lr_final=1e-4)(task(), student(), None, trainer, run := tiny.RunFolder(tmp_path))
    rates = [e["lr"][0] for e in run.metrics("recover")]
    assert rates[0] == pytest.approx(2e-4)
    assert rates[2] == pytest.approx(1.5e-4)
    assert rates[4] == pytest.approx(1e-4)
    assert cosine(0.5)(0.25) == pytest.approx(0.5 + 0.5 * 0.5 * (1 + 2**-0.5))


def test_reading_in_other_processes_changes_nothing() -> None:
    models = [
        tiny.Recover(steps=6, lr=1e-2)(
            task(), student(), None, tiny.Trainer(batch_size=16, precision="fp32", num_workers=workers)
        )
        for workers in (0, 2)
    ]
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_stop_request_finishes_the_step_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    recover = tiny.Recover(steps=30, lr=1e-2)
    whole = recover(task(), student(), None, TRAINER, whole_run := tiny.RunFolder(tmp_path / "whole"))
    run = tiny.RunFolder(tmp_path / "stopped")
    stopping = tiny.Task(backbone=Planted(), loss=StopAt(), train=planted_data(), held_out=planted_data(16))
    with pytest.raises(KeyboardInterrupt, match="stopped at step 12 of 30 of recover") as caught:
        recover(stopping, student(), None, TRAINER, run)
    assert caught.value.signum == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with (run / "metrics.jsonl").open("a") as file:  # a line beyond the checkpoint, and one cut short
        file.write(json.dumps({"stage": "recover", "step": 20, "loss": 9.0}) + '\n{"stage": "rec')
    resumed = recover(task(), student(), None, TRAINER, run)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)

    def lines(folder: tiny.RunFolder) -> list[dict]:
        return [{k: v for k, v in e.items() if k != "seconds"} for e in folder.metrics()]

    assert lines(run) == lines(whole_run)


class Noisy(nn.Module):
    """A block with dropout: the only thing that draws from the global generator."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))])

    def forward(self, x):
        return x + self.blocks[0](x)


def test_dropout_resumes_bit_for_bit_too(tmp_path: Path) -> None:
    def fresh() -> nn.Module:
        torch.manual_seed(2)
        return Noisy()

    recover = tiny.Recover(steps=30, lr=1e-2)
    whole = recover(task(), fresh(), None, TRAINER)
    run = tiny.RunFolder(tmp_path)
    stopping = tiny.Task(backbone=Planted(), loss=StopAt(), train=planted_data(), held_out=planted_data(16))
    with pytest.raises(KeyboardInterrupt):
        recover(stopping, fresh(), None, TRAINER, run)
    torch.manual_seed(77)
    resumed = recover(task(), fresh(), None, TRAINER, run)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_bf16_runs_and_keeps_weights_and_gates_in_float32(tmp_path: Path) -> None:
    # In a process of its own: accelerate holds one precision for each process.
    code = """
import torch, tinyfusion_core as tiny
from toys import Match, Planted, planted_data
task = tiny.Task(backbone=Planted(), loss=Match(), train=planted_data(), held_out=planted_data(16))
search = tiny.Search(pattern=(4, 8), steps=60, lr_gates=2e-2)
decision = search(task, tiny.Trainer(batch_size=16, precision="bf16"))
assert list(decision.kept) == [1, 3, 4, 7], decision
assert {p.dtype for p in task.teacher.parameters()} == {torch.float32}
"""
    (tmp_path / "in_bf16.py").write_text(code)
    started = forks.start(partial(forks.script, tmp_path / "in_bf16.py"), tmp_path / "log")
    assert forks.wait(started) == [0], (tmp_path / "log").read_text()


def test_a_batch_that_cannot_be_split_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = tiny.Trainer(batch_size=3, precision="fp32")
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", property(lambda self: 2))
    with pytest.raises(tiny.UserError, match=r"batch_size: 3 cannot be split over 2 processes"):
        tiny.Recover(steps=1)(task(), student(), None, trainer)


def test_a_training_whose_last_step_is_not_finite_fails() -> None:
    class LastIsNan(Match):
        steps = 0

        def loss(self, prediction: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
            self.steps += 1
            return super().loss(prediction, inputs) * (torch.nan if self.steps == 5 else 1)

    work = task()
    work.loss = LastIsNan()
    with pytest.raises(tiny.UserError, match="not finite in 1 steps"):
        tiny.Recover(steps=5)(work, student(), None, TRAINER)
