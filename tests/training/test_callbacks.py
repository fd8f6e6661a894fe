"""Code of one's own in a training: it sees everything, changes nothing, and may end a stage."""

from __future__ import annotations

import logging
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

import tinyfusion_core as tiny
from forks import start, wait
from interrupted import RECOVER, TRAINER, assert_equal, lines, recovered, task
from listening import Seen, end_from_the_second, told
from places import ROOT
from tinyfusion_core.cli import main
from tinyfusion_core.runtime.progress import SWITCH


def test_callbacks_see_everything_and_change_nothing(tmp_path: Path) -> None:
    seen, run = Seen(), tiny.RunFolder(tmp_path / "run")
    assert_equal(recovered(run, told(seen, tiny.Callback())), recovered())
    assert [at.step for at in seen.steps] == list(range(1, 21))
    assert {(at.stage, at.steps, at.main) for at in seen.steps} == {("recover", 20, True)}
    assert seen.saved == [4, 8, 12, 16, 20]
    assert [{k: v for k, v in values.items() if k != "seconds"} for values in seen.logged] == lines(run)
    assert seen.logged[0]["loss"] == pytest.approx(sum(at.loss for at in seen.steps[:3]) / 3)


def test_lines_are_told_without_a_run_folder() -> None:
    seen = Seen()
    recovered(trainer=told(seen))
    assert [values["step"] for values in seen.logged] == [3, 6, 9, 12, 15, 18, 20]
    assert seen.saved == []


@pytest.mark.parametrize(("method", "step"), [("on_step", 7), ("on_log", 6), ("on_checkpoint", 8), ("on_step", 19)])
def test_a_callback_ends_a_stage_after_one_more_step(tmp_path: Path, method: str, step: int) -> None:
    seen, run = Seen(end=(method, step)), tiny.RunFolder(tmp_path / "run")
    result = recovered(run, told(seen))
    assert [at.step for at in seen.steps] == list(range(1, step + 2))
    assert seen.saved[-1] == lines(run)[-1]["step"] == step + 1
    again = Seen()
    assert_equal(recovered(run, told(again)), result)  # it has finished
    assert again.steps == []


def test_an_end_judges_and_keeps_the_best(tmp_path: Path) -> None:
    how = replace(RECOVER, validation=tiny.Validation(every=100, samples=16))
    seen = Seen(end=("on_step", 5))
    recovered(trainer=told(seen), recover=how)
    assert [values["step"] for values in seen.logged if "validation" in values] == [6]


def test_a_signal_from_a_callback_stops_so_that_the_same_call_goes_on(tmp_path: Path) -> None:
    class Pause(tiny.Callback):
        def on_step(self, at: tiny.Moment) -> None:
            if at.step == 9:
                signal.raise_signal(signal.SIGTERM)

    run = tiny.RunFolder(tmp_path / "run")
    with pytest.raises(tiny.Interrupted, match="stopped at step 10 of 20 of recover, all of it saved"):
        recovered(run, told(Pause()))
    seen = Seen()
    assert_equal(recovered(run, told(seen)), recovered())
    assert seen.steps[0].step == 11


def test_a_search_that_is_ended_decides_by_what_it_has_learned() -> None:
    seen = Seen(end=("on_step", 11))
    decision = tiny.Search(keep=4, steps=400)(task(), told(seen))
    assert {at.stage for at in seen.steps} == {"search"}
    assert decision.provenance["steps"] == 12
    assert len(decision.kept) == 4


def test_short_trainings_within_others_are_not_told(tmp_path: Path) -> None:
    seen = Seen()
    tiny.Race(keep=4, steps=40, samples=16)(task(), told(seen))
    assert {(at.stage, at.steps) for at in seen.steps} == {("search", 20)}
    alone = Seen()
    start = tiny.Search(keep=4, steps=5)
    tiny.Search(keep=4, steps=6, start=start)(task(), told(alone))
    assert {(at.stage, at.steps) for at in alone.steps} == {("search", 6)}


def test_what_is_no_callback_is_refused() -> None:
    with pytest.raises(tiny.UserError, match=r"^callbacks \(of Trainer\) is .*; expected a list of Callback"):
        tiny.Trainer(callbacks=[print])


def test_recipes_have_no_callbacks(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(tiny.UserError, match=r"trainer\.callbacks: unknown key"):
        tiny.load_recipe(ROOT / "recipes" / "quickstart.yaml", ["--trainer.callbacks=[]"])
    assert "callbacks" not in tiny.load_recipe(ROOT / "recipes" / "quickstart.yaml").settings["trainer"]
    assert main(["keys", "trainer"]) == 0
    keys = capsys.readouterr().out
    assert "progress (true or false) = true" in keys
    assert "callbacks" not in keys


@pytest.mark.slow
def test_all_processes_end_when_one_asks(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    assert wait(start(partial(end_from_the_second, tmp_path), log, processes=2)) == [0, 0], log.read_text()
    assert (tmp_path / "0.txt").read_text() == "6 True [4, 6] 2"
    assert (tmp_path / "1.txt").read_text() == "6 False [4, 6] 2"


def test_one_logger_has_the_lines_of_the_screen_and_the_checkpoints(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.INFO, logger="tinyfusion")
    recovered(tiny.RunFolder(tmp_path / "run"))
    assert {record.name for record in caplog.records} == {"tinyfusion"}
    messages = [record.getMessage() for record in caplog.records]
    assert next(m for m in messages if "saved as" in m).startswith("recover: step 4 of 20 saved as ")
    (line,) = [m for m in messages if m.startswith("recover: 20/20 loss ")]
    assert capsys.readouterr().err == line + "\n"
    for trainer, switch in ((replace(TRAINER, progress=False), "1"), (TRAINER, "0")):
        monkeypatch.setenv(SWITCH, switch)
        caplog.clear()
        recovered(trainer=trainer)
        tiny.Greedy(keep=4, samples=8)(task(), trainer)
        assert capsys.readouterr().err == ""
        assert [r.getMessage().split()[0] for r in caplog.records] == ["recover:", *["Greedy,"] * 4]
