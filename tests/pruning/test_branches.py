"""Attention and feed-forward go by themselves: what a search, a student and its file say of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tinyfusion_core as tiny
from marks import slow_but
from small_run import RECIPE, digits_task, run
from tinyfusion_core.cli import main
from tinyfusion_core.protocols.blocks.branches import Removed, removed_branches
from tinyfusion_core.protocols.blocks.paths import block_lists, block_of, list_of, numbers_of, word_for
from tinyfusion_core.pruning.gating import Gates
from tinyfusion_core.pruning.removal import in_blocks
from tinyfusion_core.runtime.files import write_text
from tinyfusion_core.selection.criteria.calibration import Calibration
from tinyfusion_core.selection.criteria.similarity import cosine
from tinyfusion_core.training.distillation import derive_taps
from toys import Match, Planted, planted_data

MASKED = tiny.MaskedKD(beta=(0.1, 0.1))
UNITS = ("attention", "mlp")
TRAINER = tiny.Trainer(batch_size=16, precision="fp32", seed=0, log_every=100)


class Two(nn.Module):
    """A block of two branches, each scaled; with scale 0 a branch does nothing."""

    def __init__(self, width: int, mixing: float, mapping: float) -> None:
        super().__init__()
        self.mix, self.scales = nn.Linear(width, width), (mixing, mapping)
        self.map = nn.Sequential(nn.Linear(width, width), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.scales[0] * self.mix(x)
        return x + self.scales[1] * self.map(x)


class Twos(nn.Module):
    def __init__(self, width: int, scales: Sequence[Sequence[float]]) -> None:
        super().__init__()
        self.config: dict[str, Any] = {"width": width, "scales": [list(pair) for pair in scales]}
        self.blocks = nn.ModuleList(Two(width, *pair) for pair in scales)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@dataclass(frozen=True)
class PlantedBranches(Planted):
    """A chain in which some branches do the work and the others do nothing."""

    scales: tuple[tuple[float, float], ...] = ((1, 0), (0, 1), (0, 0), (1, 1))  # type: ignore[assignment]
    units: Sequence[str] = ("mix", "map")

    def build(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return Twos(self.width, self.scales).eval()

    def config(self, model: nn.Module | None = None) -> dict[str, Any]:
        return dict((model or self.build()).config)

    @classmethod
    def construct(cls, config: Mapping[str, Any]) -> nn.Module:
        return Twos(**config)

    def branches(self, model: nn.Module) -> Mapping[str, tiny.Branch]:
        return {"mix": tiny.Branch("mix"), "map": tiny.Branch("map")}


@dataclass(frozen=True)
class MatchBranches(Match):
    def prepare(self, batch: Mapping[str, Tensor], rng: tiny.Rng) -> dict[str, Tensor]:
        inputs = super().prepare(batch, rng)
        with torch.no_grad():
            return {**inputs, "target": PlantedBranches().build()(inputs["x"])}


def planted(**options: Any) -> tiny.Task:
    data = planted_data()
    return tiny.Task(backbone=PlantedBranches(**options), loss=MatchBranches(), train=data, held_out=data)


WORKING = [0, 3, 5, 7]
"""Of `PlantedBranches`: the branches that do something."""


def test_paths_say_what_they_are() -> None:
    blocks = ["a.blocks.0.attn", "a.blocks.0.mlp.net", "a.blocks.1.attn", "a.blocks.1.mlp.net"]
    assert block_lists(blocks) == {"a.blocks.*.attn": [0, 2], "a.blocks.*.mlp.net": [1, 3]}
    assert [block_of(path) for path in blocks] == ["a.blocks.0", "a.blocks.0", "a.blocks.1", "a.blocks.1"]
    assert numbers_of(blocks) == [0, 0, 1, 1]
    assert word_for(blocks) == "branches"
    assert word_for(["a.blocks.0", "0"]) == "blocks"
    assert [list_of(path) for path in ("3", "0.attn", "stages.0.blocks.3")] == ["", "*.attn", "stages.0.blocks"]
    assert numbers_of(["encoder.0", "encoder.1", "decoder.0"]) == [0, 1, 2]


@pytest.mark.parametrize(
    "selector",
    [
        pytest.param(tiny.Search(keep=4, steps=150, update=tiny.Frozen()), marks=pytest.mark.slow),
        pytest.param(
            tiny.Search(
                pattern={"blocks.*.mix": [2, 4], "blocks.*.map": [2, 4]}, steps=200, lr_gates=0.05, update=tiny.Frozen()
            ),
            marks=pytest.mark.slow,
        ),
        tiny.Greedy(keep=4),
        tiny.LeaveOneOut(keep=4),
        tiny.BlockInfluence(keep=4),
        tiny.InputOutputMSE(keep=4),
        tiny.Race(keep=4, steps=20, samples=64),
    ],
    ids=lambda selector: type(selector).__name__,
)
def test_the_branches_that_work_are_found(selector: tiny.Selector) -> None:
    task = planted()
    decision = selector(task, TRAINER)
    assert list(decision.kept) == WORKING
    student, x = tiny.prune(task, decision), torch.randn(5, 8)
    assert torch.allclose(student(x), task.teacher(x), atol=1e-6)
    assert len(student.blocks) == 3  # the one that lost both branches is gone
    assert [*removed_branches(student)] == ["blocks.0.map", "blocks.1.mix"]


def test_a_budget_counts_branches() -> None:
    sizes = [sum(p.numel() for p in planted().teacher.get_submodule(path).parameters()) for path in planted().blocks]
    decision = tiny.Greedy(budget={"parameters": 4 * sizes[0]})(planted(), TRAINER)
    assert list(decision.kept) == WORKING


def test_a_mask_of_each_sample_is_the_dense_formula() -> None:
    task, x = planted(scales=((1, 0.5), (0.7, 1), (0.3, 0.2), (1, 1))), torch.randn(6, 8)
    masks = (torch.rand(6, 8, generator=torch.Generator().manual_seed(3)) < 0.5).float()

    def dense(x: Tensor, masks: Tensor) -> Tensor:
        for i, block in enumerate(task.teacher.blocks):
            x = x + masks[:, i, None] * block.scales[0] * block.mix(x)
            x = x + masks[:, 4 + i, None] * block.scales[1] * block.map(x)
        return x

    wanted = [torch.autograd.grad(dense(x, m).sum(), [m, *task.teacher.parameters()]) for m in [masks.requires_grad_()]]
    with Gates(task.teacher, task.blocks, task.batch_dim(task.teacher), task.streams) as gates:
        gates.mask = masks
        out = task.teacher(x)
        found = torch.autograd.grad(out.sum(), [masks, *task.teacher.parameters()])
    assert torch.allclose(out, dense(x, masks), atol=1e-6)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, wanted[0], strict=True))


def test_a_dropped_branch_is_not_run() -> None:
    task, rows = planted(), []
    plain = task.teacher.blocks[1].map.forward
    task.teacher.blocks[1].map.forward = lambda input: rows.append(len(input)) or plain(input)
    with Gates(task.teacher, task.blocks, task.batch_dim(task.teacher), task.streams) as gates, torch.no_grad():
        rows.clear()
        gates.mask = torch.ones(6, 8).index_put_((torch.arange(4), torch.tensor(5)), torch.tensor(0.0))
        task.teacher(torch.randn(6, 8))
    assert rows == [2]


def test_the_influence_of_a_branch_by_hand() -> None:
    task = planted(scales=((1, 0.5), (0.7, 1), (0.3, 0.2), (1, 1)))
    task = replace(task, loss=MatchBranches(noise=0.0))
    found = Calibration(task, TRAINER, 16, 16).compare([(i, i) for i in range(8)], cosine)
    calibration = Calibration(task, TRAINER, 16, 16)
    x, wanted = calibration._inputs(range(16))["x"], [0.0] * 8
    with torch.no_grad():
        for i, block in enumerate(task.teacher.blocks):
            between = x + block.scales[0] * block.mix(x)
            out = block(x)
            without = x + block.scales[1] * block.map(x), between
            for j, y in zip((i, 4 + i), without, strict=True):
                wanted[j] = float(torch.cosine_similarity(y, out, dim=-1).mean())
            x = out
    assert found == pytest.approx(wanted, abs=1e-5)
    assert not any("forward" in vars(module) for module in task.teacher.modules())


@pytest.mark.parametrize(
    ("gone", "kept", "near", "taps"),
    [
        ((4, 1), (0, 1, 2, 3), [0, 1], [(0, 0), (1, 1), (3, 3)]),  # a part of two blocks
        ((1, 5), (0, 2, 3), [0, 1], [(0, 1), (2, 3)]),  # a whole block, for which the one before stands in
        ((4, 1, 5), (0, 2, 3), [0, 1], [(0, 1), (2, 3)]),  # and that one is thinned itself
        ((0, 4, 7), (1, 2, 3), [0, 2], [(2, 3)]),  # the first block has none before it
        ((3, 7), (0, 1, 2), [2], [(2, 3)]),
    ],
)
def test_what_a_decision_says_of_whole_blocks(gone, kept, near, taps) -> None:
    task = planted()
    decision = tiny.Decision(tuple(task.blocks), tuple(i for i in range(8) if i not in gone), "Keep")
    whole, beside = in_blocks(task.backbone, task.teacher, decision)
    assert (whole.blocks, whole.kept) == (tuple(f"blocks.{i}" for i in range(4)), kept)
    assert list(beside) == near
    assert sorted(derive_taps(whole)) == sorted(taps)


@pytest.mark.parametrize("kd", slow_but([None, tiny.OutputKD(), MASKED], MASKED))
def test_a_student_recovers_and_is_loaded_as_it_was(kd: tiny.OutputKD | None, tmp_path: Path) -> None:
    task = replace(digits_task(), backbone=replace(digits_task().backbone, units=UNITS))
    decision = tiny.Keep([0, 1, 2, 6, 8, 10, 12, 14, 15])(task, TRAINER)
    student = tiny.prune(task, decision)
    assert len(student.blocks) == 6
    inputs = task.loss.prepare(task.train.__getitems__([*range(8)]), tiny.Rng(0, "test"))
    before = task.loss.losses(student, inputs).mean().item()
    tiny.Recover(steps=10, lr=1e-3, ema=0.0, kd=kd, gap_lr=2.0)(task, student, decision, TRAINER)
    assert task.loss.losses(student, inputs).mean().item() < before
    tiny.save_pretrained(student, task, decision, tmp_path / "student")
    again = tiny.load_pretrained(tmp_path / "student")
    with torch.no_grad():
        assert torch.equal(task.loss.predict(again, inputs), task.loss.predict(student, inputs))
    assert [type(block.attn) is Removed for block in again.blocks] == [False, False, False, True, False, True]
    assert "16 → 9 branches" in (tmp_path / "student" / "README.md").read_text()


@pytest.mark.slow
def test_a_run_of_two_rounds_in_branches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = {**RECIPE, "backbone": {"class_path": "DiT", "init_args": {"checkpoint": "digits", "units": [*UNITS]}}}
    recover = {"steps": 4, "kd": "MaskedKD"}

    def search(keep: Any) -> dict[str, Any]:
        return {"class_path": "Search", "init_args": {"steps": 6, "update": "Frozen", "keep": keep}}

    del recipe["search"], recipe["recover"]
    recipe["rounds"] = {
        "first": {"search": search(12), "recover": recover},
        "second": {"search": search({"blocks.*.attn": 4, "blocks.*.mlp": 4}), "recover": recover},
    }
    write_text(tmp_path / "recipe.yaml", json.dumps(recipe))
    assert main(["validate", str(tmp_path / "recipe.yaml")]) == 0
    assert "8 branches in 'blocks.*.attn'" in capsys.readouterr().out
    assert run(tmp_path / "recipe.yaml", tmp_path / "run") == 0
    assert "16 → 12 → 8 branches" in capsys.readouterr().out
    student = tiny.load_pretrained(tmp_path / "run" / "second" / "student")
    for branch in ("attn", "mlp"):  # each list by its own number
        assert sum(type(getattr(block, branch)) is not Removed for block in student.blocks) == 4
    assert "export" not in (tmp_path / "run" / "report.html").read_text()
    assert main(["export", str(tmp_path / "run"), "--to", "diffusers", "--out", str(tmp_path / "out")]) == 2
    assert "search whole blocks" in capsys.readouterr().err
    # What a run has left of its branches is the teacher of another.
    backbone = {"checkpoint": str(tmp_path / "run" / "second" / "student"), "units": [*UNITS]}
    recipe["backbone"] = {"class_path": "DiT", "init_args": backbone}
    recipe["rounds"] = None
    write_text(tmp_path / "next.yaml", json.dumps({**recipe, "search": search(6), "recover": recover}))
    assert run(tmp_path / "next.yaml", tmp_path / "next") == 0
    assert "8 → 6 branches" in capsys.readouterr().out


def test_ones_own_network_in_branches() -> None:
    model, whole, data = PlantedBranches().build(), PlantedBranches().build(), planted_data()

    def loss(net: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        with torch.no_grad():
            target = whole(batch["x"])
        return (net(batch["x"]) - target).square().mean(1)

    branches = {"mix": tiny.Branch("mix"), "map": tiny.Branch("map")}
    task = tiny.wrap(model, blocks="blocks.*", branches=branches, loss_fn=loss, data=data)
    decision = tiny.Greedy(keep=4)(task, TRAINER)
    assert list(decision.kept) == WORKING
    assert len(tiny.prune(task, decision).blocks) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"units": ["attention", "feed"]}, "units: no 'feed' (known: map, mix)"),
        ({"units": ["mpa"]}, "units: no 'mpa'; did you mean 'map'?"),
    ],
)
def test_units_that_are_not_there(options: dict[str, Any], message: str) -> None:
    with pytest.raises(tiny.UserError, match="units: no ") as found:
        _ = planted(**options).blocks
    assert message.partition(":")[0] in str(found.value)


def test_what_cannot_be_said_of_branches(tmp_path: Path) -> None:
    with pytest.raises(tiny.UserError, match="units: no branches of its blocks are known; leave units out"):
        _ = tiny.Task(
            backbone=Planted(units=["attention"]), loss=Match(), train=planted_data(), held_out=planted_data()
        ).blocks
    with pytest.raises(tiny.UserError, match="SpanSimilarity: compares runs of whole blocks; leave units out"):
        tiny.SpanSimilarity(keep=2)(planted(units=["mix"]), TRAINER)
