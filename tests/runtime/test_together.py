"""Two processes and what befalls one of them: both skip, save, stop or fail, and neither waits for ever."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import tinyfusion_core as tiny
from forks import script, start, wait
from interrupted import BAD, Torn, recovered, stopped, substituted
from places import TESTS
from tinyfusion_core.runtime.locking import owned
from tinyfusion_core.runtime.run_folder import RUN
from toys import planted_data

PROGRAM = """
import json, os, signal, sys, warnings
from dataclasses import replace
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
import tinyfusion_core as tiny
from tinyfusion_core.errors import FailedElsewhere, Interrupted
from tinyfusion_core.runtime.distributed import on_every_rank, shutdown, on_main_process
from interrupted import BAD, TRAINER, Torn, recovered
from toys import Match, planted_data
from tinyfusion_core.dataloading.order import Order
torch.set_num_threads(1)
warnings.simplefilter("ignore")
accelerator, folder = TRAINER.accelerator, Path(sys.argv[2])
assert accelerator.num_processes == 2
me = accelerator.process_index

def expect(error, text, work):
    try:
        work()
    except BaseException as e:
        assert type(e) is error and text in str(e), (type(e), e)
        return e
    raise AssertionError(f"{error.__name__} was not raised")

# What fails on one process fails on both, with one message.
def fails_on(process, error):
    def work():
        if me == process:
            raise error
        return "fine"
    return work

assert on_every_rank(lambda: me) == me
assert on_main_process(lambda: me + 40) == 40
for process in (0, 1):
    kind = tiny.UserError if me == process else FailedElsewhere
    expect(kind, "disk", lambda: on_every_rank(fails_on(process, tiny.UserError("disk"))))
kind = ZeroDivisionError if me == 0 else FailedElsewhere
expect(kind, "division", lambda: on_main_process(lambda: 1 / 0))
told = expect(Interrupted, "now", lambda: on_every_rank(fails_on(1, Interrupted("now", signal.SIGTERM))))
assert told.signum == signal.SIGTERM

class OnOne(Match):
    def prepare(self, batch, rng):
        if me == 1 and rng.stage == "recover":
            self.act(rng)
        inputs = super().prepare(batch, rng)
        return {name: value * self.factor(rng) for name, value in inputs.items()}
    def act(self, rng): pass
    def factor(self, rng): return 1.0

# One process is asked to stop: both finish the step, save, and say that it was SIGTERM.
class Asked(OnOne):
    def act(self, rng):
        if rng.step == 11:
            os.kill(os.getpid(), signal.SIGTERM)
whole = recovered()
run = tiny.RunFolder(folder / "stopped")
told = expect(Interrupted, "stopped at step 12 of 20 of recover", lambda: recovered(run, loss=Asked()))
assert told.signum == signal.SIGTERM
if me == 0:
    import shutil
    shutil.copytree(run.path, folder / "two to one")
accelerator.wait_for_everyone()
resumed = recovered(run)
assert all(torch.equal(value, resumed[name]) for name, value in whole.items())

# More processes than before.
more = recovered(tiny.RunFolder(folder / "one to two"))

# Half of the loss is no number: both skip the step.
class Half(OnOne):
    def factor(self, rng):
        return float("nan") if me == 1 and rng.step == 5 else 1.0
run = tiny.RunFolder(folder / "nan")
found = recovered(run, loss=Half())
assert run.metrics()[-1]["skipped"] == 1
assert all(value.isfinite().all() for value in found.values())
both = accelerator.gather(torch.cat([value.flatten() for value in found.values()])[None])
assert torch.equal(both[0], both[1])

# The clock of one process says that it is time for a checkpoint.
hurried = replace(TRAINER, checkpoint_every=1000, checkpoint_minutes=1e-9 if me == 1 else 1e9, keep_checkpoints=99)
run = tiny.RunFolder(folder / "clock")
recovered(run, hurried)
manifest = json.loads((run.checkpoints("recover").path / "manifest.json").read_text())
assert [entry["step"] for entry in manifest["checkpoints"]] == list(range(1, 21)), manifest

# Samples that one process meets are counted by both; too many end both.
run = tiny.RunFolder(folder / "torn")
torn = Torn(planted_data(), BAD)
substituted = recovered(run, replace(TRAINER, max_bad_samples=99), train=torn)
met_by_the_second = frozenset([Order(0, "recover", 64, 16)[8]])
kind = tiny.UserError if me == 1 else FailedElsewhere
expect(kind, "image file is truncated", lambda: recovered(train=Torn(planted_data(), met_by_the_second)))

# The main process alone cannot write: both end.
class Full(Match):
    def prepare(self, batch, rng):
        if me == 0 and rng.stage == "recover" and rng.step == 7:
            (folder / "full" / "metrics.jsonl").unlink()
            (folder / "full" / "metrics.jsonl").mkdir()
        return super().prepare(batch, rng)
kind = tiny.UserError if me == 0 else FailedElsewhere
calm = replace(TRAINER, checkpoint_every=1000)
expect(kind, "metrics.jsonl: is a folder", lambda: recovered(tiny.RunFolder(folder / "full"), calm, loss=Full()))

if me == 0:
    torch.save({"one to two": more, "torn": substituted}, folder / "out.pt")
accelerator.wait_for_everyone()

# One is killed: the other says that it has died, and does not wait. (Launchers end it soon, which is not what we see.)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
class Killed(OnOne):
    def act(self, rng):
        if rng.step == 7:
            os.kill(os.getpid(), signal.SIGKILL)
expect(tiny.UserError, "has died", lambda: recovered(loss=Killed()))
expect(tiny.UserError, "has died", lambda: on_every_rank(lambda: me))
shutdown()
(folder / "left.txt").touch()
"""


def close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.allclose(value, b[name], atol=1e-5) for name, value in a.items())


def test_the_program_leaves_the_others_before_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads of gloo that are left aborted two processes in five after all of their work was done."""

    def work() -> int:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        return 7

    monkeypatch.setattr("tinyfusion_core.cli.main", work)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("tinyfusion_core", run_name="__main__")
    assert ended.value.code == 7
    assert not dist.is_initialized()


@pytest.mark.slow
def test_two_processes_bear_it_alike(tmp_path: Path) -> None:
    stopped(tmp_path / "one to two")
    (tmp_path / "job.py").write_text(PROGRAM)
    log = tmp_path / "log.txt"
    wait(start(partial(script, tmp_path / "job.py", TESTS, tmp_path), log, processes=2))
    assert (tmp_path / "left.txt").exists(), log.read_text()[-4000:]
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    whole = recovered()
    # Another number of processes goes on to the same numbers, to the rounding of a sum.
    assert close(found["one to two"], whole)
    assert close(recovered(tiny.RunFolder(tmp_path / "two to one")), whole)
    # The same samples are put in the place of bad ones, and as many are counted.
    assert close(found["torn"], recovered(train=substituted()))
    counted = tiny.RunFolder(tmp_path / "torn").metrics()[-1]["bad_samples"]
    run = tiny.RunFolder(tmp_path / "torn by one")
    with pytest.warns(UserWarning, match="took another one"):
        recovered(
            run, tiny.Trainer(batch_size=16, precision="fp32", max_bad_samples=99), train=Torn(planted_data(), BAD)
        )
    assert run.metrics()[-1]["bad_samples"] == counted > 0


@pytest.mark.slow
def test_when_the_main_process_is_refused_all_end_with_one_message(recipe: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "tinyfusion_core", "run", str(recipe), "--run-dir", str(tmp_path / "run")]
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    with owned(tmp_path / "run", RUN):
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 1
    assert done.stderr.count("error: ") == done.stderr.count("another tinyfusion is at work in this folder") == 1
    assert done.stderr.count("exitcode  : 2") == 2
    assert [p.name for p in (tmp_path / "run").iterdir()] == [".lock"]
