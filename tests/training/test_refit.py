"""The start in closed form: the layer before a gap is refitted to what has gone."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tinyfusion_core as tiny
from diffusers_tasks import make
from llm_toys import folder
from llm_toys import task_of as language_task
from marks import slow_but
from small_run import digits_task, run
from starting import TRAINER, loss_of, recipe_at, started
from tinyfusion_core.protocols.blocks.streams import Stream
from tinyfusion_core.training.starts.least_squares import LeastSquares
from tinyfusion_core.training.starts.output_layer import BlockCall, output_layers
from toys import LinearNet, learning_back

pytestmark = pytest.mark.numerics
SMALL = tiny.Refit(samples=64, batch_size=16)


@pytest.mark.parametrize("num_gates", [1, 4])
@pytest.mark.parametrize("ridge", [1e-3, 0.5])
def test_the_map_is_that_of_numpy(num_gates: int, ridge: float) -> None:
    draw = torch.Generator().manual_seed(0)
    features, target = torch.randn(4, 30, 5, generator=draw), torch.randn(4, 30, 3, generator=draw)
    gates = torch.randn(4, 3, generator=draw)[[0] * 4 if num_gates == 1 else [0, 1, 2, 3]]
    fit = LeastSquares()
    for sample in zip(features, target, gates, strict=True):
        fit.add(*sample)
    found = fit.solve(ridge)
    for c in range(3):  # by least squares on rows that are scaled, and on those of the ridge below them
        scaled = (features.double() * gates[:, None, c : c + 1]).flatten(0, 1).numpy()
        size = np.sqrt(ridge * np.square(scaled).sum() / 5)
        rows = np.concatenate([scaled, size * np.eye(5)])
        wanted = np.concatenate([target[..., c].double().flatten().numpy(), np.zeros(5)])
        expected = np.linalg.lstsq(rows, wanted, rcond=None)[0]
        np.testing.assert_allclose(found[c].numpy(), expected, rtol=1e-9, atol=1e-12)


def test_a_closed_gate_asks_for_nothing() -> None:
    fit = LeastSquares()
    fit.add(torch.randn(6, 2), torch.randn(6, 3), torch.tensor([1.0, 0.0, 1.0]))
    assert torch.equal(fit.solve(0.1)[1], torch.zeros(2, dtype=torch.float64))
    fit.add(torch.zeros(6, 2), torch.randn(6, 3), torch.tensor([2.0, 0.0, 1.0]))
    assert fit.solve(0.1).isfinite().all()


def test_what_linear_blocks_did_is_made_up_for() -> None:
    torch.manual_seed(0)
    task = learning_back(
        LinearNet().eval()
    )  # x + 0.5 (W x + b): what a block does is linear in what the one before gives
    deleted = tiny.prune(task, tiny.Keep([0, 3])(task, TRAINER))
    found = started(task, [0, 3], tiny.Refit(samples=512, ridge=1e-9))
    assert loss_of(task, deleted) > 1e-2
    assert loss_of(task, found) < 1e-6 * loss_of(task, deleted)
    much = started(task, [0, 3], tiny.Refit(ridge=1e9))
    assert loss_of(task, much) == pytest.approx(loss_of(task, deleted), rel=1e-4)


class Block(nn.Module):
    """Two branches, joined in one of several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.attention, self.hidden, self.output = nn.Linear(6, 6), nn.Linear(6, 12), nn.Linear(12, 6)
        self.norm, self.gate, self.unused = nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        if self.way == "parallel":
            return x + self.attention(torch.sin(x)) + self.output(torch.tanh(self.hidden(x)))
        x = x + self.attention(torch.sin(x))
        branch = self.output(torch.tanh(self.hidden(self.norm(x))))
        gate = {"gated": self.gate(c)[:, None], "by token": self.gate(x).sigmoid(), "scaled": 0.25}.get(self.way, 1)
        if self.way == "twice":
            branch = branch + self.output(torch.cos(self.hidden(x)))
        return self.norm(x + branch) if self.way == "norm behind" else x + gate * branch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("way", "layer"),
    [
        *((way, "output") for way in ("plain", "scaled", "gated", "parallel")),
        *((way, None) for way in ("by token", "norm behind", "twice")),
    ],
)
def test_the_layer_is_found_whose_output_is_added(way: str, layer: str | None, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    block, x, c = Block(way).to(dtype), torch.randn(3, 5, 6, dtype=dtype), torch.randn(3, 6, dtype=dtype)
    with torch.no_grad():
        call = BlockCall(block, (x,), {"c": c}, block(x, c), [Stream()]).exact()
        assert output_layers(call) == (layer and {layer: [Stream()]})
        if layer is not None:
            told = {"gated": block.float().gate(c.float()), "scaled": torch.full((3, 6), 0.25)}
            expected = told.get(way, torch.ones(3, 6))
            gate = call.gate(layer, call.without(layer))
            assert gate is not None
            torch.testing.assert_close(gate, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_the_quickstarts_student_begins_far_nearer_to_its_teacher() -> None:
    task = digits_task()
    before = {name: t.clone() for name, t in task.teacher.state_dict().items()}
    losses = [loss_of(task, started(task, [0, 1, 3, 6], tiny.Refit(batch_size=size))) for size in (16, 50)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)  # of the batches nothing depends
    deleted = loss_of(task, tiny.prune(task, tiny.Keep([0, 1, 3, 6])(task, TRAINER)))
    assert losses[0] < 0.5 * deleted
    assert all(torch.equal(t, before[name]) for name, t in task.teacher.state_dict().items())


def test_a_group_that_was_decided_by_itself_is_made_up_for_gap_by_gap() -> None:
    task = digits_task()
    decision = tiny.Uniform(pattern=[2, 4])(task, TRAINER)  # 1, 3 of 0 to 3: the gap before 3 is inside of the group
    alone = tiny.Keep(list(decision.kept))(task, TRAINER)
    students = [tiny.prune(task, d) for d in (decision, alone)]
    for student, d in zip(students, (decision, alone), strict=True):
        SMALL(task, student, d, TRAINER, "recover")
    ours, theirs = (student.state_dict() for student in students)
    assert all(torch.equal(t, theirs[name]) for name, t in ours.items())


def test_branches_are_made_up_for_in_their_blocks() -> None:
    task = digits_task()
    units = {"units": ["attention", "mlp"]}
    task = tiny.Task(backbone=type(task.backbone)(checkpoint="digits", **units), loss=task.loss,
                     train=task.train, held_out=task.held_out)  # fmt: skip
    kept = [i for i in range(16) if i not in (2, 5, 13)]  # two attentions, and a feed-forward network
    deleted = tiny.prune(task, tiny.Keep(kept)(task, TRAINER))
    assert loss_of(task, started(task, kept, SMALL)) < 0.9 * loss_of(task, deleted)


STREAMED = ("SD3Transformer2DModel", "FluxTransformer2DModel", "PixArtTransformer2DModel")


@pytest.mark.parametrize("family", slow_but(STREAMED, "SD3Transformer2DModel"))
def test_every_stream_of_a_diffusers_block_has_its_layer(family: str) -> None:
    task, _ = make(family)
    tiny.Refit().check(task)
    before = tiny.prune(task, tiny.Keep([0, len(task.blocks) - 1])(task, TRAINER))
    after = started(task, [0, len(task.blocks) - 1], tiny.Refit(samples=9, ridge=1e-6))
    changed = [name for name, t in after.state_dict().items() if not torch.equal(t, before.state_dict()[name])]
    assert changed
    assert {name.rpartition(".")[2] for name in changed} <= {"weight", "bias"}


def test_language_models_begin_nearer_to_their_teacher(tmp_path: Path) -> None:
    task = language_task(folder(tmp_path / "model", "llama"))
    tiny.Refit().check(task)
    decision = tiny.Keep([0, 1, 4, 5])(task, TRAINER)
    deleted, found = tiny.prune(task, decision), started(task, [0, 1, 4, 5], tiny.Refit(ridge=1e-4))
    inputs = task.loss.prepare(dict(task.train.__getitems__([0, 1, 2])), tiny.Rng(0, "test"))
    with torch.no_grad():
        wanted = task.loss.predict(task.teacher, inputs)
        far = [float(task.loss.distance(task.loss.predict(m, inputs), wanted, inputs).mean()) for m in (deleted, found)]
    assert far[1] < 0.5 * far[0]


def test_a_network_with_norms_behind_is_refused_before_its_search(tmp_path: Path) -> None:
    with pytest.raises(tiny.UserError, match=r"start: Refit needs a linear layer .*'model\.layers\.0' has none"):
        tiny.Refit().check(language_task(folder(tmp_path / "model", "gemma2")))


@pytest.mark.slow
def test_a_run_without_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = recipe_at(tmp_path, steps=0, start="Refit")
    assert run(recipe, tmp_path / "run") == 0
    student = tiny.load_pretrained(tmp_path / "run" / "student")
    assert loss_of(digits_task(), student) < 0.13
    assert "recover" in capsys.readouterr().out


@pytest.mark.slow
def test_a_recovery_from_there_resumes_bit_for_bit(tmp_path: Path) -> None:
    recipe = recipe_at(tmp_path, steps=8, start={"class_path": "Refit", "init_args": {"samples": 32}})
    assert run(recipe, tmp_path / "whole") == 0
    assert run(recipe, tmp_path / "again", "--trainer.checkpoint_every", "4") == 0
    whole, again = (tiny.load_pretrained(tmp_path / name / "student").state_dict() for name in ("whole", "again"))
    assert all(torch.equal(t, again[name]) for name, t in whole.items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps .of Recover. is 0; expected at least 1, or 0 with start"),
        ({"start": tiny.Refit(), "steps": -1}, "steps .of Recover. is -1"),
    ],
)
def test_no_steps_need_a_start(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(tiny.UserError, match=message):
        tiny.Recover(**settings)


@pytest.mark.parametrize("settings", [{"samples": 0}, {"batch_size": 0}, {"ridge": 0.0}])
def test_settings_outside_of_their_range(settings: dict[str, Any]) -> None:
    (name,) = settings
    with pytest.raises(tiny.UserError, match=rf"start\.{name} is 0"):
        tiny.Refit(**settings)


def test_a_fresh_network_has_nothing_to_make_up_for() -> None:
    task = digits_task()
    with pytest.raises(tiny.UserError, match="start: a fresh network begins with random weights"):
        tiny.Recover(steps=1, start=SMALL)(task, copy.deepcopy(task.teacher), None, TRAINER)


@dataclass(frozen=True)
class Noted(tiny.Start):
    """Notes what it is given."""

    given: list[tiny.Task] = field(default_factory=list)

    def __call__(self, task: tiny.Task, *_: object) -> None:
        self.given.append(task)


def test_it_is_not_fitted_to_the_samples_that_judge() -> None:
    task, noted = digits_task(), Noted()
    decision = tiny.Keep([0, 1, 3, 6])(task, TRAINER)
    how = tiny.Recover(steps=1, start=noted, validation=tiny.Validation(every=1, samples=100))
    how(task, tiny.prune(task, decision), decision, TRAINER)
    assert len(noted.given[0].train) == len(task.train) - 100
    assert noted.given[0].teacher is task.teacher
