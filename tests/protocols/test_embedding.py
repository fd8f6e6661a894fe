"""A network of one's own, pruned without a plugin."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tinyfusion_core as tiny
from tinyfusion_core.selection.search import Search
from toys import Chain

TRAINER = tiny.Trainer(batch_size=16, precision="fp32")


def model_and_data() -> tuple[Chain, dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    model = Chain(8, [1, 0, 0, 1])
    x = torch.randn(64, 8)
    with torch.no_grad():
        return model, {"x": x, "target": model(x)}


def squared(model: nn.Module, batch: tiny.Batch) -> torch.Tensor:
    return (model(batch["x"]) - batch["target"]).square().mean(1)


def test_search_finds_the_working_blocks_and_leaves_the_network_as_it_was() -> None:
    model, data = model_and_data()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    task = tiny.wrap(model, blocks="blocks.*", loss_fn=squared, data=data)
    decision = Search(pattern=(2, 4), steps=150, lr_gates=2e-2, update=tiny.Frozen())(task, TRAINER)
    assert decision.kept == (0, 3)
    student = tiny.prune(task, decision)
    assert len(student.blocks) == 2
    with torch.no_grad():
        assert torch.allclose(student(data["x"]), data["target"], atol=1e-6)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())


def test_criteria_and_repairs_work_alike() -> None:
    model, data = model_and_data()
    seen: list[dict] = []
    task = tiny.wrap(
        model, blocks=["blocks.*"], loss_fn=squared, data=tiny.Tensors(data), held_out=data,
        after_prune=lambda m, kept: seen.append(dict(kept)),
    )  # fmt: skip
    decision = tiny.LeaveOneOut(keep=2)(task, TRAINER)
    assert decision.kept == (0, 3)
    tiny.prune(task, decision)
    assert seen[-1] == {"blocks": [0, 3]}


def test_what_it_cannot_do_is_said(tmp_path) -> None:
    model, data = model_and_data()
    with pytest.raises(tiny.UserError, match=r"^wrap: blocks: block path 'layers\.\*'"):
        tiny.wrap(model, blocks="layers.*", loss_fn=squared, data=data)
    with pytest.raises(tiny.UserError, match=r"'blocks' is a list of modules, .* did you mean 'blocks\.\*'\?"):
        tiny.wrap(model, blocks="blocks", loss_fn=squared, data=data)
    with pytest.raises(tiny.UserError, match=r"'blocks\.1' is one block; of 2 or more some can go"):
        tiny.wrap(model, blocks="blocks.1", loss_fn=squared, data=data)
    task = tiny.wrap(model, blocks="blocks.*", loss_fn=squared, data=data)
    decision = tiny.Keep([0, 3])(task, TRAINER)
    student = tiny.prune(task, decision)
    with pytest.raises(tiny.UserError, match="write a backbone"):
        tiny.save_pretrained(student, task, decision, tmp_path / "student")
    with pytest.raises(tiny.UserError, match=r"^wrap: loss_fn returns losses, .* Leave kd out"):
        tiny.Recover(steps=1, kd=tiny.OutputKD())(task, student, decision, TRAINER)
    scalar = tiny.wrap(model, blocks="blocks.*", loss_fn=lambda m, batch: squared(m, batch).mean(), data=data)
    with pytest.raises(tiny.UserError, match=r"^wrap: loss_fn: .* return one number for each"):
        tiny.Search(keep=2, steps=2)(scalar, TRAINER)


def test_a_wrapped_network_is_evaluated() -> None:
    model, data = model_and_data()
    task = tiny.wrap(model, blocks="blocks.*", loss_fn=squared, data=data, held_out={k: v[:8] for k, v in data.items()})
    students = {str(kept): tiny.prune(task, tiny.Keep(kept)(task, TRAINER)) for kept in ([0, 3], [1, 2])}
    metrics = [tiny.HeldOutLoss(draws=1), tiny.Latency(rounds=1, warmup=0, batch_size=4)]
    rows = {row.name: row for row in tiny.evaluate(task, {"teacher": model, **students}, metrics, TRAINER)}
    losses = rows["held-out loss"].values
    assert losses["teacher"] == losses["[0, 3]"] == 0.0
    with torch.no_grad():
        expected = (data["x"] - data["target"])[:8].square().mean()
    assert losses["[1, 2]"] == pytest.approx(float(expected), rel=1e-5)
    assert rows["blocks"].values == {"teacher": 4, "[0, 3]": 2, "[1, 2]": 2}
    assert rows["latency"].values["teacher"] > 0
    tiny.check_teacher(task, TRAINER)
    with pytest.raises(tiny.UserError, match="^Frechet: the task has no feature_space"):
        tiny.evaluate(task, students, [tiny.Frechet(num_samples=8)], TRAINER)
