"""Whole runs through the command line: resume, restart, and what a user sees when something is wrong."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import tinyfusion_core as tiny
from forks import command, start, wait
from small_run import RECIPE, SHIPPED, run
from tinyfusion_core.cli import main
from tinyfusion_core.pipeline.tasks import make_task
from tinyfusion_core.pruning.prune import WEIGHTS
from tinyfusion_core.runtime.locking import owned
from tinyfusion_core.runtime.run_folder import RUN
from tinyfusion_dit.model import DiT


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
    assert main(["watch", str(folder)]) == 0
    assert "8 → 4 blocks" in capsys.readouterr().out
    names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert names == {
        ".lock", "recipe.yaml", "run.json", "stages.json", "metrics.jsonl", "metrics.json", "decision.json",
        "student/model.safetensors", "student/config.json", "student/decision.json", "student/README.md",
        "samples.safetensors", "report.html", "figures/dynamics.svg", "figures/marginals.svg",
        "figures/loss_search.svg", "figures/loss_recover.svg",
        "checkpoints/recover/manifest.json", "checkpoints/recover/00000012.pt",  # for --extend
        "figures/samples_teacher.png", "figures/samples_pruned.png", "figures/samples_recovered.png",
    }  # fmt: skip
    decision = tiny.Decision.load(folder / "decision.json")
    assert len(decision.kept) == 4
    provenance = decision.provenance
    assert provenance["seed"] == 3
    assert provenance["source"]["sha256"] == tiny.load_recipe(recipe).backbone.source()["sha256"]
    assert len(provenance["recipe_sha256"]) == 64
    assert provenance["versions"]["torch"] == torch.__version__.partition("+")[0]
    hardware = json.loads((folder / "run.json").read_text())["hardware"]
    assert hardware == {"device": "cpu", "precision": "no", "processes": 1, "threads": 1}
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


@pytest.mark.slow
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


def wait_for_step(process: ForkServerProcess, run_dir: Path, stage: str, step: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and wait([process], 0.01) == [None]:
        path = run_dir / "metrics.jsonl"
        for line in path.read_text().splitlines() if path.exists() else ():
            if f'"stage": "{stage}"' in line and line.endswith("}") and json.loads(line)["step"] >= step:
                return
    pytest.fail(f"{stage} never came to step {step}")


@pytest.mark.slow
def test_ctrl_c_saves_says_how_to_go_on_and_goes_on(recipe: Path, tmp_path: Path) -> None:
    flags = ["--search.steps=20", "--recover.steps=20", "--trainer.checkpoint_every=1000"]
    stopped = tmp_path / "stopped"
    for stage in ("search", "recover"):
        log = tmp_path / stage
        (process,) = start(command("run", recipe, "--run-dir", stopped, *flags), log)
        wait_for_step(process, stopped, stage, 4)
        os.kill(process.pid, signal.SIGINT)
        assert wait([process]) == [130]
        err = log.read_text()
        assert f"of 20 of {stage}" in err
        assert f"tinyfusion run {recipe} --run-dir {stopped} --search.steps=20" in err
        assert (stopped / "checkpoints" / stage / "manifest.json").exists()
    assert run(recipe, stopped, *flags) == 0
    assert run(recipe, tmp_path / "whole", *flags) == 0
    assert_same_outcome(stopped, tmp_path / "whole")


def offered(err: str) -> list[list[str]]:
    """The two commands that a refusal offers in any case, as arguments."""
    lines = [line.strip() for line in err.splitlines() if line.startswith("  tinyfusion run")]
    assert len(lines) == 2 + ("--extend" in lines[-1])
    return [shlex.split(line)[1:] for line in lines[:2]]


SHORT = ["--search.steps=4", "--recover.steps=4"]


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished short run, to copy."""
    folder = tmp_path_factory.mktemp("short")
    (folder / "small.yaml").write_text(yaml.safe_dump(RECIPE))
    assert run(folder / "small.yaml", folder / "run", *SHORT) == 0
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flag", "named", "stage"),
    [
        pytest.param("--recover.steps=8", "recover.steps: 4 -> 8", "recover", marks=pytest.mark.slow),
        pytest.param("--trainer.seed=9", "trainer.seed: 3 -> 9", "search", marks=pytest.mark.slow),
        pytest.param("--loss.label_drop=0.2", "loss.label_drop: 0.1 -> 0.2", "search", marks=pytest.mark.slow),
        pytest.param("--recover=null", "recover.steps: 4 -> None", "recover", marks=pytest.mark.slow),
        pytest.param("--evaluate=[Latency]", "evaluate", "evaluate", marks=pytest.mark.slow),
        pytest.param("--loss.cfg_scale=2", "loss.cfg_scale: 1.0 -> 2.0", "evaluate", marks=pytest.mark.slow),
        ("--search=null --recover=null", "search: Search -> None", "evaluate"),
    ],
)
def test_changed_settings_are_named_and_the_way_on_works(
    recipe: Path, short: Path, tmp_path: Path, capsys, flag: str, named: str, stage: str
) -> None:
    folder = shutil.copytree(short, tmp_path / "run")
    assert run(recipe, folder, *SHORT, *flag.split()) == 2
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
    # Nothing is left of what was replaced.
    made = [{str(p.relative_to(run)) for p in run.rglob("*")} for run in (folder, Path(f"{folder}-2"))]
    assert made[0] == made[1]
    stages = [{e["stage"] for e in tiny.RunFolder(run).metrics()} for run in (folder, Path(f"{folder}-2"))]
    assert stages[0] == stages[1]


def test_a_restart_after_the_change_would_mix_two_recipes(recipe: Path, short: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(short, tmp_path / "run")
    decision = (tmp_path / "run" / "decision.json").read_text()
    assert run(recipe, tmp_path / "run", "--search.steps=8", "--recover.steps=4", "--restart-from", "recover") == 2
    assert "--restart-from search" in capsys.readouterr().err
    assert (tmp_path / "run" / "decision.json").read_text() == decision
    # What changes no number is no other setting.
    assert run(recipe, tmp_path / "run", *SHORT, "--trainer.log_every=1", "--trainer.num_workers=1") == 0


def test_a_restart_leaves_nothing_of_what_it_replaces(recipe: Path, short: Path, tmp_path: Path, capsys) -> None:
    folder = shutil.copytree(short, tmp_path / "run")
    assert run(recipe, folder, "--search=null", "--recover=null", "--restart-from=search") == 0
    assert not (folder / "decision.json").exists()
    assert not (folder / "student").exists()
    capsys.readouterr()
    assert main(["show", str(folder)]) == 0
    assert "→" not in capsys.readouterr().out


def test_a_decision_that_is_not_the_students_is_noticed(recipe: Path, short: Path, tmp_path: Path, capsys) -> None:
    folder = shutil.copytree(short, tmp_path / "run")
    decision = json.loads((folder / "decision.json").read_text())
    (folder / "decision.json").write_text(json.dumps({**decision, "kept": [0]}))
    assert run(recipe, folder, *SHORT) == 2
    assert "not the decision that student/ was made from" in capsys.readouterr().err


def test_two_runs_do_not_share_a_folder(recipe: Path, short: Path, tmp_path: Path, capsys) -> None:
    with owned(shutil.copytree(short, tmp_path / "run"), RUN):
        assert run(recipe, tmp_path / "run", *SHORT) == 2
    assert f"another tinyfusion is at work in this folder (process {os.getpid()} on " in capsys.readouterr().err
    assert run(recipe, tmp_path / "run", *SHORT) == 0


@pytest.mark.slow
def test_a_recovery_that_diverged_is_an_error_with_advice(recipe: Path, tmp_path: Path, capsys) -> None:
    assert run(recipe, tmp_path / "run", *SHORT, "--recover.lr=1e9") == 2
    err = capsys.readouterr().err
    assert "error: recover: loss or gradient not finite" in err and "Lower the learning rate" in err
    assert not (tmp_path / "run" / "metrics.json").exists()


@pytest.mark.slow
def test_two_processes_share_the_work_and_one_of_them_writes(recipe: Path, short: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    ranks = start(command("run", recipe, "--run-dir", tmp_path / "two", *SHORT), log, processes=2)
    assert wait(ranks) == [0, 0], log.read_text()[-3000:]
    assert log.read_text().count("report:") == 1
    one, two = (load_file(folder / "student" / "model.safetensors") for folder in (short, tmp_path / "two"))
    assert all(torch.allclose(v, two[k], atol=1e-4) for k, v in one.items())
    steps = [[(e["stage"], e["step"]) for e in outcome(folder)[2]] for folder in (short, tmp_path / "two")]
    assert steps[0] == steps[1]


@pytest.mark.slow
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


@pytest.mark.slow
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
    tiny.Keep([0, 1])(make_task(tiny.load_recipe(recipe)), tiny.Trainer(precision="fp32")).save(decision)
    assert run(recipe, tmp_path / "second", "--recover=null") == 2
    assert "search.decision (its content)" in capsys.readouterr().err


@pytest.mark.slow
def test_a_network_trained_from_scratch_is_pruned_in_the_same_run(recipe: Path, tmp_path: Path) -> None:
    content = yaml.safe_load(recipe.read_text())
    sizes = {"input_size": 8, "patch_size": 2, "in_channels": 1, "hidden_size": 16, "depth": 4, "num_heads": 2}
    content["backbone"] = {"class_path": "DiT", "init_args": {**sizes, "num_classes": 10, "learn_sigma": False}}
    content["train"] = {"steps": 8, "lr": 1e-3}
    recipe.write_text(yaml.safe_dump(content))
    assert run(recipe, tmp_path / "run", "--search.steps=4", "--recover.steps=4") == 0
    assert len(tiny.load_pretrained(tmp_path / "run" / "teacher").blocks) == 4
    assert len(tiny.load_pretrained(tmp_path / "run" / "student").blocks) == 2
    source = tiny.Decision.load(tmp_path / "run" / "decision.json").provenance["source"]
    assert source["sha256"] == json.loads((tmp_path / "run" / "teacher" / "config.json").read_text())["sha256"][WEIGHTS]


@pytest.mark.slow
def test_latents_and_a_training_checkpoint_from_search_to_student(recipe: Path, tmp_path: Path, capsys) -> None:
    # What a user of the full-size recipe has, in small: four channels, a learned variance, moments, EMA weights.
    sizes = {"input_size": 8, "patch_size": 2, "hidden_size": 16, "depth": 4, "num_heads": 2, "num_classes": 10}
    network = DiT(**sizes)
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    data = tmp_path / "latents"
    data.mkdir()
    numbers = np.random.default_rng(0)
    for name in ("features", "flipped"):
        np.save(data / f"{name}.npy", 3 * numbers.random((40, 8, 8, 8), dtype=np.float32))
    np.save(data / "labels.npy", numbers.integers(0, 10, 40))
    metadata = {"format_version": 1, "vae": "sd", "scale": 0.18215, "kind": "moments"}
    (data / "metadata.json").write_text(json.dumps(metadata))
    content = yaml.safe_load(recipe.read_text())
    content["backbone"]["init_args"] = {**sizes, "checkpoint": str(tmp_path / "0007000.pt"), "licence": "cc-by-nc-4.0"}
    content["loss"] = "GaussianDiffusion"
    content["data"] = {
        "class_path": "Latents",
        "init_args": {"folder": str(data), "vae": "sd", "scale": 0.18215, "num_held_out": 8},
    }
    recipe.write_text(yaml.safe_dump(content))
    # A fresh network is no teacher, and the run says so; after a little training it is one.
    torch.save({"model": weights, "ema": weights, "args": argparse.Namespace(lr=1)}, tmp_path / "0007000.pt")
    assert run(recipe, tmp_path / "untrained", "--search.steps=8", "--recover.steps=4") == 2
    assert "is it the right checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "untrained").exists()
    task = make_task(tiny.load_recipe(recipe), network)
    tiny.Recover(steps=80, lr=1e-2, ema=0)(task, network, None, tiny.Trainer(precision="fp32", batch_size=16))
    container = {"model": weights, "ema": network.state_dict(), "args": argparse.Namespace(lr=1)}
    torch.save(container, tmp_path / "0007000.pt")
    assert run(recipe, tmp_path / "run", "--search.steps=8", "--recover.steps=4") == 0
    student = tiny.load_pretrained(tmp_path / "run" / "student")
    assert student.config["depth"] == 2
    assert "license: cc-by-nc-4.0" in (tmp_path / "run" / "student" / "README.md").read_text()
    assert not (tmp_path / "run" / "samples.safetensors").exists()  # latents cannot be shown
    assert main(["sample", str(tmp_path / "run")]) == 2
