"""Surgery: what goes is gone, what stays is where it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

import tinyfusion_core as tiny
from tinyfusion_core.parsing.weights import load_strict, read_weights
from tinyfusion_core.protocols.blocks.paths import block_lists
from tinyfusion_core.pruning.removal import remove_blocks
from tinyfusion_core.runtime.files import save_tensors
from toys import Match, Net, Planted, planted_data


def make_task(backbone: tiny.Backbone) -> tiny.Task:
    return tiny.Task(backbone=backbone, loss=Match(), train=planted_data(), held_out=planted_data(16))


TRAINER = tiny.Trainer(batch_size=4, precision="fp32")


def test_the_teacher_keeps_its_blocks_and_shares_no_weights() -> None:
    task = make_task(Planted())
    student = tiny.prune(task, tiny.Keep([1, 4])(task, TRAINER))
    assert len(task.teacher.blocks) == 8
    assert [len(student.blocks), student.config["scales"]] == [2, [1, 1]]
    assert torch.equal(student.blocks[1].linear.weight, task.teacher.blocks[4].linear.weight)
    student.blocks[1].linear.weight.data.zero_()
    assert task.teacher.blocks[4].linear.weight.any()
    task.teacher.train()
    assert not tiny.prune(task, tiny.Keep([1, 4])(task, TRAINER)).training and task.teacher.training


@dataclass(frozen=True)
class Middle(Planted):
    """Only some children of the list may go."""

    def blocks(self, model: nn.Module) -> Sequence[str]:
        return ["blocks.2", "blocks.3", "blocks.4"]


def test_only_named_blocks_go_and_the_rest_of_the_list_stays() -> None:
    task = make_task(Middle())
    student = tiny.prune(task, tiny.Keep([0, 2])(task, TRAINER))
    kept = [0, 1, 2, 4, 5, 6, 7]
    assert len(student.blocks) == 7
    assert student.config["scales"] == [Planted().scales[i] for i in kept]
    for block, i in zip(student.blocks, kept, strict=True):
        assert torch.equal(block.linear.weight, task.teacher.blocks[i].linear.weight)


def test_several_lists_and_containers_of_their_own_kind() -> None:
    net = Net()
    net.second = nn.Sequential(*net.second)
    seen: dict[str, list[int]] = {}

    @dataclass(frozen=True)
    class Two(Planted):
        def blocks(self, model: nn.Module) -> Sequence[str]:
            return ["first.*", "second.*"]

        def after_prune(self, model: nn.Module, kept: Mapping[str, Sequence[int]]) -> None:
            seen.update(kept)

    remove_blocks(Two(), net, ["first.0", "second.1"])
    assert seen == {"first": [1, 2], "second": [0]}
    assert (len(net.first), len(net.second)) == (2, 1)
    assert isinstance(net.second, nn.Sequential)
    assert block_lists(["a.0", "a.1", "b.0"]) == {"a": [0, 1], "b": [2]}


def test_a_block_outside_of_a_list_is_refused() -> None:
    net = nn.Module()
    net.middle = nn.Linear(2, 2)

    @dataclass(frozen=True)
    class Single(Planted):
        def blocks(self, model: nn.Module) -> Sequence[str]:
            return ["middle"]

    with pytest.raises(tiny.UserError, match="blocks live in lists"):
        remove_blocks(Single(), net, ["middle"])


def test_the_licence_is_that_of_the_checkpoint_that_was_pruned(tmp_path: Path) -> None:
    # A decision made on one checkpoint, applied to another with another licence.
    from tinyfusion_dit import DiT, GaussianDiffusion

    @dataclass(frozen=True, kw_only=True)
    class Other(DiT):
        def source(self) -> dict:
            return {"checkpoint": "other.pt", "sha256": "0" * 64, "licence": "cc-by-nc-4.0"}

    loss = GaussianDiffusion(learn_sigma=False)
    data = planted_data()
    task = tiny.Task(backbone=DiT(checkpoint="digits"), loss=loss, train=data, held_out=data)
    tiny.Keep([0, 1])(task, TRAINER).save(tmp_path / "decision.json")
    other = tiny.Task(backbone=Other(checkpoint="digits"), loss=loss, train=data, held_out=data)
    decision = tiny.Keep(decision=str(tmp_path / "decision.json"))(other, TRAINER)
    folder = tiny.save_pretrained(tiny.prune(other, decision), other, decision, tmp_path / "student")
    card = (folder / "README.md").read_text()
    assert "license: cc-by-nc-4.0" in card
    assert "other.pt" in card
    assert "apache" not in card
    assert decision.provenance["source"]["checkpoint"] == "other.pt"


def test_tied_weights_are_saved_once_for_each_name(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    save_tensors(tmp_path / "w.safetensors", model.state_dict())
    again = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    load_strict(again, read_weights(tmp_path / "w.safetensors"), tmp_path / "w.safetensors")
    assert torch.equal(again["b"].weight, model["a"].weight)
