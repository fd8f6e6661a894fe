"""Trackers get what `metrics.jsonl` gets, once, and never stop a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers, register_tracker_class
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import tinyfusion_core as tiny
from tinyfusion_core.cli import main
from toys import Match, Planted, planted_data

TRAINER = tiny.Trainer(batch_size=16, precision="fp32", log_every=3, checkpoint_every=5, trackers=("tensorboard",))


def task(loss: tiny.LossAdapter) -> tiny.Task:
    return tiny.Task(backbone=Planted(), loss=loss, train=planted_data(), held_out=planted_data(16))


class Dies(Match):
    """Fails at a step between two checkpoints, as a process does that is killed."""

    def prepare(self, batch, rng):
        if rng.stage == "search" and rng.step == 9:
            raise RuntimeError("killed")
        return super().prepare(batch, rng)


def curve(folder: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(e.step, e.value) for e in events.Scalars(tag)]


def test_tensorboard_gets_the_lines_of_every_stage_once(tmp_path: Path) -> None:
    run = tiny.RunFolder(tmp_path)
    search = tiny.Search(pattern=(4, 8), steps=12)
    with pytest.raises(RuntimeError, match="killed"):
        search(task(Dies()), TRAINER, run)  # after a line at step 9, which the checkpoint at step 5 does not have
    decision = search(task(Match()), TRAINER, run)
    student = tiny.prune(task(Match()), decision)
    tiny.Recover(steps=7)(task(Match()), student, decision, TRAINER, run)
    for stage, steps in (("search", [3, 6, 9, 12]), ("recover", [3, 6, 7])):
        lines = run.metrics(stage)
        assert [line["step"] for line in lines] == steps
        folder = tmp_path / "tensorboard" / stage
        loss = curve(folder, "loss")
        assert [step for step, _ in loss] == steps
        assert [value for _, value in loss] == pytest.approx([line["loss"] for line in lines])
        assert curve(folder, "lr/0")[-1] == (steps[-1], pytest.approx(lines[-1]["lr"][0]))
    last = run.metrics("search")[-1]
    found = [curve(tmp_path / "tensorboard" / "search", f"marginals/{i}")[-1][1] for i in range(8)]
    assert found == pytest.approx(last["marginals"], abs=1e-6)


class Offline(GeneralTracker):
    """A service that takes the first line and no more."""

    name = "offline"
    requires_logging_directory = False
    logged: list[int] = []

    def __init__(self, run_name: str) -> None:
        super().__init__()

    @property
    def tracker(self) -> None:
        return None

    def log(self, values: dict, step: int | None) -> None:
        if self.logged:
            raise ConnectionError("no route to host")
        self.logged.append(step)


def test_a_tracker_that_fails_warns_once_and_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(LOGGER_TYPE_TO_CLASS, "offline", raising=False)
    register_tracker_class(Offline)
    trainer = tiny.Trainer(batch_size=16, precision="fp32", log_every=3, trackers=("offline",))
    how, run = tiny.Recover(steps=12), tiny.RunFolder(tmp_path)
    with pytest.warns(UserWarning, match="offline failed.*no route to host.*metrics.jsonl") as caught:
        tracked = how(task(Match()), Planted().build(), None, trainer, run)
    assert len(caught) == 1
    assert Offline.logged == [3]
    plain = how(task(Match()), Planted().build(), None, tiny.Trainer(batch_size=16, precision="fp32"))
    assert all(torch.equal(a, b) for a, b in zip(tracked.parameters(), plain.parameters(), strict=True))
    # One that cannot even begin, while another can.
    (tmp_path / "aside").mkdir()
    (tmp_path / "aside" / "tensorboard").write_text("a file where the tracker wants its folder")
    with pytest.warns(UserWarning, match="tensorboard failed") as caught:
        how(task(Match()), Planted().build(), None, TRAINER, tiny.RunFolder(tmp_path / "aside"))
    assert len(caught) == 1


@pytest.mark.slow
def test_what_is_not_installed_or_unknown_is_said_before_the_run(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = next(
        name for name in ("wandb", "comet_ml", "aim", "clearml") if name not in map(str, get_available_trackers())
    )
    flags = ["--trainer.trackers", f"[tensorboard, {missing}]"]
    assert main(["validate", str(recipe), *flags]) == 0  # the machine that runs it may have it
    assert f"pip install {missing.replace('_', '-')}" in capsys.readouterr().out
    assert main(["run", str(recipe), "--run-dir", str(recipe.parent / "run"), *flags]) == 2
    assert f"pip install {missing.replace('_', '-')}" in capsys.readouterr().err
    assert not (recipe.parent / "run").exists()
    assert main(["validate", str(recipe), "--trainer.trackers", "[tensorbord]"]) == 2
    assert "did you mean 'tensorboard'?" in capsys.readouterr().err
