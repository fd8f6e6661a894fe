"""`tinyfusion watch`: a run as its files tell it, while it goes on and after it has ended."""

from __future__ import annotations

import io
import json
import os
import signal
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from rich.console import Console

import tinyfusion_core as tiny
from small_run import RECIPE
from tinyfusion_core.cli import main
from tinyfusion_core.cli.watch import TAIL_BYTES, Tail, View, num_steps, shown_stages, sparkline
from tinyfusion_core.pipeline.resuming.check import Asked, take_run_folder
from tinyfusion_core.runtime.files import write_json


def frame(folder: Path, view: View | None = None) -> str:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print((view or View(folder)).frame())
    return console.export_text()


def line(step: int, stage: str = "search", **more: object) -> str:
    return (
        json.dumps({"stage": stage, "step": step, "loss": 1 / step, "seconds": step / 4, "skipped": 0, **more}) + "\n"
    )


def test_a_run_is_shown_while_it_stands_and_when_it_is_done(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny.RunFolder(tmp_path / "run")
    assert main(["watch", str(folder.path), "--once"]) == 2
    assert "no recipe.yaml" in capsys.readouterr().err
    made = tiny.load_recipe(recipe)
    take_run_folder(made, folder, Asked("tinyfusion run"))
    decision = tiny.Keep([0, 3, 5, 6]).preview([f"blocks.{i}" for i in range(8)])
    decision.save(folder / "decision.json")
    folder.finish("search", "key", 75.0)
    for step in (4, 8):
        folder.log("recover", step, {"loss": 1.0, "seconds": step, "skipped": 0})
    assert main(["watch", str(folder.path), "--once"]) == 0
    out = capsys.readouterr().out
    assert "keeps 0 3 5 6" in out
    assert [word for line in out.splitlines() for word in ("done", "now", "later") if line.startswith(word)] == [
        "done", "now", "later"
    ]  # fmt: skip
    assert "in 1 min 15 s" in out and "8 of 12" in out and "1 steps/s" in out and "4 s left" in out
    assert "device cpu" in out
    table = [asdict(tiny.Measurement("held-out loss", {"teacher": 0.25, "recovered": 0.5}, "", "lower"))]
    write_json(folder / "metrics.json", {"measurements": table})
    folder.finish("recover", "key", 9.0)
    folder.finish("evaluate", "key", 3.0)
    assert main(["watch", str(folder.path)]) == 0  # ends by itself
    assert "2.00x" in capsys.readouterr().out


def test_a_search_shows_its_pace_its_doubts_and_its_silence(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**RECIPE, "search": {"init_args": {"steps": 400}}}))
    doubts = {"decision": [0, 2], "marginals": [1.0, 0.0, 0.6, 0.4], "confidence": 0.36}
    (tmp_path / "metrics.jsonl").write_text("".join(line(step, **doubts) for step in range(10, 210, 10)))
    view = View(tmp_path)
    out = frame(tmp_path, view)
    assert "200 of 400" in out and "4 steps/s" in out and "50 s left" in out
    assert "0.360" in out and "█▁▅▄  keeps 0 2" in out
    assert "nothing logged" not in out and "skipped" not in out
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(line(210, **{**doubts, "skipped": 3}) + '{"stage": "search", "st')  # and a line being written
    out = frame(tmp_path, view)
    assert "210 of 400" in out and "3 steps whose loss" in out
    before = time.time() - 600
    os.utime(tmp_path / "metrics.jsonl", (before, before))
    assert "nothing logged for 10 min 0 s" in frame(tmp_path)
    assert "nothing logged" not in frame(tmp_path, view)  # it has seen the file change just now


def test_only_the_end_of_a_long_file_is_read_and_a_rewound_one_anew(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(line(step) for step in range(1, 20_001)))
    assert path.stat().st_size > 4 * TAIL_BYTES
    tail = Tail(path)
    assert tail.read() and not tail.read()
    assert tail.entries["search"][-1]["step"] == 20_000
    assert tail.entries["search"][0]["step"] > 15_000
    with path.open("a") as file:
        file.write(line(20_001)[:20])
    assert tail.read() and tail.entries["search"][-1]["step"] == 20_000
    with path.open("a") as file:
        file.write(line(20_001)[20:])
    assert tail.read() and tail.entries["search"][-1]["step"] == 20_001
    again = tmp_path / "new"
    again.write_text("".join(line(step) for step in range(1, 8)))
    again.replace(path)
    assert tail.read() and [e["step"] for e in tail.entries["search"]] == list(range(1, 8))


def test_rounds_and_finals_have_their_steps(tmp_path: Path) -> None:
    finals = {"class_path": "Finals", "init_args": {"steps": 25, "search": {"init_args": {"steps": 90}}}}
    one = {"search": finals, "recover": {"steps": 7}}
    settings = {"train": {"steps": 5}, "rounds": {"d4": one, "d2": {"search": {"class_path": "Uniform"}}}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    assert [(s.title, s.round, num_steps(s)) for s in shown_stages(tiny.RunFolder(tmp_path))] == [
        ("train", "", 5), ("d4 search", "d4", 90), ("d4 recover", "d4", 7), ("d2 search", "d2", None),
        ("evaluate", "", None),
    ]  # fmt: skip


def test_a_race_shows_who_proposes_and_who_recovers(tmp_path: Path) -> None:
    race = {"class_path": "Race", "init_args": {"keep": 4, "steps": 300}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**RECIPE, "search": race}))
    (tmp_path / "metrics.jsonl").write_text("".join(line(step) for step in range(10, 60, 10)))
    parts = tmp_path / "checkpoints" / "search"
    parts.mkdir(parents=True)
    now = {"part": "", "what": "Search proposes", "done": 0, "total": 300, "steps": 150}
    (parts / "now.json").write_text(json.dumps(now))
    out = frame(tmp_path)
    assert "0 of 300" in out and "Search proposes" in out and "50 of 150" in out
    now = {"part": "race 1 of ab", "what": "race 1: recovers 0 3", "done": 40, "total": 300, "steps": 12}
    (parts / "now.json").write_text(json.dumps(now))
    assert "40 of 300" in (out := frame(tmp_path)) and "50 of 150" not in out
    (parts / "race 1 of ab").mkdir()
    (parts / "race 1 of ab" / "metrics.jsonl").write_text(line(5, "race 1"))
    assert "race 1: recovers 0 3" in (out := frame(tmp_path)) and "5 of 12" in out


def test_a_comparison_shows_its_cells(tmp_path: Path) -> None:
    cells = tmp_path / "cells"
    (cells / "healing-ab").mkdir(parents=True)
    (cells / "decision-cd.json").write_text("{}")
    now = {"part": "healing-ab", "what": "Uniform, seed 3: recovering", "done": 4, "total": 30}
    (cells / "now.json").write_text(json.dumps(now))
    (cells / "healing-ab" / "metrics.jsonl").write_text(line(10, "recover") + line(20, "recover"))
    out = frame(tmp_path)
    assert "1 decisions, 0 calibrations, 0 recoveries done" in out
    assert "4 of 30" in out and "Uniform, seed 3: recovering" in out and "step 20" in out


def test_sparkline() -> None:
    assert sparkline([0, 1, 2, 7]) == "▁▂▃█"
    assert sparkline([5, 5]) == "▁▁"
    assert sparkline([]) == ""
    assert sparkline([-1, 0.5, 2], 0.0, 1.0) == "▁▅█"


def test_ctrl_c_leaves_quietly(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    interrupt = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT))
    interrupt.start()
    assert main(["watch", str(tmp_path)]) == 0
    interrupt.join()
    assert "Traceback" not in capfd.readouterr().err
