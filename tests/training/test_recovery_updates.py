"""What moves in a recovery: low-rank updates, the last blocks, weights by their paths."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tinyfusion_core as tiny
from marks import slow_but
from small_run import run
from tinyfusion_core.cli import main
from tinyfusion_core.pruning.weight_update import WeightUpdate
from toys import LinearNet, Residual, learning_back

pytestmark = pytest.mark.numerics
TRAINER = tiny.Trainer(batch_size=32, seed=0)
SIZES = {"input_size": 8, "patch_size": 2, "in_channels": 1, "hidden_size": 16, "depth": 4, "num_heads": 2}
SMALL = {"class_path": "DiT", "init_args": {**SIZES, "num_classes": 10, "learn_sigma": False}}
UPDATES = {
    "LoRA": tiny.LoRA(rank=2),
    "last block and head": tiny.LastBlocks(blocks=1),
    "head": tiny.LastBlocks(blocks=0),
    "biases": tiny.Matching(".*bias"),
    "all": tiny.Full(),
}
MOVES = {
    "LoRA": {"layers.0.linear.weight", "layers.1.linear.weight"},
    "last block and head": {"layers.1.linear.weight", "layers.1.linear.bias", "head.weight", "head.bias"},
    "head": {"head.weight", "head.bias"},
    "biases": {"layers.0.linear.bias", "layers.1.linear.bias", "head.bias", "norm.bias", "stem.bias"},
}


def pruned() -> tuple[tiny.Task, nn.Module, tiny.Decision]:
    torch.manual_seed(0)
    task = learning_back(LinearNet().eval())
    decision = tiny.Keep([0, 3])(task, TRAINER)
    return task, tiny.prune(task, decision), decision


def loss_of(task: tiny.Task, model: nn.Module) -> float:
    with torch.no_grad():
        return task.loss.losses(model.eval(), task.train.__getitems__(list(range(256)))).mean().item()


@pytest.mark.parametrize("name", slow_but(UPDATES, *[*UPDATES][:2]))
def test_it_recovers_and_moves_nothing_else(name: str) -> None:
    task, student, decision = pruned()
    before, at_first = {k: v.clone() for k, v in student.state_dict().items()}, loss_of(task, student)
    kinds = [type(module) for module in student.modules()]
    recovered = tiny.Recover(steps=150, lr=1e-2, lr_final=1e-3, update=UPDATES[name])(task, student, decision, TRAINER)
    assert loss_of(task, recovered) < 0.95 * at_first
    after = recovered.state_dict()
    assert after.keys() == before.keys()
    assert kinds == [type(module) for module in recovered.modules()]
    assert all(p.requires_grad for p in recovered.parameters())
    moved = {key for key, _ in recovered.named_parameters() if not torch.equal(after[key], before[key])}
    if name in MOVES:
        assert moved == MOVES[name]


def test_every_weight_is_what_was_trained_before_there_was_a_choice() -> None:
    found = []
    for update in (None, tiny.Full()):
        task, student, decision = pruned()
        found.append(tiny.Recover(steps=5, update=update)(task, student, decision, TRAINER).state_dict())
    assert all(torch.equal(v, found[1][k]) for k, v in found[0].items())


@pytest.mark.slow
def test_an_update_of_rank_two_repairs_damage_of_rank_two() -> None:
    torch.manual_seed(0)
    model = LinearNet().eval()
    task = learning_back(model)
    damaged, decision = tiny.prune(task, keep := tiny.Keep([0, 1, 2, 3])(task, TRAINER)), keep
    with torch.no_grad():
        damaged.layers[2].linear.weight += torch.randn(8, 2) @ torch.randn(2, 8)
    at_first = loss_of(task, damaged)
    how: dict[str, Any] = {"steps": 600, "lr": 3e-2, "lr_final": 0.0, "ema": 0.0}
    only = r"layers\.2\.linear"
    for rank, left in ((2, 1e-4), (1, None)):
        student = tiny.prune(task, decision)
        student.load_state_dict(damaged.state_dict())
        recovered = tiny.Recover(**how, update=tiny.LoRA(rank=rank, targets=only))(task, student, decision, TRAINER)
        change = recovered.layers[2].linear.weight - damaged.layers[2].linear.weight
        assert torch.linalg.matrix_rank(change.double(), rtol=1e-4).item() == rank
        assert left is None or loss_of(task, recovered) < left * at_first


@pytest.mark.parametrize("name", ["LoRA", "last block and head"])
def test_it_goes_on_bit_for_bit(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tinyfusion_core.runtime.run_folder import RunFolder

    class Stop(Exception):
        pass

    log = RunFolder.log

    def stop_late(self: RunFolder, stage: str, step: int, values: dict[str, Any]) -> None:
        log(self, stage, step, values)
        if step == 8:
            raise Stop

    trainer, found = tiny.Trainer(batch_size=32, seed=0, checkpoint_every=3, log_every=2), []
    for folder, stops in (("whole", False), ("stopped", True)):
        task, student, decision = pruned()
        recover, place = tiny.Recover(steps=12, update=UPDATES[name]), RunFolder(tmp_path / folder)
        (tmp_path / folder).mkdir()
        if stops:
            with monkeypatch.context() as patch:
                patch.setattr(RunFolder, "log", stop_late)
                with pytest.raises(Stop):
                    recover(task, student, decision, trainer, place)
            task, student, decision = pruned()
        found.append(recover(task, student, decision, trainer, place).state_dict())
    assert all(torch.equal(v, found[1][k]) for k, v in found[0].items())


@pytest.mark.parametrize(
    ("update", "message"),
    [
        (
            tiny.Matching("block.*"),
            r"update.targets: 'block\.\*' matches the whole path of no trained weight",
        ),
        (tiny.LoRA(targets="x"), "update.targets: 'x' matches the whole path of no layer; paths are like stem"),
        (tiny.LastBlocks(blocks=3), "update.blocks is 3; the network has 2 blocks"),
    ],
)
def test_what_moves_nothing_is_refused(update: WeightUpdate, message: str) -> None:
    task, student, decision = pruned()
    before = {k: v.clone() for k, v in student.state_dict().items()}
    with pytest.raises(tiny.UserError, match=message):
        tiny.Recover(steps=2, update=update)(task, student, decision, TRAINER)
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())


def test_what_leaves_nothing_in_the_weights_is_no_recovery() -> None:
    with pytest.raises(tiny.UserError, match=r"update .*: Frozen leaves nothing in the weights; see LoRA"):
        tiny.Recover(steps=2, update=tiny.Frozen())


class Attending(nn.Module):
    """Its attention uses weights of layers that it does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True) for _ in range(3)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_attention_of_torch_is_left_alone_and_told() -> None:
    model = Attending()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    paths = [f"layers.{i}" for i in range(3)]
    for how in (tiny.LoRA.applied, tiny.LoRA.merged):
        stack = ExitStack()
        with pytest.warns(UserWarning, match=r"nn.MultiheadAttention alone, layers.0.self_attn for one"):
            weights = stack.enter_context(how(tiny.LoRA(rank=2), model, paths))
        with stack:
            model(torch.randn(2, 3, 8)).sum().backward()
            assert all(p.grad is not None for p in weights)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        for targets in (".*self_attn.*", r".*self_attn", r".*out_proj"):
            message = (
                r"update.targets: layers.0.self_attn.* is \(in\) an nn.MultiheadAttention, which LoRA cannot adapt"
            )
            with pytest.raises(tiny.UserError, match=message), how(tiny.LoRA(targets=targets), model, paths):
                pass
    assert model.state_dict().keys() == before.keys()


@pytest.mark.parametrize(("update", "moves"), [(tiny.LoRA(rank=2), False), (None, True), (tiny.Matching(".*"), True)])
def test_statistics_of_norms_that_stand_still_stand_still(update: WeightUpdate | None, moves: bool) -> None:
    torch.manual_seed(0)
    model = LinearNet().eval()
    model.norm = nn.BatchNorm1d(8).eval()
    task = learning_back(model)
    decision = tiny.Keep([0, 3])(task, TRAINER)
    student = tiny.prune(task, decision)
    recovered = tiny.Recover(steps=3, update=update)(task, student, decision, TRAINER)
    assert (not torch.equal(recovered.norm.running_mean, model.norm.running_mean)) == moves


def test_a_network_without_a_head_has_only_blocks_to_train() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList(Residual(8, 1.0) for _ in range(2))
    with (
        pytest.raises(tiny.UserError, match="registers nothing after its blocks"),
        tiny.LastBlocks(blocks=0).merged(model, ["layers.0", "layers.1"]),
    ):
        pass
    with pytest.raises(tiny.UserError, match=r"update.blocks is 0; expected at least 1"):
        tiny.LastBlocks(blocks=0, head=False)


@pytest.mark.slow
def test_a_recipe_says_what_moves_plans_it_and_goes_on(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--search={class_path: FirstN, init_args: {keep: 4}}", "--recover.update={class_path: LastBlocks}"]
    assert main(["validate", str(recipe), *flags]) == 0
    said = capsys.readouterr().out
    assert "moves LastBlocks" in said
    memory = [line for line in said.splitlines() if "recover: memory" in line]
    assert main(["validate", str(recipe), flags[0]]) == 0
    assert memory != [line for line in capsys.readouterr().out.splitlines() if "recover: memory" in line]
    assert run(recipe, tmp_path / "run", *flags, "--evaluate=[]") == 0
    assert run(recipe, tmp_path / "run", *flags, "--evaluate=[]", "--recover.update.blocks=2") == 2
    assert "recover.update.blocks: 3 -> 2" in capsys.readouterr().err
    wrong = "--recover.update={class_path: Matching, init_args: {targets: nosuch}}"
    capsys.readouterr()
    assert run(recipe, tmp_path / "wrong", wrong) == 2
    assert "recover.update.targets: 'nosuch' matches the whole path of no trained weight" in capsys.readouterr().err
    assert not (tmp_path / "wrong").exists()  # before anything is paid for
    fresh = ["--train={steps: 2, update: LoRA}", "--recover=null", "--search=null", f"--backbone={json.dumps(SMALL)}"]
    assert run(recipe, tmp_path / "other", *fresh) == 2
    assert "train.update: a fresh network has to learn every weight" in capsys.readouterr().err
