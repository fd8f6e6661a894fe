"""What long jobs meet: signals, damaged files, full disks, numbers that are none. docs/faults.md lists it all."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

import tinyfusion_core as tiny
import tinyfusion_core.evaluation.metrics
import tinyfusion_core.pipeline.run
import tinyfusion_core.selection.criteria.calibration
import tinyfusion_images.pictures
from interrupted import BAD, RECOVER, TRAINER, Torn, assert_equal, lines, recovered, stopped, substituted, task
from places import ROOT, TESTS
from small_run import run
from tinyfusion_core.cli import main
from tinyfusion_core.errors import Interrupted
from tinyfusion_core.reporting.report import write_report
from tinyfusion_core.runtime import signals
from tinyfusion_core.runtime.locking import owned
from tinyfusion_core.runtime.run_folder import RUN
from tinyfusion_core.samplers.grouped import GroupedSampler
from toys import Match, planted_data


@pytest.fixture(autouse=True)
def _no_garbage_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate collects garbage after every training, which takes longer than the trainings of these tests."""
    monkeypatch.setattr("gc.collect", lambda: 0)


# Checkpoints


def test_the_last_checkpoints_are_kept_with_their_hashes(tmp_path: Path) -> None:
    run = stopped(tmp_path, keep_checkpoints=2)
    folder = run.checkpoints("recover").path
    (folder / ".00000016.pt.x.partial").write_bytes(b"a kill in the middle of a write")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert [entry["step"] for entry in manifest["checkpoints"]] == [8, 12]
    assert {p.name for p in folder.iterdir()} > {"manifest.json", "00000008.pt", "00000012.pt"}
    recovered(run)
    assert {p.name for p in folder.iterdir()} == {"manifest.json", "00000016.pt", "00000020.pt"}


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path: Path) -> None:
    whole_run = tiny.RunFolder(tmp_path / "whole")
    whole = recovered(whole_run)
    run = stopped(tmp_path / "stopped")
    newest, before = (run.checkpoints("recover").path / f"{step:08d}.pt" for step in (12, 8))
    damaged = bytearray(newest.read_bytes())
    damaged[len(damaged) // 2] ^= 1  # one bit
    newest.write_bytes(damaged)
    shutil.copytree(run.path, tmp_path / "hopeless")
    with pytest.warns(UserWarning, match=r"00000012\.pt: damaged checkpoint; going on from the one before, step 8"):
        assert_equal(recovered(run), whole)
    assert lines(run) == lines(whole_run)  # those after step 8 were made again
    hopeless = tiny.RunFolder(tmp_path / "hopeless")
    (hopeless.checkpoints("recover").path / before.name).unlink()
    with pytest.raises(tiny.UserError, match=r"00000012\.pt, .*00000008\.pt: damaged checkpoint; delete .*recover to"):
        recovered(hopeless)
    (hopeless.checkpoints("recover").path / "manifest.json").write_text("{")
    with pytest.raises(tiny.UserError, match=r"manifest\.json: damaged; delete"):
        recovered(hopeless)


def test_checkpoints_by_the_clock(tmp_path: Path) -> None:
    run = stopped(tmp_path, checkpoint_minutes=1e-9, checkpoint_every=1000, keep_checkpoints=3)
    manifest = json.loads((run.checkpoints("recover").path / "manifest.json").read_text())
    assert [entry["step"] for entry in manifest["checkpoints"]] == [10, 11, 12]


def test_a_stage_that_has_ended_is_not_trained_again(tmp_path: Path) -> None:
    # As when the disk was full just when its result was to be written.
    run = tiny.RunFolder(tmp_path)
    first = recovered(run)
    seen: Counter[int] = Counter()
    assert_equal(recovered(run, loss=Seen(seen=seen)), first)
    assert not seen


@dataclass(frozen=True)
class Seen(Match):
    """Counts what is prepared, and sends a signal when it has been enough."""

    seen: Counter[Any] = field(default_factory=Counter)
    stop_after: int = -1

    def prepare(self, batch, rng):
        if rng.stage in ("search", "recover") or rng.stage.startswith("finals"):
            self.seen[rng.stage] += 1
            if self.seen.total() == self.stop_after:
                os.kill(os.getpid(), signal.SIGTERM)
        return super().prepare(batch, rng)


@pytest.mark.slow
def test_an_interrupted_final_recovers_nothing_twice(tmp_path: Path) -> None:
    search = tiny.Search(keep=4, steps=10, update=tiny.Frozen())
    final = tiny.Finals(search=search, masks=3, steps=5, samples=16)
    whole = final(task(), TRAINER)
    seen: Counter[str] = Counter()
    run = tiny.RunFolder(tmp_path)
    for stop_after in (6, 18, 28):  # in the search, in a finalist's recovery, in the second round
        with pytest.raises(Interrupted):
            final(task(Seen(seen=seen, stop_after=stop_after)), TRAINER, run)
    assert final(task(Seen(seen=seen)), TRAINER, run) == whole
    assert seen == {"search": 10, "finals 1": 3 * 5, "finals 2": 2 * 5}


# Signals


@dataclass(frozen=True)
class Signalled(Match):
    """Sends several signals during one step."""

    signals: tuple[int, ...] = ()

    def prepare(self, batch, rng):
        if rng.stage == "recover" and rng.step == 11:
            for signum in self.signals:
                os.kill(os.getpid(), signum)
                time.sleep(0.001)  # a signal that is pending already does not count twice
        return super().prepare(batch, rng)


def test_what_a_launcher_forwards_is_one_request(tmp_path: Path) -> None:
    # A scheduler signals torchrun and its processes, and torchrun passes the signal on.
    run = tiny.RunFolder(tmp_path)
    with pytest.raises(Interrupted, match="stopped at step 12 of 20") as caught:
        recovered(run, loss=Signalled(signals=(signal.SIGTERM, signal.SIGTERM)))
    assert caught.value.signum == signal.SIGTERM
    assert run.checkpoints("recover").newest() == "00000012.pt"


def test_a_second_ctrl_c_does_not_wait_for_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "FORWARDED", 0.0)
    whole, run = recovered(), tiny.RunFolder(tmp_path)
    with pytest.raises(Interrupted, match="stopped at once by a second SIGINT"):
        recovered(run, loss=Signalled(signals=(signal.SIGINT, signal.SIGINT)))
    assert run.checkpoints("recover").newest() == "00000008.pt"
    assert_equal(recovered(run), whole)


@pytest.mark.slow
def test_signals_outside_of_the_training_loop(recipe: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    def send(signum: int, where: Any, name: str) -> Callable[..., Any]:
        """Send the signal when some function is called the next time."""
        original = getattr(where, name)

        def once(*args: Any, **kwargs: Any) -> Any:
            monkeypatch.setattr(where, name, original)
            os.kill(os.getpid(), signum)
            return original(*args, **kwargs)

        monkeypatch.setattr(where, name, once)
        return original

    flags = ["--search={class_path: LeaveOneOut, init_args: {keep: 4, samples: 16}}", "--recover.steps=4"]
    folder = tmp_path / "run"
    for signum, where, name in [
        (signal.SIGINT, tinyfusion_core.pipeline.run, "make_plan"),
        (signal.SIGTERM, tinyfusion_core.selection.criteria.calibration.Calibration, "losses"),
        (signal.SIGTERM, tinyfusion_core.evaluation.metrics.HeldOutLoss, "__call__"),
        (signal.SIGINT, tinyfusion_images.pictures, "generate"),
    ]:
        send(signum, where, name)
        assert run(recipe, folder, *flags) == 128 + signum
        err = capsys.readouterr().err
        assert f"stopped by {signal.Signals(signum).name}. Go on with:\n  tinyfusion run {recipe} --run-dir" in err
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert set(tiny.RunFolder(folder).finished()) == {"search", "recover"}
    assert run(recipe, folder, *flags) == 0
    # What a run got over is told, by the table and by the page.
    got_over = {"stage": "recover", "step": 4, "loss": 1, "lr": [1], "skipped": 3, "bad_samples": 2}
    (folder / "metrics.jsonl").write_text(json.dumps(got_over) + "\n")
    capsys.readouterr()
    assert main(["show", str(folder)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "recover: 3 steps skipped (loss or gradient not finite)" in shown
    assert "recover: 2 unreadable samples replaced" in shown
    assert "recover: 2 unreadable samples replaced" in write_report(tiny.RunFolder(folder)).read_text()


# Numbers that are none


class Wild(GroupedSampler):
    """Its gates' gradient is no number in two steps, while every loss is."""

    calls = 0

    def surrogate(self, draw, losses):
        self.calls += 1
        if self.calls in (3, 4):
            draw.mask.register_hook(lambda gradient: gradient * float("nan"))
        return super().surrogate(draw, losses)


def test_gates_whose_gradient_is_no_number_do_not_move(tmp_path: Path) -> None:
    run = tiny.RunFolder(tmp_path)
    search = tiny.Search(sampler=lambda lists: Wild(lists, [(4, 8)]), steps=9, warmup=0.0)
    decision = search(task(), TRAINER, run)
    assert [entry["skipped"] for entry in run.metrics("search")] == [1, 2, 2]
    assert all(0 < p < 1 for p in decision.marginals)
    assert run.faults("search") == {"steps skipped (loss or gradient not finite)": 2}


def test_too_many_of_them_end_the_stage_with_advice() -> None:
    with pytest.raises(
        tiny.UserError, match=r"not finite in 3 steps in a row \(up to step 6\)\. Lower the learning rate"
    ):
        recovered(trainer=replace(TRAINER, max_skipped=3), loss=Match(explode_at=(1, 3, 4, 5)))


# Data that cannot be read


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_sample_that_cannot_be_read_is_replaced_and_counted(tmp_path: Path, num_workers: int) -> None:
    run, recover = tiny.RunFolder(tmp_path), replace(RECOVER, steps=8)  # two passes over 64 samples
    trainer = replace(TRAINER, max_bad_samples=4, num_workers=num_workers)
    with pytest.warns(UserWarning, match=r"training sample [59] cannot be read: OSError: image file is trunc"):
        found = recovered(run, trainer, recover, train=Torn(planted_data(), BAD))
    assert_equal(found, recovered(recover=recover, train=substituted()))
    assert run.metrics("recover")[-1]["bad_samples"] == 4
    with (
        pytest.warns(UserWarning, match="took another one"),
        pytest.raises(tiny.UserError, match=r"sample [59] cannot be read: OSError.*max_bad_samples \(it is 3, and 4 "),
    ):
        recovered(trainer=replace(trainer, max_bad_samples=3), recover=recover, train=Torn(planted_data(), BAD))


def test_data_that_has_gone_altogether_is_named() -> None:
    trainer = replace(TRAINER, max_bad_samples=100)
    with pytest.raises(tiny.UserError, match=r"truncated, and no sample to take in its place either"):
        recovered(trainer=trainer, train=Torn(planted_data(), frozenset(range(64))))


def test_a_mistake_in_a_data_sets_code_is_no_bad_sample() -> None:
    class Wrong(Torn):
        def __getitems__(self, indices):
            raise TypeError("not of the data")

    with pytest.raises(TypeError, match="not of the data"):
        recovered(trainer=replace(TRAINER, max_bad_samples=100), train=Wrong(planted_data(), frozenset()))


def test_readers_are_stopped_by_the_trainer_alone() -> None:
    trainer = replace(TRAINER, num_workers=1)
    asked = Torn(planted_data(), frozenset(), signal_to_reader=signal.SIGTERM)
    assert_equal(recovered(trainer=trainer, train=asked), recovered())
    killed = Torn(planted_data(), frozenset(), signal_to_reader=signal.SIGKILL)
    with pytest.raises(tiny.UserError, match=r"Trainer\.num_workers: a process that reads data was killed"):
        recovered(trainer=trainer, train=killed)


# Folders and disks


def test_the_lock_dies_with_the_run_not_with_its_readers(tmp_path: Path) -> None:
    awake, woken = os.pipe()
    with owned(tmp_path, RUN):
        reader = os.fork()
        if not reader:
            os.write(woken, b"!")
            time.sleep(60)
            os._exit(0)
        os.read(awake, 1)  # else it may not have run yet
    try:
        with owned(tmp_path, RUN), pytest.raises(tiny.UserError, match=rf"\(process {os.getpid()} on "):
            owned(tmp_path, RUN).__enter__()
    finally:
        os.kill(reader, signal.SIGKILL)
        os.waitpid(reader, 0)
        os.close(awake)
        os.close(woken)


def test_a_run_that_is_refused_makes_nothing(recipe: Path, tmp_path: Path, capsys: Any) -> None:
    assert run(recipe, tmp_path / "run", "--restart-from=nonsense") == 2
    assert "no stage 'nonsense'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_fault_matrix_names_tests_that_there_are() -> None:
    matrix = (ROOT / "docs" / "faults.md").read_text()
    rows = [line for line in matrix.splitlines() if line.startswith("| ") and "---" not in line][1:]
    file = ""
    for row in rows:
        shown = re.findall(r"`(?:(test_\w+\.py)::)?(test_\w+)`", row.rsplit("|", 2)[1])
        assert shown or "the same" in row.rsplit("|", 2)[1], row
        for named, test in shown:
            file = named or file
            assert any(f"def {test}(" in path.read_text() for path in TESTS.rglob(file)), f"{file}::{test}"
