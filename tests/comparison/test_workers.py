"""Results of a comparison that other processes compute, started by Ray or submitit or by nobody."""

from __future__ import annotations

import argparse
import json
import os
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

import tinyfusion_core as tiny
from comparisons import FIRST_AND_LAST, LOSS, RECOVER, TRAINER, task
from pieces import note
from places import TESTS
from small_run import RECIPE
from tinyfusion_core.cli import main
from tinyfusion_core.cli.compare import some_workers
from tinyfusion_core.comparison.results import Entry
from tinyfusion_core.comparison.study import Audit, Compare
from tinyfusion_core.errors import Interrupted, UserError
from tinyfusion_core.evaluation.metrics import Metric, Models
from tinyfusion_core.pipeline.compare import compare_recipe
from tinyfusion_core.runtime.files import write_json
from tinyfusion_core.runtime.workers.base import Workers
from tinyfusion_core.runtime.workers.ray_tasks import RayWorkers
from tinyfusion_core.runtime.workers.slurm_jobs import SlurmWorkers


@dataclass(frozen=True)
class Depth(Metric):
    """How many blocks a network has."""

    column = "blocks"

    def __call__(self, task: tiny.Task, models: Models, trainer: tiny.Trainer) -> list[tiny.Measurement]:
        counts = {name: float(len(model.blocks)) for name, model in models.items()}
        return [tiny.Measurement("depth", counts, "", "lower")]


OTHER = replace(RECOVER, lr=1e-2, batch_size=4)


def untimed(folder: Path) -> dict[str, Any]:
    """What a comparison has found, without how long it took."""
    found = json.loads((folder / "findings.json").read_text())
    for trial in (*found["trials"], *found["masks"]):
        trial.pop("seconds", None)
        trial.pop("recovery_seconds", None)
    return found


@pytest.mark.parametrize(
    ("study", "choices", "recoveries"),
    [
        (Compare(candidates={**FIRST_AND_LAST, "again": FIRST_AND_LAST["first"]}, seeds=2, random=3), 6, 2 * 2 + 3),
        (Audit(candidates=FIRST_AND_LAST, seeds=1, masks=4, steps=2), 2, 2 + 4),
        (Compare(candidates=FIRST_AND_LAST, seeds=2, random=1, recoveries={"a": RECOVER, "b": OTHER}), 8, 8 + 1),
    ],
    ids=["compare", "audit", "recoveries"],
)
def test_what_others_compute_is_what_one_process_computes(
    study: Compare | Audit, choices: int, recoveries: int, tmp_path: Path, worked: Counter[str]
) -> None:
    evaluate = [*LOSS, Depth()]
    study(task(), RECOVER, TRAINER, tmp_path / "one", evaluate=evaluate)
    alone, handed = Counter(worked), list[Entry]()
    worked.clear()

    def elsewhere(entries: Sequence[Entry]) -> Iterator[Entry]:
        compute = study.worker(task(), RECOVER, TRAINER, tmp_path / "several", evaluate=evaluate)
        for entry in reversed(entries):  # in any order
            compute(entry)
            handed.append(entry)
            yield entry
        now = json.loads((tmp_path / "several" / "cells" / "now.json").read_text())
        assert now["done"] == now["total"] == len(entries)

    study(task(), RECOVER, TRAINER, tmp_path / "several", evaluate=evaluate, elsewhere=elsewhere)
    assert untimed(tmp_path / "several") == untimed(tmp_path / "one")
    assert worked == alone  # nothing twice
    assert Counter(bool(entry.kept) for entry in handed) == {False: choices, True: recoveries}
    handed.clear()
    study(task(), RECOVER, TRAINER, tmp_path / "several", evaluate=evaluate, elsewhere=elsewhere)
    assert not handed


def test_watch_shows_every_worker(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = tmp_path / "cells"
    for name, what, step in (
        ("healing-1", "first, seed 0: recovering", 3),
        ("healing-2", "last, seed 1: recovering", 7),
    ):
        tiny.RunFolder(cells / name).log("recover", step, {"loss": 0.5, "seconds": 1.0, "skipped": 0})
        write_json(cells / name / "now.json", {"part": "", "what": what, "done": 0, "total": 0})
    write_json(cells / "now.json", {"part": "", "what": "recoveries by workers", "done": 2, "total": 9})
    assert main(["watch", str(tmp_path), "--once"]) == 0
    out = capsys.readouterr().out
    told = [
        "2 of 9",
        "recoveries by workers",
        "first, seed 0: recovering",
        "step 3",
        "last, seed 1: recovering",
        "step 7",
    ]
    assert [what for what in told if what in out] == told
    assert [out.index(what) for what in told] == sorted(out.index(what) for what in told)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("4", RayWorkers(4)),
        ("auto", RayWorkers(address="auto")),
        ("ray://head:10001", RayWorkers(address="ray://head:10001")),
        ("10.0.0.1:6379", RayWorkers(address="10.0.0.1:6379")),
        ("slurm:8", SlurmWorkers(8)),
        (
            "slurm:8,timeout_min=240,slurm_partition=gpu",
            SlurmWorkers(8, {"timeout_min": 240, "slurm_partition": "gpu"}),
        ),
    ],
)
def test_workers_are_named(typed: str, meant: Workers) -> None:
    assert some_workers(typed) == meant


@pytest.mark.parametrize("typed", ["0", "-1", "four", "slurm:", "slurm:0", "slurm:4,gpu", "", "1" * 5000, "slurm:2,=3"])
def test_what_names_no_workers_is_refused(typed: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="workers|KEY=VALUE"):
        some_workers(typed)


def test_workers_are_not_for_several_processes(recipe: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("tinyfusion_core.runtime.workers.base.rank_and_world_size", lambda: (0, 2))
    assert main(["compare", str(recipe), "--run-dir", str(tmp_path / "out"), "--workers", "2"]) == 2
    assert "--workers starts processes of its own" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_slurm_that_is_not_there_and_what_it_does_not_know(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--workers slurm: .*slurm cluster"):
        list(SlurmWorkers(2).run(print, [1], tmp_path))
    with pytest.raises(UserError, match="--workers slurm: .*minutes"):
        list(SlurmWorkers(2, {"minutes": 3}, cluster="local").run(print, [1], tmp_path))


HERE = [RayWorkers(2), SlurmWorkers(2, {"timeout_min": 5}, cluster="local")]
NAMES = ["ray", "submitit"]


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")])))


@pytest.mark.slow
@pytest.mark.usefixtures("importable")
@pytest.mark.parametrize("workers", HERE, ids=NAMES)
def test_processes_do_the_pieces_and_tell_what_was_wrong(workers: Workers, tmp_path: Path) -> None:
    assert sorted(workers.run(partial(note, tmp_path), [0, 2, 4], tmp_path / "logs")) == [0, 2, 4]
    assert str(os.getpid()) not in {(tmp_path / name).read_text() for name in "024"}
    with pytest.raises(UserError, match="^no third piece$"):
        list(workers.run(partial(note, tmp_path), [3], tmp_path / "logs"))
    with pytest.raises(Exception, match="(?s)note.*ZeroDivisionError"):  # with its traceback
        list(workers.run(partial(note, tmp_path), [5], tmp_path / "logs"))


@pytest.mark.slow
@pytest.mark.usefixtures("importable")
def test_a_piece_whose_process_died_is_begun_again_by_ray(tmp_path: Path) -> None:
    assert sorted(RayWorkers(2).run(partial(note, tmp_path), [0, 1], tmp_path)) == [0, 1]
    assert (tmp_path / "1").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("importable")
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_and_leaves_handlers_as_they_were(signum: int, tmp_path: Path) -> None:
    before = signal.getsignal(signum)
    with pytest.raises(Interrupted, match=signal.Signals(signum).name) as stopped:
        for _ in RayWorkers(1).run(partial(note, tmp_path), range(1000, 2000), tmp_path):
            os.kill(os.getpid(), signum)
    assert stopped.value.signum == signum
    assert len(list(tmp_path.iterdir())) < 1000
    assert signal.getsignal(signum) is before


@pytest.mark.slow
@pytest.mark.usefixtures("importable")
def test_a_job_that_died_is_told_with_its_log(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"half-way; {tmp_path / 'logs'} has what it printed. The same command goes on"):
        list(HERE[1].run(partial(note, tmp_path), [1], tmp_path / "logs"))


@pytest.mark.slow
@pytest.mark.parametrize("workers", HERE, ids=NAMES)
def test_a_recipe_compared_by_workers(workers: Workers, recipe: Path, tmp_path: Path, monkeypatch) -> None:
    candidates = {
        "learned": {"pattern": [4, 8], "steps": 3, "lr_gates": 1e-2},
        "first": {"class_path": "FirstN", "init_args": {"keep": 4}},
    }
    settings = {"compare": {"candidates": candidates, "seeds": 1, "random": 2}, "recover": {"steps": 2}}
    recipe.write_text(yaml.safe_dump({**RECIPE, **settings}))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    made = tiny.load_recipe(recipe)
    compare_recipe(made, "compare", tmp_path / "one")
    compare_recipe(made, "compare", tmp_path / "several", workers=workers)
    assert untimed(tmp_path / "several") == untimed(tmp_path / "one")
    assert not list((tmp_path / "several" / "cells").glob("*/*"))
