"""A recovery that has ended goes on with more steps, as though it had never stopped."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import tinyfusion_core as tiny
from forks import command, start, wait
from interrupted import assert_equal, lines
from marks import slow_but
from small_run import RECIPE, run
from tinyfusion_core.cli import main
from toys import Match, Planted, planted_data

TRAINER = tiny.Trainer(batch_size=16, precision="fp32", seed=0, checkpoint_every=4, log_every=3)
CONSTANT = tiny.Recover(steps=20, lr=1e-2, schedule="constant", ema=0.9)
PLANNED = tiny.Recover(steps=20, lr=1e-2, lr_final=1e-3, horizon=9, warmup=0.3, gap_lr=2.0)
WAYS = {
    "constant": CONSTANT,
    "beyond a cosine": PLANNED,
    "LoRA": replace(PLANNED, update=tiny.LoRA(rank=2), ema=0.0),
    "judged": replace(CONSTANT, validation=tiny.Validation(every=4, samples=16, patience=4)),
    "distilled": replace(PLANNED, kd=tiny.MaskedKD(beta=(0.5, 0.1))),
}


def recovered(how: tiny.Recover, folder: Path) -> dict[str, torch.Tensor]:
    task = tiny.Task(backbone=Planted(), loss=Match(), train=planted_data(), held_out=planted_data(16))
    decision = tiny.Decision(blocks=tuple(task.blocks), kept=(1, 3, 4), method="Keep")
    folder.mkdir(exist_ok=True)
    return how(task, tiny.prune(task, decision), decision, TRAINER, tiny.RunFolder(folder)).state_dict()


@pytest.mark.numerics
@pytest.mark.parametrize("name", slow_but(WAYS, *[*WAYS][:2]))
def test_more_steps_are_what_all_at_once_are(name: str, tmp_path: Path) -> None:
    how = WAYS[name]
    before = recovered(replace(how, steps=12), tmp_path / "extended")
    extended, whole = recovered(how, tmp_path / "extended"), recovered(how, tmp_path / "whole")
    assert_equal(extended, whole)
    assert lines(tiny.RunFolder(tmp_path / "extended")) == lines(tiny.RunFolder(tmp_path / "whole"))
    assert any(not torch.equal(t, before[key]) for key, t in whole.items())


def test_beyond_the_horizon_all_stays_as_it_ended(tmp_path: Path) -> None:
    recovered(replace(PLANNED, kd=tiny.MaskedKD(beta=(0.5, 0.1))), tmp_path / "run")
    logged = {entry["step"]: entry for entry in tiny.RunFolder(tmp_path / "run").metrics()}
    assert logged[3]["lr"] == pytest.approx([2e-2 * 3 / 4])  # every block is beside a gap
    for step in (9, 12, 20):
        assert logged[step]["lr"] == pytest.approx([2e-3])
        assert logged[step]["beta"] == pytest.approx(0.1)
    assert logged[6]["lr"][0] > 2e-3


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe, and a finished run of 12 steps of recovery."""
    folder = tmp_path_factory.mktemp("short")
    search = {"class_path": "Keep", "init_args": {"blocks": [0, 2, 5, 7]}}
    (folder / "small.yaml").write_text(yaml.safe_dump({**RECIPE, "search": search}))
    assert run(folder / "small.yaml", folder / "run") == 0
    return folder


def student(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "student" / "model.safetensors")


@pytest.mark.slow
def test_a_run_goes_on_after_its_end_and_after_a_kill(
    short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, folder = short / "small.yaml", shutil.copytree(short / "run", tmp_path / "run")
    assert [path.name for path in (folder / "checkpoints").glob("*/*.pt")] == ["00000012.pt"]
    before, log = student(folder), tiny.RunFolder.log

    def stopping(self: tiny.RunFolder, stage: str, step: int, values: dict[str, Any]) -> None:
        log(self, stage, step, values)
        if step == 20:
            raise KeyboardInterrupt

    flags = "--recover.steps=26", "--extend"
    with monkeypatch.context() as patch:
        patch.setattr(tiny.RunFolder, "log", stopping)
        assert run(recipe, folder, *flags) == 130
    assert "--recover.steps=26 --extend" in capsys.readouterr().err
    assert not (folder / "metrics.json").exists()  # of a student that is no more the run's
    assert_equal(student(folder), before)  # until there is another
    assert run(recipe, folder, *flags) == 0
    assert run(recipe, tmp_path / "whole", "--recover.steps=26", "--recover.horizon=12") == 0
    assert_equal(student(folder), student(tmp_path / "whole"))
    assert lines(tiny.RunFolder(folder)) == lines(tiny.RunFolder(tmp_path / "whole"))
    one, other = (
        {m["name"]: m["values"] for m in json.loads((at / "metrics.json").read_text())["measurements"]}
        for at in (folder, tmp_path / "whole")
    )
    assert one["held-out loss"] == other["held-out loss"]
    assert json.loads((folder / "run.json").read_text())["extended"] == {"recover": [12]}
    assert "recover extended after 12 steps" in (folder / "report.html").read_text()
    assert "extended after" not in (tmp_path / "whole" / "report.html").read_text()
    # The same command finds nothing left to do; without the flag it is another recipe.
    assert run(recipe, folder, *flags) == 0
    assert run(recipe, folder, "--recover.steps=26") == 2
    err = capsys.readouterr().err
    assert "recover.horizon: 12 -> None" in err
    assert err.rstrip().endswith(f"--run-dir {folder} --extend")
    assert run(recipe, folder, *flags, "--evaluate=[]", "--restart-from=evaluate") == 0
    assert "recover extended after 12 steps" in (folder / "report.html").read_text()
    # What begins anew was not extended.
    assert run(recipe, folder, "--recover.steps=4", "--restart-from=recover") == 0
    assert "extended" not in json.loads((folder / "run.json").read_text())


@pytest.mark.slow
def test_it_can_be_extended_again_and_by_two_processes(short: Path, tmp_path: Path) -> None:
    recipe, folder = short / "small.yaml", shutil.copytree(short / "run", tmp_path / "run")
    assert run(recipe, folder, "--recover.steps=16", "--extend") == 0
    two = command("run", recipe, "--run-dir", folder, "--recover.steps=20", "--extend")
    assert wait(start(two, tmp_path / "log", processes=2)) == [0, 0], (tmp_path / "log").read_text()[-3000:]
    assert "recover extended after 12 and 16 steps" in (folder / "report.html").read_text()
    assert run(recipe, tmp_path / "whole", "--recover.steps=20", "--recover.horizon=12") == 0
    whole = student(tmp_path / "whole")
    assert all(torch.allclose(t, whole[name], atol=1e-5) for name, t in student(folder).items())


REFUSED = {
    "--recover.steps=8": r"has\n  recover.steps: 12 -> 8",
    "--recover.steps=12": "no recovery has more steps than before; raise recover.steps",
    "--recover.steps=20 --recover.lr=1e-3": "recover.lr: 0.0002 -> 0.001",
    "--recover.steps=20 --recover.horizon=15": "recover.horizon: None -> 15",
    "--recover.steps=20 --trainer.seed=9": "trainer.seed: 3 -> 9",
    "--recover=null": "recover.steps: 12 -> None",
    "--recover.steps=20 --restart-from=recover": "--restart-from recover begins anew what --extend goes on with",
}


@pytest.mark.parametrize("flags", slow_but(REFUSED, "--recover.steps=8", "--recover.steps=20 --recover.lr=1e-3"))
def test_nothing_else_is_extended(flags: str, short: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shutil.copytree(short / "run", tmp_path / "run")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert run(short / "small.yaml", folder, *flags.split(), "--extend") == 2
    assert REFUSED[flags].replace(r"\n", "\n") in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_without_a_state_nothing_goes_on(short: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, more = short / "small.yaml", ("--recover.steps=20", "--extend")
    assert run(recipe, tmp_path / "none", *more) == 2
    assert f"{tmp_path / 'none'} holds no run to go on with" in capsys.readouterr().err
    folder = tmp_path / "run"
    assert run(recipe, folder, "--recover.steps=4", "--trainer.keep_state=false") == 0
    assert not (folder / "checkpoints").exists()
    capsys.readouterr()
    assert run(recipe, folder, *more) == 2
    assert "has no training state of recover (trainer.keep_state was false" in capsys.readouterr().err
    assert run(recipe, folder, *more[:1]) == 2
    assert "--extend" not in capsys.readouterr().err  # it is not offered either
    damaged = shutil.copytree(short / "run", tmp_path / "damaged")
    (damaged / "checkpoints" / "recover" / "00000012.pt").write_bytes(b"")
    assert run(recipe, damaged, *more) == 2
    assert "damaged checkpoint" in capsys.readouterr().err
    assert (damaged / "metrics.json").exists()


def test_what_its_validation_has_ended_stays_ended(
    short: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    judged = "--recover.validation={every: 4, samples: 8, until: 1000.0}"
    assert run(short / "small.yaml", tmp_path / "run", judged) == 0
    capsys.readouterr()
    assert run(short / "small.yaml", tmp_path / "run", judged, "--recover.steps=20", "--extend") == 2
    assert "recover was ended at step 4 by its validation or a callback" in capsys.readouterr().err


@pytest.mark.slow
def test_of_several_rounds_the_last_goes_on_and_others_by_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = ({"class_path": "Keep", "init_args": {"blocks": blocks}} for blocks in ([0, 2, 5, 7], [0, 2]))
    rounds = {"d4": {"search": first, "recover": {"steps": 4}}, "d2": {"search": second, "recover": {"steps": 4}}}
    recipe, folder = tmp_path / "rounds.yaml", tmp_path / "run"
    kept = {key: value for key, value in RECIPE.items() if key not in ("search", "recover")}
    recipe.write_text(yaml.safe_dump({**kept, "rounds": rounds, "evaluate": []}, sort_keys=False))
    assert run(recipe, folder) == 0
    assert run(recipe, folder, "--rounds.d2.recover.steps=8", "--extend") == 0
    whole = ("--rounds.d2.recover.steps=8", "--rounds.d2.recover.horizon=4")
    assert run(recipe, tmp_path / "whole", *whole) == 0
    assert_equal(student(folder / "d2"), student(tmp_path / "whole" / "d2"))
    earlier = ("--rounds.d2.recover.steps=8", "--rounds.d4.recover.steps=6", "--extend")
    capsys.readouterr()
    assert run(recipe, folder, *earlier) == 2
    assert "begin with the student of d4.recover; add --restart-from d2.search" in capsys.readouterr().err
    assert run(recipe, folder, *earlier, "--restart-from=d2.search") == 0
    assert run(recipe, tmp_path / "both", *earlier[:2], "--rounds.d4.recover.horizon=4") == 0
    assert_equal(student(folder / "d2"), student(tmp_path / "both" / "d2"))
    assert main(["show", str(folder)]) == 0
