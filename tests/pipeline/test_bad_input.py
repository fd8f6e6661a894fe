"""Bad input: one message, exit code 2, no traceback, nothing half-written."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tinyfusion_core as tiny
from places import ROOT
from small_run import SHIPPED
from tinyfusion_core.cli import main
from tinyfusion_dit.model import DiT


def wrong(recipe: Path, capsys, *flags: str, command: str = "run") -> str:
    extra = ["--run-dir", str(recipe.parent / "run")] if command == "run" else []
    assert main([command, str(recipe), *extra, *flags]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert "Traceback" not in err
    assert not (recipe.parent / "run" / "recipe.yaml").exists()
    return err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--search.stepz", "3"], "search.stepz: unknown key; did you mean 'steps'?"),
        (["--serch.steps", "3"], "serch: unknown key; did you mean 'search'?"),
        (["--trainer.batchsize", "3"], "trainer.batchsize: unknown key; did you mean 'batch_size'?"),
        (["--backbone", "DiTT"], "backbone: unknown class 'DiTT'; did you mean 'DiT'?"),
        (["--search.update", "Lora"], "search.update: unknown class 'Lora'; did you mean 'LoRA'?"),
        (["--data", "os.system"], "data: unknown class 'os.system'"),
        (["--evaluate", "[HeldOut]"], "evaluate[0]: unknown class 'HeldOut'; did you mean 'HeldOutLoss'?"),
        (["--search.steps", "many"], "search.steps is 'many'; expected a whole number"),
        (["--trainer.batch_size", "2:4"], "trainer.batch_size is '2:4'; expected a whole number"),
        (["--trainer.batch_size=1:30:00"], "trainer.batch_size is '1:30:00'; expected a whole number"),
        (["--trainer.batch_size='2:4'"], "trainer.batch_size is '2:4'; expected a whole number"),
        (["--search.lr_gates", "1:30.5"], "search.lr_gates is '1:30.5'; expected a number or null"),
        (["--trainer.precision", "fp23"], "trainer.precision is 'fp23'; expected 'auto' or 'fp32' or 'bf16' or 'fp16'"),
        (
            ["--evaluate", "[{class_path: Latency, init_args: {rounds: x}}]"],
            "evaluate[0].rounds is 'x'; expected",
        ),
        (["--trainer.activation_checkpointing", "yes"], "activation_checkpointing is 'yes'; expected true or false"),
        (["--search.pattern", "[2, 3]"], "[2, 3] does not fit 'blocks' with 8 blocks: group 3"),
        (["--recover.steps", "0"], "steps (of recover or train) is 0; expected at least 1"),
        (["--search.pattern", "null"], "search: give pattern or keep or budget or sampler"),
        (["--loss", "null"], "the key 'loss' is missing"),
        (["--search.steps"], "--search.steps: a value is missing"),
        (["--backbone.checkpoint", "nowhere.pt"], "backbone.checkpoint: 'nowhere.pt' does not exist"),
        (["--search", "null"], "recover: there is no search"),
        (["--search.pattern", "[2, 4"], "'[2, 4' is not readable as YAML"),
        (["--search.pattern", "[3:4, 2:4, 1:1]"], "group 3 of 3 ends at block 8, but 'blocks' has 8 blocks"),
        (["--trainer.log_every", "0"], "trainer.log_every is 0; expected at least 1"),
        (["--search.update", "null"], "search.update: null is not allowed; expected WeightUpdate"),
        (["--loss.cfg_scale", "null"], "loss.cfg_scale: null is not allowed; expected a number"),
        (["--trainer.batch_size", "null"], "trainer.batch_size: null is not allowed; expected a whole number"),
        (["--recover.lr_final", "1"], "lr_final (of recover or train) is 1.0; expected a rate from 0 to lr"),
        (["--loss.spacing=stride", "--loss.sampling_steps=300"], "no integer stride keeps exactly 300"),
        (["--train.steps", "8"], "train: begins with random weights, backbone.checkpoint would not be used"),
        (["--evaluate.1.class_path=1"], "evaluate is {'1': {'class_path': 1}}; expected a list of Metric"),
        (["--evaluate.1.class_path=no.such"], "expected a list of Metric"),
        (['--={"x": 1}'], "expected --section.key value"),
        (["--search.pattern", "124"], "search.pattern: 124 is no pattern. Give [keep, of]"),
        (["--trainer", "5"], "trainer: got 5; expected a mapping"),
        (["--search.ema", "2"], "search.ema is 2.0; expected a decay"),
        (["--search.tau", "[4, 0]"], "search.tau is (4.0, 0.0); expected temperatures above 0"),
        (["--search.lr_gates", "-1"], "search.lr_gates is -1.0"),
        (["--search.update.rank", "0"], "update.rank is 0; expected at least 1"),
        (["--search.update.targets", "(("], "'((' is no regular expression"),
        (["--evaluate", "[{class_path: Latency, init_args: {rounds: 0}}]"], "Latency.rounds is 0"),
        (["--loss.learn_sigma", "true"], "loss.learn_sigma is true, but the network has 1 output channels"),
        (["--search", "{class_path: Keep, init_args: {blocks: [0, 1, 1]}}"], "names a block twice"),
    ],
)
def test_wrong_recipes(recipe: Path, capsys, flags: list[str], message: str) -> None:
    assert message in wrong(recipe, capsys, *flags)


def test_yaml_that_is_none(recipe: Path, capsys) -> None:
    recipe.write_text("backbone: [")
    assert "not readable as YAML" in wrong(recipe, capsys)
    recipe.write_text("just words")
    assert "a recipe is a mapping" in wrong(recipe, capsys)
    assert main(["run", str(recipe.with_name("missing.yaml"))]) == 2
    assert "missing.yaml: no such recipe" in capsys.readouterr().err


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


def small_weights() -> dict[str, torch.Tensor]:
    return load_file(SHIPPED / "model.safetensors")


def sizes() -> list[str]:
    network = json.loads((SHIPPED / "config.json").read_text())["network"]
    return [f"--backbone.{key}={json.dumps(value)}" for key, value in network.items()]


def test_wrong_checkpoints(recipe: Path, tmp_path: Path, capsys) -> None:
    def with_file(name: str) -> str:
        return wrong(recipe, capsys, "--backbone.checkpoint", str(tmp_path / name), *sizes())

    (tmp_path / "cut.safetensors").write_bytes((SHIPPED / "model.safetensors").read_bytes()[:5000])
    assert "damaged or cut short" in with_file("cut.safetensors")

    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04 and no more")
    assert "cut.pt: damaged or cut short" in with_file("cut.pt")

    with (tmp_path / "evil.pt").open("wb") as file:
        pickle.dump({"model": Payload(tmp_path / "was-here")}, file)
    assert "refused, it is not a file of plain tensors" in with_file("evil.pt")
    torch.save({"model": small_weights(), "callback": Payload(tmp_path / "was-here")}, tmp_path / "evil2.pt")
    assert "refused, it is not a file of plain tensors" in with_file("evil2.pt")
    assert not (tmp_path / "was-here").exists()

    other = DiT(input_size=8, patch_size=2, in_channels=1, hidden_size=32, depth=8, num_heads=4, num_classes=10)
    save_file(other.state_dict(), tmp_path / "other.safetensors")
    message = with_file("other.safetensors")
    assert "another architecture" in message
    assert "x_embedder.proj.weight is [32, 1, 2, 2], expected [48, 1, 2, 2]" in message

    torch.save([1, 2], tmp_path / "list.pt")
    assert "holds no state dict" in with_file("list.pt")


def test_unwritable_run_folder(recipe: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("in the way")
    assert main(["run", str(recipe), "--run-dir", str(tmp_path / "file" / "run")]) == 2
    assert "the folder cannot be written" in capsys.readouterr().err


@pytest.mark.slow
def test_full_disk_leaves_the_old_checkpoint_intact(tmp_path: Path) -> None:
    # The operating system refuses to let files grow: what a full disk looks like to the program.
    code = f"""
import resource, signal, torch
from pathlib import Path
from tinyfusion_core.errors import UserError
from tinyfusion_core.runtime.run_folder import RunFolder
from tinyfusion_core.runtime.files import save_tensors
run = RunFolder({str(tmp_path)!r})
checkpoints = run.checkpoints("search")
checkpoints.save(1, {{"step": 1, "weights": torch.arange(1000)}}, keep=1)
save_tensors(Path({str(tmp_path)!r}) / "w.safetensors", {{"a": torch.ones(3)}})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
for write in (
    lambda: checkpoints.save(2, {{"step": 2, "weights": torch.arange(1_000_000)}}, keep=1),
    lambda: save_tensors(Path({str(tmp_path)!r}) / "w.safetensors", {{"a": torch.ones(1_000_000)}}),
):
    try:
        write()
    except UserError as e:
        print(e)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all("cannot be written" in line and "Free space" in line for line in lines)
    checkpoints = tiny.RunFolder(tmp_path).checkpoints("search")
    assert checkpoints.load(checkpoints.newest() or "")["step"] == 1
    assert torch.equal(load_file(tmp_path / "w.safetensors")["a"], torch.ones(3))
    assert {p.name for p in tmp_path.rglob("*") if p.is_file()} == {"00000001.pt", "manifest.json", "w.safetensors"}


def test_saved_students_are_verified(tmp_path: Path) -> None:
    recipe = tiny.load_recipe(ROOT / "recipes" / "quickstart.yaml")
    task = tiny.Task(
        backbone=recipe.backbone, loss=recipe.loss, train=recipe.data.train(), held_out=recipe.data.held_out()
    )
    decision = tiny.Keep([0, 1, 5])(task, recipe.trainer)
    student = tiny.prune(task, decision)
    folder = tiny.save_pretrained(student, task, decision, tmp_path / "student")
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([3, 900]), torch.tensor([1, 10])
    assert torch.equal(tiny.load_pretrained(folder)(x, t, y), student(x, t, y))
    # It is a teacher to whoever prunes on.
    from tinyfusion_dit import DiT as Backbone

    assert torch.equal(Backbone(checkpoint=str(folder)).build()(x, t, y), student(x, t, y))

    tiny.Keep([0, 1])(task, recipe.trainer).save(folder / "decision.json")
    with pytest.raises(tiny.UserError, match=r"decision\.json: not the file that config\.json was written for"):
        tiny.load_pretrained(folder)
    decision.save(folder / "decision.json")
    weights = load_file(folder / "model.safetensors")
    save_file({k: v + 1 for k, v in weights.items()}, folder / "model.safetensors")
    with pytest.raises(tiny.UserError, match=r"model\.safetensors: not the file"):
        tiny.load_pretrained(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(tiny.UserError, match="no such file"):
        tiny.load_pretrained(folder)


def test_show_and_sample_of_what_is_no_run(tmp_path: Path, recipe: Path, capsys) -> None:
    assert main(["show", str(tmp_path)]) == 2
    assert "not a run folder" in capsys.readouterr().err
    (tmp_path / "recipe.yaml").write_text(recipe.read_text())
    for command in (["show"], ["budgets"], ["sample"], ["export", "--to", "indices"]):
        assert main([*command, str(tmp_path)]) == 2
        assert "not a run folder (no run.json of a run in it)" in capsys.readouterr().err
    (tmp_path / "run.json").write_text(json.dumps({"format_version": 1, "settings": {}}))
    assert main(["show", str(tmp_path)]) == 2
    assert "not a finished run" in capsys.readouterr().err
    assert main(["sample", str(tmp_path)]) == 2
    assert "no student yet" in capsys.readouterr().err


def test_a_student_is_pushed_through_the_hub_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The hub itself cannot be had in tests: what is checked is what its client is asked to do.
    from huggingface_hub import CommitInfo, HfApi

    asked: list[tuple[str, dict]] = []
    url = "https://huggingface.co/me/student/commit/1"
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo, **how: asked.append((repo, how)))

    def upload(self: HfApi, **how: str) -> CommitInfo:
        asked.append((how["repo_id"], how))
        return CommitInfo(commit_url=url, commit_message="", commit_description="", oid="1")

    monkeypatch.setattr(HfApi, "upload_folder", upload)
    with pytest.raises(tiny.UserError, match=r"holds no config\.json"):
        tiny.push_to_hub(tmp_path, "me/student")
    assert not asked
    assert tiny.push_to_hub(SHIPPED, "me/student") == url
    assert asked == [
        ("me/student", {"private": True, "exist_ok": True}),
        ("me/student", {"repo_id": "me/student", "folder_path": str(SHIPPED)}),
    ]
