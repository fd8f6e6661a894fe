"""Optimizers that a recipe names: any of torch, and those of matrices beside AdamW."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Muon

import tinyfusion_core as tiny
from forks import command, start, wait
from interrupted import RECOVER, TRAINER, assert_equal, lines, task
from marks import slow_but
from small_run import RECIPE, run
from tinyfusion_core.cli import main
from tinyfusion_core.training.steps.optimizers import Joined, NamedOptimizer
from toys import StopAt

pytestmark = pytest.mark.numerics
KEPT = (0, 2, 5, 6, 7)
MUON = {"class_path": "torch.optim.Muon", "init_args": {"adjust_lr_fn": "match_rms_adamw"}}


def recovered(
    optimizer: Any, folder: Path | None = None, loss: tiny.LossAdapter | None = None, **how: Any
) -> dict[str, Tensor]:
    made, settings = task(loss), {**vars(RECOVER), "optimizer": optimizer, **how}
    decision = tiny.Keep(blocks=KEPT)(made, TRAINER)
    run_folder = None if folder is None else tiny.RunFolder(folder)
    return tiny.Recover(**settings)(made, tiny.prune(made, decision), decision, TRAINER, run_folder).state_dict()


def test_it_is_the_optimizer_that_python_would_hand_in() -> None:
    named = recovered({"class_path": "torch.optim.SGD", "init_args": {"momentum": 0.9}})
    made = task()
    decision = tiny.Keep(blocks=KEPT)(made, TRAINER)
    given = RECOVER(
        made, tiny.prune(made, decision), decision, TRAINER, optimizer=lambda groups: SGD(groups, momentum=0.9)
    )
    assert_equal(named, given.state_dict())
    assert_equal(recovered("AdamW"), recovered(None))


def test_muon_has_the_matrices_of_the_blocks_and_adamw_the_rest() -> None:
    block, head = nn.Linear(4, 4), nn.Linear(4, 3)
    weights = [*block.parameters(), *head.parameters()]
    other = [nn.Parameter(p.detach().clone()) for p in weights]
    made = NamedOptimizer(MUON)([{"params": weights, "lr": 1e-2, "weight_decay": 0.1}], block.parameters())
    how = {"lr": 1e-2, "weight_decay": 0.1}
    expected = Muon(other[:1], adjust_lr_fn="match_rms_adamw", **how), AdamW(other[1:], **how)
    for seed in range(3):
        rng = torch.Generator().manual_seed(seed)
        for p, q in zip(weights, other, strict=True):
            p.grad = torch.randn(p.shape, generator=rng)
            q.grad = p.grad.clone()
        made.step()
        for part in expected:
            part.step()
    for p, q in zip(weights, other, strict=True):
        assert torch.equal(p, q)
    assert isinstance(made, Joined)
    made.param_groups[0]["lr"] = made.param_groups[1]["lr"] = 0.0  # rates of the whole are those of its parts
    before = [p.detach().clone() for p in weights]
    made.step()
    assert all(torch.equal(p, b) for p, b in zip(weights, before, strict=True))


@pytest.mark.parametrize("optimizer", slow_but([MUON, "torch.optim.RMSprop", "Adafactor"], MUON))
def test_it_goes_on_bit_for_bit_after_a_kill_and_after_its_end(optimizer: Any, tmp_path: Path) -> None:
    more = {"schedule": "constant", "ema": 0.9}
    whole = recovered(optimizer, tmp_path / "whole", **more)
    with pytest.raises(tiny.Interrupted, match="stopped at step 12"):
        recovered(optimizer, tmp_path / "stopped", loss=StopAt(), **more)
    assert_equal(recovered(optimizer, tmp_path / "stopped", **more), whole)
    recovered(optimizer, tmp_path / "extended", steps=12, **more)
    assert_equal(recovered(optimizer, tmp_path / "extended", **more), whole)
    assert lines(tiny.RunFolder(tmp_path / "extended")) == lines(tiny.RunFolder(tmp_path / "whole"))


def test_muon_recovers_with_everything_else(tmp_path: Path) -> None:
    before = recovered(MUON, steps=1)
    for how in ({"gap_lr": 2.0, "weight_decay": 0.1}, {"update": tiny.LoRA(rank=2), "ema": 0.0}):
        found = recovered(MUON, **how)
        assert any(not torch.equal(t, before[name]) for name, t in found.items())
    with pytest.raises(tiny.UserError, match="the checkpoint was made with Muon and AdamW, and now it is AdamW; give"):
        recovered(MUON, tmp_path / "run")
        recovered(None, tmp_path / "run", steps=30)


REFUSED: dict[str, tuple[Any, str]] = {
    "no such": ("Mion", r"no torch\.optim\.Mion"),
    "no optimizer": ("torch.nn.Linear", r"torch\.nn\.Linear is no Optimizer; see AdamW or Muon of torch\.optim"),
    "not installed": ("bitsandbytez.optim.AdamW8bit", r"needs bitsandbytez, which is not installed; pip install"),
    "no path": ({"class_path": "Muon"}, r"give a name, Muon, or class_path, torch\.optim\.Muon"),
    "other keys": ({"class_path": "torch.optim.SGD", "momentum": 0.9}, "give a name, Muon, or class_path"),
    "arguments": ({"class_path": "torch.optim.SGD", "init_args": {"momentun": 1}}, "unexpected keyword argument"),
    "values": ({"class_path": "torch.optim.SGD", "init_args": {"momentum": -1}}, "Invalid momentum"),
    "no mapping": ({"class_path": "torch.optim.SGD", "init_args": [1]}, "init_args is .*expected a mapping"),
    "rates": ({"class_path": "torch.optim.SGD", "init_args": {"lr": 1}}, "'lr' is not for init_args"),
    "a closure": ("LBFGS", "LBFGS cannot be had so: "),
    "sparse gradients": ("SparseAdam", "SparseAdam cannot be had so: "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_had_is_one_message(name: str) -> None:
    optimizer, said = REFUSED[name]
    with pytest.raises(tiny.UserError, match=rf"^optimizer \(of [\w ]+\): .*{said}"):
        tiny.Recover(optimizer=optimizer)


def test_shards_are_updated_as_the_whole_or_refused() -> None:
    assert all(NamedOptimizer(name).goes_by_element() for name in ("AdamW", "Adam", "SGD", "RMSprop", "NAdam"))
    assert not any(NamedOptimizer(name).goes_by_element() for name in ("Muon", "Adafactor"))


@pytest.mark.slow
def test_two_processes_are_one_and_shards_refuse_what_needs_whole_matrices(tmp_path: Path) -> None:
    search = {"class_path": "Keep", "init_args": {"blocks": [0, 1, 6, 7]}}
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, "search": search, "recover": {"steps": 4, "optimizer": MUON}}))
    words, said = ("run", path, "--trainer.sharding=fsdp", "--run-dir"), tmp_path / "refused.log"
    assert wait(start(command(*words, tmp_path / "refused"), said, processes=2)) == [2, 2]
    assert "recover.optimizer: sees whole matrices, which trainer.sharding: fsdp cuts; take ddp" in said.read_text()
    two = command("run", path, "--run-dir", tmp_path / "two")
    assert wait(start(two, tmp_path / "two.log", processes=2)) == [0, 0], (tmp_path / "two.log").read_text()[-3000:]
    assert run(path, tmp_path / "one") == 0
    one, other = (load_file(tmp_path / name / "student" / "model.safetensors") for name in ("one", "two"))
    assert all(torch.allclose(t, other[name], atol=1e-4) for name, t in one.items())


@pytest.mark.slow
def test_a_recipe_names_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    search = {"class_path": "Keep", "init_args": {"blocks": [0, 1, 6, 7]}}
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, "search": search, "recover": {"steps": 4, "optimizer": MUON}}))
    assert main(["validate", str(path)]) == 0
    assert ", by Muon" in " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert run(path, tmp_path / "run") == 0
    assert run(path, tmp_path / "run", "--recover.steps=8", "--extend") == 0
    assert run(path, tmp_path / "run", "--recover.optimizer=AdamW") == 2
    err = capsys.readouterr().err
    assert re.search(r"recover\.optimizer: Muon -> AdamW", err)
    assert run(path, tmp_path / "other", "--recover.optimizer=Mion") == 2
    assert "optimizer (of recover or train): no torch.optim.Mion" in capsys.readouterr().err
