"""Long jobs on a full disk, and killed again and again; docs/faults.md lists it all."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tinyfusion_core as tiny
from interrupted import assert_equal, lines
from places import TESTS
from small_run import run

FULL = """
import contextlib, io, json, subprocess, sys
from pathlib import Path
import torch
from tinyfusion_core.cli import main
torch.set_num_threads(1)
disk, recipe = Path(sys.argv[1]), sys.argv[2]

def mount(options):
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)], check=True)

def run():
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = main(["run", recipe, "--run-dir", str(disk / "run"), "--trainer.checkpoint_every=2"])
    made = [p.name for p in disk.rglob("*") if p.is_file()]
    return [code, [line for line in said.getvalue().splitlines() if line.startswith("error")], made]

mount("ro")
outcomes = [run()]
mount("remount,rw,size=3m")
outcomes.append(run())
mount("remount,size=100m")
outcomes.append(run())
made = [(disk / "run" / name).read_text() for name in ("decision.json", "metrics.jsonl")]
print(json.dumps([outcomes, *made]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("unshare"), reason="needs a file system of its own")
def test_a_full_disk_and_one_that_cannot_be_written(recipe: Path, tmp_path: Path) -> None:
    inside = ["unshare", "--map-root-user", "--mount"]
    if subprocess.run([*inside, "mount", "-t", "tmpfs", "tmpfs", str(tmp_path)], check=False).returncode:
        pytest.skip("may not mount")
    (tmp_path / "disk").mkdir()
    program = [*inside, sys.executable, "-c", FULL, str(tmp_path / "disk"), str(recipe)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(program, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (readonly, full, free), decision, metrics = json.loads(done.stdout)
    assert [readonly[0], full[0], free[0]] == [2, 2, 0]
    assert len(readonly[1]) == len(full[1]) == 1
    assert "the folder cannot be written (Read-only file system)" in readonly[1][0]
    assert "No space left on device" in full[1][0]
    assert "Free space" in full[1][0]
    assert not any(name.endswith(".partial") for name in full[2])
    # What was there was whole: the run went on to the outcome of one with all the space in the world.
    assert run(recipe, tmp_path / "whole", "--trainer.checkpoint_every=2") == 0
    whole = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    found = [json.loads(line) for line in metrics.splitlines()]
    for entry in (*whole, *found):
        del entry["seconds"]
    assert found == whole
    assert json.loads(decision)["marginals"] == json.loads((tmp_path / "whole/decision.json").read_text())["marginals"]


SOAK = """
import json, os, random, signal, sys
from pathlib import Path
import torch
import accelerate.utils, peft
import tinyfusion_core as tiny
from tinyfusion_core.runtime.locking import owned
from tinyfusion_core.runtime.run_folder import RUN, RunFolder
from toys import Match, Planted, planted_data
torch.set_num_threads(1)
folder, draws = Path(sys.argv[1]), random.Random(3)

def search(name, die_at=None):
    # What the process holds, at every logged step.
    held, log = [], RunFolder.log
    def log_and_look(self, stage, step, values):
        log(self, stage, step, values)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        held.append([step, pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(os.listdir("/proc/self/fd"))])
        if die_at is not None and step >= die_at:
            os.kill(os.getpid(), signal.SIGKILL)
    RunFolder.log = log_and_look
    task = tiny.Task(backbone=Planted(), loss=Match(), train=planted_data(), held_out=planted_data(16))
    trainer = tiny.Trainer(batch_size=8, precision="fp32", log_every=1, checkpoint_every=20)
    run = RunFolder(folder / name)
    with owned(run.path, RUN):
        (run / "run.json").write_text(json.dumps({"format_version": 1, "settings": {}}))
        decision = tiny.Search(pattern=(4, 8), steps=2000)(task, trainer, run)
    decision.save(run / "decision.json")
    (run / "held.json").write_text(json.dumps(held))

def leg(name, die_at=None):
    pid = os.fork()
    if not pid:
        code = 1
        try:
            search(name, die_at)
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

assert leg("whole") == 0
kills = 0
while True:
    code = leg("killed", (kills + 1) * 100 + draws.randint(-20, 20))
    if code == 0:
        break
    assert code == -signal.SIGKILL, code
    kills += 1
print(json.dumps([kills, json.loads((folder / "whole" / "held.json").read_text())]))
"""


@pytest.mark.slow
def test_two_thousand_steps_with_a_kill_every_hundred(tmp_path: Path) -> None:
    paths = [str(TESTS), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    program = [sys.executable, "-c", SOAK, str(tmp_path)]
    done = subprocess.run(program, env=env, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    kills, held = json.loads(done.stdout)
    assert kills >= 19
    assert (tmp_path / "killed" / "decision.json").read_text() == (tmp_path / "whole" / "decision.json").read_text()
    whole, killed = tiny.RunFolder(tmp_path / "whole"), tiny.RunFolder(tmp_path / "killed")
    assert lines(killed) == lines(whole)
    newest = [folder.checkpoints("search").load("00002000.pt") for folder in (whole, killed)]
    assert_equal(newest[0]["weights"], newest[1]["weights"])
    memory, files = ([row[column] for row in held if row[0] >= 500] for column in (1, 2))
    assert max(memory) - memory[0] < 16, "MiB that were not given back"
    assert max(files) == min(files)
    assert not list(tmp_path.rglob("*.partial"))
    assert len(list((tmp_path / "killed" / "checkpoints" / "search").iterdir())) == 3
