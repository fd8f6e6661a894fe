"""What is saved is read back before it replaces anything: bit for bit the network in memory, for every backbone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import tinyfusion_core as tiny
from tinyfusion_core.parsing.weights import read_weights
from tinyfusion_core.pruning.read_back import check_read_back
from tinyfusion_core.runtime.files import save_tensors
from toys import Match, Planted, planted_data

KEPT = (0, 2)


def pruned(backbone: Planted) -> tuple[tiny.Task, nn.Module, tiny.Decision]:
    data = planted_data()
    task = tiny.Task(backbone=backbone, loss=Match(), train=data, held_out=data)
    decision = tiny.Decision(blocks=tuple(task.blocks), kept=KEPT, method="Keep")
    return task, tiny.prune(task, decision), decision


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_network_comes_back_in_its_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    task, student, decision = pruned(Planted())
    student.to(dtype)
    tiny.save_pretrained(student, task, decision, tmp_path)
    again = tiny.load_pretrained(tmp_path, Planted)
    assert all(p.dtype == dtype for p in again.parameters())
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), student.parameters(), strict=True))


def test_a_network_that_diverged_is_saved_as_it_is(tmp_path: Path) -> None:
    task, student, decision = pruned(Planted())
    next(student.parameters()).data[0] = torch.nan
    tiny.save_pretrained(student, task, decision, tmp_path)
    assert next(tiny.load_pretrained(tmp_path, Planted).parameters())[0].isnan().all()


def test_saving_leaves_the_network_and_the_generator_as_they_were(tmp_path: Path) -> None:
    task, student, decision = pruned(Planted())
    student.train()
    before, state = {name: (p, p.clone()) for name, p in student.named_parameters()}, torch.get_rng_state()
    tiny.save_pretrained(student, task, decision, tmp_path)
    assert student.training
    assert torch.equal(torch.get_rng_state(), state)
    for name, p in student.named_parameters():
        assert p is before[name][0]
        assert torch.equal(p, before[name][1])


def test_what_is_not_the_network_replaces_nothing(tmp_path: Path) -> None:
    task, student, decision = pruned(Planted())
    tiny.save_pretrained(student, task, decision, tmp_path)
    before = files(tmp_path)
    other = tiny.Decision(blocks=tuple(task.blocks), kept=(1, 3), method="Keep")
    wrong = tiny.prune(task, other)
    wrong.blocks[0].scale += 0.5  # the config, which it was made with, says otherwise
    with pytest.raises(tiny.UserError, match="same weights and predicts otherwise. Nothing was replaced"):
        tiny.save_pretrained(wrong, task, other, tmp_path)
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("blocks.0.linear.bias", None, r"missing blocks.0.linear.bias"),
        ("blocks.0.linear.further", torch.zeros(2), r"unexpected blocks.0.linear.further"),
        ("blocks.0.linear.bias", torch.zeros(1), r"blocks.0.linear.bias is \[1\], expected"),
        ("blocks.0.linear.bias", torch.zeros(8), r"blocks.0.linear.bias has other values"),
    ],
)
def test_files_are_compared_key_by_key(name: str, value: torch.Tensor | None, message: str, tmp_path: Path) -> None:
    task, student, decision = pruned(Planted(width=8))
    folder = tiny.save_pretrained(student, task, decision, tmp_path)
    check_read_back(student, task, folder)
    weights = {k: t.clone() for k, t in read_weights(folder / "model.safetensors").items() if k != name}
    save_tensors(folder / "model.safetensors", weights if value is None else {**weights, name: value})
    with pytest.raises(tiny.UserError, match=message):
        check_read_back(student, task, folder)


def test_what_a_killed_save_has_left_goes(tmp_path: Path) -> None:
    task, student, decision = pruned(Planted())
    left = tmp_path / ".saving.abc.partial"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    tiny.save_pretrained(student, task, decision, tmp_path)
    assert sorted(files(tmp_path)) == ["README.md", "config.json", "decision.json", "model.safetensors"]
