"""Several processes see the numbers of one, and none waits for another that will not come."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import distributed_program as program
import tinyfusion_core as tiny
from forks import start, wait
from places import ROOT
from small_run import RECIPE
from tinyfusion_core.cli import main

PROGRAM = Path(program.__file__)


def torchrun(*command: object, processes: int = 2, timeout: float = 400) -> subprocess.CompletedProcess[str]:
    """Start processes that end within the time, whatever they wait for."""
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    path = os.pathsep.join(map(str, (ROOT, ROOT / "plugins", os.environ.get("PYTHONPATH", ""))))
    launcher = subprocess.Popen(
        [sys.executable, *start, *map(str, command)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        out, err = launcher.communicate(timeout=timeout)
    finally:
        launcher.terminate()  # upon which it ends what it has started
    return subprocess.CompletedProcess(launcher.args, launcher.returncode, out, err)


def run_program(folder: Path, *what: str) -> dict[str, Any]:
    log = folder / "log.txt"
    assert wait(start(partial(program.main, folder, 2, *what), log, processes=2), 400) == [0, 0], log.read_text()[
        -4000:
    ]
    return torch.load(folder / "found.pt", weights_only=True)


def assert_close(found: Any, expected: Any, where: str) -> None:
    if isinstance(expected, Mapping):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_close(found[key], value, f"{where}, {key}")
    elif isinstance(expected, list) and isinstance(expected[0], list):
        assert len(found) == len(expected), where
        for i, value in enumerate(expected):
            assert_close(found[i], value, f"{where}, {i}")
    elif isinstance(expected, torch.Tensor):
        assert torch.allclose(found, expected, atol=2e-6, rtol=1e-5), where
    else:
        assert torch.allclose(torch.tensor(found), torch.tensor(expected), atol=2e-6, rtol=1e-5), where


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("alone")
    return {
        **program.numbers(folder, program.trainer_of()),
        "long": program.long(folder / "long", program.trainer_of()),
    }


@pytest.mark.slow
def test_two_processes_see_the_numbers_of_one(tmp_path: Path, alone: dict[str, Any]) -> None:
    # Replicated in passes of two samples; sharded, each process its own half in one pass. Then stopped, and resumed
    # in one process; and what one process has begun they finish. Then one process drifts away.
    trainer = program.trainer_of()
    program.long(tmp_path / "stopped alone", trainer, stop=True)
    what = ["numbers:ddp", "numbers:fsdp", "stop:fsdp", "resume:fsdp", "drift:ddp", "drift:fsdp"]
    found = run_program(tmp_path, *what)
    expected = {name: value for name, value in alone.items() if name != "long"}
    assert_close(found["numbers:ddp"], expected, "ddp")
    assert_close(found["numbers:fsdp"], expected, "fsdp")
    assert_close(found["resume:fsdp"], alone["long"], "begun by one process, finished by two")
    assert_close(program.long(tmp_path / "stopped fsdp", trainer), alone["long"], "begun by two, finished by one")


@pytest.mark.slow
def test_recomputed_passes_and_replicated_checkpoints_give_the_same_numbers(
    tmp_path: Path, alone: dict[str, Any]
) -> None:
    trainer = program.trainer_of()
    program.long(tmp_path / "stopped alone", trainer, stop=True)
    found = run_program(tmp_path, "remembered:ddp", "remembered:fsdp", "stop:ddp", "resume:ddp")
    expected = {name: value for name, value in alone.items() if name != "long"}
    assert_close(found["remembered:ddp"], expected, "ddp")
    assert_close(found["remembered:fsdp"], expected, "fsdp")
    assert_close(found["resume:ddp"], alone["long"], "begun by one process, finished by two")
    assert_close(program.long(tmp_path / "stopped ddp", trainer), alone["long"], "begun by two, finished by one")


@pytest.mark.slow
@pytest.mark.parametrize("what", ["fail:ddp", "fail:fsdp"])
def test_a_process_that_fails_ends_the_others(tmp_path: Path, what: str) -> None:
    done = torchrun(PROGRAM, tmp_path, 2, what, timeout=240)
    assert done.returncode != 0
    assert done.stderr.count("UserError: this process cannot go on") == 1
    assert not (tmp_path / "found.pt").exists()


@pytest.mark.slow
@pytest.mark.parametrize("what", ["sleep:ddp", "sleep:fsdp"])
def test_a_process_that_hangs_is_not_waited_for(tmp_path: Path, what: str) -> None:
    start = time.monotonic()
    done = torchrun(PROGRAM, tmp_path, 2, what, timeout=300)  # it would sleep for 1,000 seconds
    assert done.returncode != 0
    assert "imed out" in done.stderr or "imeout" in done.stderr, done.stderr[-3000:]
    assert time.monotonic() - start < 240


def test_an_impossible_split_names_the_numbers() -> None:
    trainer = tiny.Trainer(batch_size=10, micro_batch_size=4, precision="fp32")
    with pytest.raises(tiny.UserError, match=r"batch_size: 10 over 1 process.*10 samples.*micro_batch_size 4; use a"):
        trainer.split(1)
    assert tiny.Trainer(batch_size=8, micro_batch_size=16, precision="fp32").split(1) == (8, 8)
    with pytest.raises(tiny.UserError, match=r"micro_batch_size is 0"):
        tiny.Trainer(micro_batch_size=0)


@pytest.mark.slow
def test_passes_and_recomputed_blocks_change_no_number(tmp_path: Path, alone: dict[str, Any]) -> None:
    name = "grouped, full"
    calls = []
    work = program.task()
    block = work.teacher.blocks[0]
    plain = block.forward
    block.forward = lambda x: calls.append(len(x)) or plain(x)  # taken over by somebody else, as accelerate does
    trainer = program.trainer_of(micro_batch_size=2, activation_checkpointing=True)
    decision = program.SEARCHES[name](work, trainer)
    assert_close(torch.tensor(decision.marginals), alone[name]["marginals"], name)
    # Four passes in each of four steps: kept rows and dropped ones once, kept ones again in the backward pass.
    assert len(calls) > 2 * 4 * 4
    assert max(calls) <= 3  # the two probes of the batch dimension, and then at most two samples
    calls.clear()
    program.SEARCHES[name](work, program.trainer_of(micro_batch_size=2))
    assert 0 < len(calls) <= 2 + 2 * 4 * 4
    assert block.__dict__["forward"](torch.zeros(1, 8)).shape == (1, 8)


def test_started_by_torchrun_but_alone_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(tiny.UserError, match="one of 2 processes .* accelerate sees 1"):
        _ = tiny.Trainer(precision="fp32").accelerator


@pytest.mark.slow
def test_every_family_is_sharded_and_distilled(tmp_path: Path) -> None:
    # Each by its tiny instance, among them networks whose head is called by the loss, and with two streams.
    found = run_program(tmp_path, "families:fsdp")["families:fsdp"]
    expected = program.families(program.trainer_of(batch_size=4))
    assert len(expected) >= 5
    assert_close(found, expected, "families")


@pytest.mark.slow
def test_branches_and_depths_give_the_same_numbers(tmp_path: Path) -> None:
    found = run_program(tmp_path, "inside:ddp", "inside:fsdp")
    for sharding in ("ddp", "fsdp"):
        expected = program.inside(program.trainer_of(batch_size=4, sharding=sharding))
        assert_close(found[f"inside:{sharding}"], expected, sharding)


@pytest.mark.slow
def test_half_precision_keeps_gates_and_weights_in_float32(tmp_path: Path, alone: dict[str, Any]) -> None:
    found = run_program(tmp_path, "half:ddp", "half:fsdp")
    for sharding in ("ddp", "fsdp"):
        marginals = found[f"half:{sharding}"]["grouped, full"]["marginals"]
        assert not torch.equal(marginals, alone["grouped, full"]["marginals"])
        assert torch.allclose(marginals, alone["grouped, full"]["marginals"], atol=0.02)
    # Shards are gathered in float32 and cast by autocast, as copies are: the same rounding.
    assert_close(found["half:fsdp"]["masked"]["norms"][0], found["half:ddp"]["masked"]["norms"][0], "first gradients")


@pytest.mark.slow
def test_compiled_blocks_change_no_number(tmp_path: Path, alone: dict[str, Any]) -> None:
    found = run_program(tmp_path, "compiled:fsdp")["compiled:fsdp"]
    assert_close(found, {name: alone[name] for name in program.BOTH}, "compiled")


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_a_whole_run_on_two_processes(tmp_path: Path, sharding: str) -> None:
    recipe = yaml.safe_load(yaml.safe_dump(RECIPE))
    sizes = {"input_size": 8, "patch_size": 2, "in_channels": 1, "hidden_size": 16, "depth": 4, "num_heads": 2}
    recipe["backbone"] = {"class_path": "DiT", "init_args": {**sizes, "num_classes": 10, "learn_sigma": False}}
    recipe["train"] = {"steps": 8, "lr": 1e-3}
    recipe["search"]["steps"] = recipe["recover"]["steps"] = 8
    recipe["recover"] |= {"kd": "MaskedKD", "start": "Inherit"}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(recipe))
    command = ("run", tmp_path / "small.yaml", "--run-dir")
    done = torchrun(
        *("-m", "tinyfusion_core", *command, tmp_path / "two"),
        *(
            "--trainer.sharding",
            sharding,
            "--trainer.micro_batch_size",
            2,
            "--trainer.activation_checkpointing",
            "true",
        ),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "two" / "run.json").read_text())["hardware"]["processes"] == 2
    assert main([*map(str, command), str(tmp_path / "one")]) == 0
    for name in ("teacher", "student"):
        one, two = (load_file(tmp_path / run / name / "model.safetensors") for run in ("one", "two"))
        assert all(torch.allclose(v, two[k], atol=1e-4) for k, v in one.items())
