"""Whole runs through the command line: resume, restart, and what a user sees when something is wrong."""

from __future__ import annotations

import json
import os
import pickle
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import tinyfusion_core as tiny
from tinyfusion_core.cli import main
from tinyfusion_dit.model import DiT

SHIPPED = Path(__file__).parent.parent / "plugins" / "tinyfusion_dit" / "checkpoints" / "digits"
RECIPE = {
    "backbone": {"class_path": "DiT", "init_args": {"checkpoint": "digits"}},
    "loss": {
        "class_path": "GaussianDiffusion",
        "init_args": {"learn_sigma": False, "sampler": "ddim", "sampling_steps": 4, "guided_channels": None},
    },
    "data": "Digits",
    "trainer": {"precision": "fp32", "batch_size": 8, "seed": 3, "log_every": 4, "checkpoint_every": 6},
    "search": {"pattern": [2, 4], "steps": 24, "lr_gates": 1e-2},
    "recover": {"steps": 24},
    "evaluate": [{"class_path": "HeldOutLoss", "init_args": {"draws": 1}}],
}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return path


def run(recipe: Path, run_dir: Path, *flags: str) -> int:
    return main(["run", str(recipe), "--run-dir", str(run_dir), *flags])


def outcome(run_dir: Path) -> tuple[dict, dict[str, torch.Tensor], list[dict]]:
    decision = json.loads((run_dir / "decision.json").read_text())
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["seconds"]
    return decision, load_file(run_dir / "student" / "model.safetensors"), lines


def assert_same_outcome(a: Path, b: Path) -> None:
    (decision_a, student_a, lines_a), (decision_b, student_b, lines_b) = outcome(a), outcome(b)
    assert decision_a == decision_b
    assert student_a.keys() == student_b.keys()
    assert all(torch.equal(v, student_b[k]) for k, v in student_a.items())
    assert lines_a == lines_b


def test_a_run_leaves_everything_that_it_made(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    assert run(recipe, folder) == 0
    out = capsys.readouterr().out
    assert "8 → 4 blocks" in out
    assert f"report: {folder / 'report.html'}" in out
    names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert names == {
        ".lock", "recipe.yaml", "run.json", "stages.json", "metrics.jsonl", "metrics.json", "decision.json",
        "student/model.safetensors", "student/config.json", "student/decision.json", "student/README.md",
        "samples.safetensors", "report.html", "figures/blocks.png", "figures/dynamics.png", "figures/losses.png",
        "figures/samples_teacher.png", "figures/samples_pruned.png", "figures/samples_recovered.png",
    }  # fmt: skip
    decision = tiny.Decision.load(folder / "decision.json")
    assert len(decision.kept) == 4
    provenance = decision.provenance
    assert provenance["seed"] == 3
    assert provenance["source"]["sha256"] == tiny.load_recipe(recipe).backbone.source()["sha256"]
    assert len(provenance["recipe_sha256"]) == 64
    assert provenance["versions"]["torch"] == torch.__version__.partition("+")[0]
    # The student's folder loads by itself and is the pruned teacher's architecture.
    student = tiny.load_pretrained(folder / "student")
    assert len(student.blocks) == student.config["depth"] == 4
    card = (folder / "student" / "README.md").read_text()
    assert "license: apache-2.0" in card
    # The figures are those of the run.
    measured = {m["name"]: m["values"] for m in json.loads((folder / "metrics.json").read_text())["measurements"]}
    assert measured["blocks"] == {"teacher": 8, "pruned": 4, "recovered": 4}
    assert measured["held-out loss"]["teacher"] < measured["held-out loss"]["recovered"]
    assert measured["FLOPs"]["pruned"] < 0.6 * measured["FLOPs"]["teacher"]
    # A second call finds nothing left to do, whatever is said to `show` or `sample`.
    before = (folder / "metrics.json").stat().st_mtime_ns, (folder / "student" / "model.safetensors").stat().st_mtime_ns
    assert run(recipe, folder) == 0
    after = (folder / "metrics.json").stat().st_mtime_ns, (folder / "student" / "model.safetensors").stat().st_mtime_ns
    assert before == after
    capsys.readouterr()
    assert main(["show", str(folder)]) == 0
    assert "held-out loss" in capsys.readouterr().out
    assert main(["sample", str(folder), "--num", "5", "--out", str(tmp_path / "grid.png")]) == 0
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_recipe_gives_the_same_run(recipe: Path, tmp_path: Path) -> None:
    assert run(recipe, tmp_path / "a") == run(recipe, tmp_path / "b", "--trainer.checkpoint_every=1000") == 0
    assert_same_outcome_but_recipe(tmp_path / "a", tmp_path / "b")
    assert run(recipe, tmp_path / "c", "--trainer.seed=4", "--recover.steps=4") == 0
    _, a, _ = outcome(tmp_path / "a")
    _, c, _ = outcome(tmp_path / "c")
    assert any(not torch.equal(v, c[k]) for k, v in a.items())


def assert_same_outcome_but_recipe(a: Path, b: Path) -> None:
    (_, student_a, lines_a), (_, student_b, lines_b) = outcome(a), outcome(b)
    assert all(torch.equal(v, student_b[k]) for k, v in student_a.items())
    assert lines_a == lines_b


def command(recipe: Path, run_dir: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "tinyfusion_core", "run", str(recipe), "--run-dir", str(run_dir), *flags]


def wait_for_step(process: subprocess.Popen, run_dir: Path, stage: str, step: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        path = run_dir / "metrics.jsonl"
        for line in path.read_text().splitlines() if path.exists() else ():
            if f'"stage": "{stage}"' in line and line.endswith("}") and json.loads(line)["step"] >= step:
                return
        time.sleep(0.01)
    pytest.fail(f"{stage} never came to step {step}")


@pytest.mark.parametrize("stages", [[("search", 8)], [("recover", 12)], [("search", 16), ("recover", 4)]])
def test_kill_and_run_again_is_as_if_nothing_had_happened(recipe: Path, tmp_path: Path, stages: Sequence) -> None:
    flags = ["--search.steps=200", "--recover.steps=200"]  # long enough to be hit in the middle
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    for stage, step in stages:
        process = subprocess.Popen(
            command(recipe, tmp_path / "killed", *flags), env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        with process:
            wait_for_step(process, tmp_path / "killed", stage, step)
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
    assert run(recipe, tmp_path / "killed", *flags) == 0
    assert run(recipe, tmp_path / "whole", *flags) == 0
    assert_same_outcome(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.parametrize("stage", ["search", "recover"])
def test_ctrl_c_saves_says_how_to_go_on_and_goes_on(recipe: Path, tmp_path: Path, stage: str) -> None:
    flags = ["--search.steps=60", "--recover.steps=60", "--trainer.checkpoint_every=1000"]
    process = subprocess.Popen(
        command(recipe, tmp_path / "stopped", *flags),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        wait_for_step(process, tmp_path / "stopped", stage, 8)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"of 60 of {stage}" in err
    assert f"tinyfusion run {recipe} --run-dir {tmp_path / 'stopped'} --search.steps=60" in err
    assert (tmp_path / "stopped" / "checkpoints" / f"{stage}.pt").exists()
    assert run(recipe, tmp_path / "stopped", *flags) == 0
    assert run(recipe, tmp_path / "whole", *flags) == 0
    assert_same_outcome(tmp_path / "stopped", tmp_path / "whole")


def offered(err: str) -> list[list[str]]:
    """The two commands that a refusal offers, as arguments."""
    lines = [line.strip() for line in err.splitlines() if line.startswith("  tinyfusion run")]
    assert len(lines) == 2
    return [shlex.split(line)[1:] for line in lines]


SHORT = ["--search.steps=4", "--recover.steps=4"]


@pytest.mark.parametrize(
    ("flag", "named", "stage"),
    [
        ("--recover.steps=8", "recover.steps: 4 -> 8", "recover"),
        ("--trainer.seed=9", "trainer.seed: 3 -> 9", "search"),
        ("--loss.label_drop=0.2", "loss.label_drop: 0.1 -> 0.2", "search"),
        ("--recover=null", "recover.steps: 4 -> None", "evaluate"),
        ("--evaluate=[Latency]", "evaluate", "evaluate"),
    ],
)
def test_changed_settings_are_named_and_the_way_on_works(
    recipe: Path, tmp_path: Path, capsys, flag: str, named: str, stage: str
) -> None:
    folder = tmp_path / "run"
    assert run(recipe, folder, *SHORT) == 0
    capsys.readouterr()
    assert run(recipe, folder, *SHORT, flag) == 2
    err = capsys.readouterr().err
    assert named in err
    new, replaced = offered(err)
    assert replaced[-2:] == ["--restart-from", stage]
    assert str(folder) + "-2" in new
    assert main(replaced) == 0
    assert main(new) == 0
    results = [json.loads((p / "metrics.json").read_text())["measurements"] for p in (folder, Path(f"{folder}-2"))]
    untimed = [[m for m in r if m["unit"] not in ("ms", "samples/s")] for r in results]
    assert untimed[0] == untimed[1]


def test_a_restart_after_the_change_would_mix_two_recipes(recipe: Path, tmp_path: Path, capsys) -> None:
    assert run(recipe, tmp_path / "run", *SHORT) == 0
    decision = (tmp_path / "run" / "decision.json").read_text()
    assert run(recipe, tmp_path / "run", "--search.steps=8", "--recover.steps=4", "--restart-from", "recover") == 2
    assert "--restart-from search" in capsys.readouterr().err
    assert (tmp_path / "run" / "decision.json").read_text() == decision
    # What changes no number is no other setting.
    assert run(recipe, tmp_path / "run", *SHORT, "--trainer.log_every=1", "--trainer.num_workers=1") == 0


def test_a_restart_leaves_nothing_of_what_it_replaces(recipe: Path, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "run"
    assert run(recipe, folder, *SHORT) == 0
    assert run(recipe, folder, "--search=null", "--recover=null", "--restart-from=search") == 0
    assert not (folder / "decision.json").exists()
    assert not (folder / "student").exists()
    capsys.readouterr()
    assert main(["show", str(folder)]) == 0
    assert "→" not in capsys.readouterr().out


def test_two_runs_do_not_share_a_folder(recipe: Path, tmp_path: Path, capsys) -> None:
    with tiny.RunFolder(tmp_path / "run").owned():
        assert run(recipe, tmp_path / "run", *SHORT) == 2
    assert "another run is at work" in capsys.readouterr().err
    assert run(recipe, tmp_path / "run", *SHORT) == 0


def test_a_student_that_diverged_is_a_finding_not_a_crash(recipe: Path, tmp_path: Path) -> None:
    metrics = "--evaluate=[HeldOutLoss, {class_path: Frechet, init_args: {num_samples: 20}}]"
    assert run(recipe, tmp_path / "run", *SHORT, "--recover.lr=1e9", metrics) == 0
    rows = {m["name"]: m for m in json.loads((tmp_path / "run" / "metrics.json").read_text())["measurements"]}
    assert rows["Fréchet distance"]["values"]["teacher"] > 0
    loss = rows["held-out loss"]
    assert loss["values"]["recovered"] is None or loss["values"]["recovered"] > 10
    assert (tmp_path / "run" / "report.html").exists()


def test_two_processes_share_the_work_and_one_of_them_writes(recipe: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "tinyfusion_core", "run", str(recipe), "--run-dir", str(tmp_path / "two"), *SHORT]
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("report:") == 1
    assert run(recipe, tmp_path / "one", *SHORT) == 0
    one, two = (load_file(tmp_path / name / "student" / "model.safetensors") for name in ("one", "two"))
    assert all(torch.allclose(v, two[k], atol=1e-4) for k, v in one.items())
    steps = [[(e["stage"], e["step"]) for e in outcome(tmp_path / name)[2]] for name in ("one", "two")]
    assert steps[0] == steps[1]


def test_another_checkpoint_under_the_same_name_is_noticed(recipe: Path, tmp_path: Path, capsys) -> None:
    import shutil

    shutil.copytree(SHIPPED, tmp_path / "teacher")
    flags = ("--backbone.checkpoint", str(tmp_path / "teacher"), "--search.steps=4", "--recover.steps=4")
    assert run(recipe, tmp_path / "run", *flags) == 0
    weights = load_file(SHIPPED / "model.safetensors")
    save_file({k: v + 1e-3 for k, v in weights.items()}, tmp_path / "teacher" / "model.safetensors")
    capsys.readouterr()
    assert run(recipe, tmp_path / "run", *flags) == 2
    assert "backbone.checkpoint (its content)" in capsys.readouterr().err


def test_a_published_decision_is_applied_to_another_checkpoint(recipe: Path, tmp_path: Path, capsys) -> None:
    assert run(recipe, tmp_path / "first", "--search.steps=4", "--recover=null") == 0
    decision = tmp_path / "first" / "decision.json"
    again = yaml.safe_load(recipe.read_text())
    again["search"] = {"class_path": "Keep", "init_args": {"decision": str(decision)}}
    recipe.write_text(yaml.safe_dump(again))
    assert run(recipe, tmp_path / "second", "--recover=null") == 0
    kept = [tiny.Decision.load(tmp_path / name / "decision.json").kept for name in ("first", "second")]
    assert kept[0] == kept[1]
    # The file is an input: with another content it is another run.
    tiny.Keep([0, 1])(tiny.run.make_task(tiny.load_recipe(recipe)), tiny.Trainer(precision="fp32")).save(decision)
    assert run(recipe, tmp_path / "second", "--recover=null") == 2
    assert "search.decision (its content)" in capsys.readouterr().err


def test_a_network_trained_from_scratch_is_pruned_in_the_same_run(recipe: Path, tmp_path: Path) -> None:
    content = yaml.safe_load(recipe.read_text())
    sizes = {"input_size": 8, "patch_size": 2, "in_channels": 1, "hidden_size": 16, "depth": 4, "num_heads": 2}
    content["backbone"] = {"class_path": "DiT", "init_args": {**sizes, "num_classes": 10, "learn_sigma": False}}
    content["train"] = {"steps": 8, "lr": 1e-3}
    recipe.write_text(yaml.safe_dump(content))
    assert run(recipe, tmp_path / "run", "--search.steps=4", "--recover.steps=4") == 0
    assert len(tiny.load_pretrained(tmp_path / "run" / "teacher").blocks) == 4
    assert len(tiny.load_pretrained(tmp_path / "run" / "student").blocks) == 2


# Bad input: one message, exit code 2, no traceback


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
        (["--backbone", "DiTT"], "backbone: unknown class 'DiTT'; did you mean 'DiT'? (known: DiT)"),
        (["--search.update", "Lora"], "search.update: unknown class 'Lora'; did you mean 'LoRA'?"),
        (["--data", "os.system"], "data: unknown class 'os.system'"),
        (["--evaluate", "[HeldOut]"], "evaluate[0]: unknown class 'HeldOut'; did you mean 'HeldOutLoss'?"),
        (["--search.steps", "many"], "search.steps: Expected a <class 'int'>. Got value: many"),
        (["--search.pattern", "2:4"], "YAML reads an unquoted 2:4 in base 60; write [2, 4]"),
        (["--search.pattern", "[2, 3]"], "[2, 3] does not fit 'blocks' with 8 blocks: group 3"),
        (["--recover.steps", "0"], "steps (of recover or train) is 0; expected at least 1"),
        (["--search.pattern", "null"], "search: give pattern or sampler"),
        (["--loss", "null"], "the key 'loss' is missing"),
        (["--search.steps"], "--search.steps: a value is missing"),
        (["--backbone.checkpoint", "nowhere.pt"], "backbone.checkpoint: 'nowhere.pt' does not exist"),
        (["--search", "null"], "recover: there is no search"),
        (["--search.pattern", "[2, 4"], "'[2, 4' is not readable as YAML"),
        (["--search.pattern", "[3:4, 2:4]"], "YAML reads an unquoted 3:4, 2:4 in base 60; write [[3, 4], [2, 4]]"),
        (["--trainer.log_every", "0"], "trainer.log_every is 0; expected at least 1"),
        (["--trainer", "5"], "trainer: got 5; expected a mapping"),
        (["--search.ema", "2"], "search.ema is 2.0; expected a decay"),
        (["--search.tau", "[4, 0]"], "search.tau is (4.0, 0.0); expected temperatures above 0"),
        (["--search.lr_gates", "-1"], "search.lr_gates is -1.0"),
        (["--search.update.rank", "0"], "search.update.rank is 0; expected at least 1"),
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


def test_unquoted_ratio_in_the_file(recipe: Path, capsys) -> None:
    recipe.write_text(recipe.read_text().replace("pattern:\n  - 2\n  - 4", "pattern: 2:4"))
    assert "pattern: 2:4" in recipe.read_text()
    assert "write [2, 4]" in wrong(recipe, capsys)


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
    assert "the run folder cannot be written" in capsys.readouterr().err


def test_full_disk_leaves_the_old_checkpoint_intact(tmp_path: Path) -> None:
    # The operating system refuses to let files grow: what a full disk looks like to the program.
    code = f"""
import resource, signal, torch
from pathlib import Path
from tinyfusion_core.errors import UserError
from tinyfusion_core.run_folder import RunFolder
from tinyfusion_core.files import save_tensors
run = RunFolder({str(tmp_path)!r})
run.save_checkpoint("search", {{"step": 1, "weights": torch.arange(1000)}})
save_tensors(Path({str(tmp_path)!r}) / "w.safetensors", {{"a": torch.ones(3)}})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
for write in (
    lambda: run.save_checkpoint("search", {{"step": 2, "weights": torch.arange(1_000_000)}}),
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
    assert all("cannot be written" in line and "is intact" in line for line in lines)
    state = tiny.RunFolder(tmp_path).load_checkpoint("search")
    assert state is not None
    assert state["step"] == 1
    assert torch.equal(load_file(tmp_path / "w.safetensors")["a"], torch.ones(3))
    assert {p.name for p in tmp_path.rglob("*") if p.is_file()} == {"search.pt", "w.safetensors"}


def test_damaged_run_checkpoint_is_named(tmp_path: Path) -> None:
    run_folder = tiny.RunFolder(tmp_path)
    run_folder.save_checkpoint("search", {"step": 1})
    run_folder.checkpoint_path("search").write_bytes(b"nonsense")
    with pytest.raises(tiny.UserError, match=r"search\.pt: damaged checkpoint"):
        run_folder.load_checkpoint("search")


def test_saved_students_are_verified(tmp_path: Path) -> None:
    recipe = tiny.load_recipe(Path(__file__).parent.parent / "recipes" / "quickstart.yaml")
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
