"""Weights that are trained once under many masks, and the search for a mask while they stand still."""

from __future__ import annotations

import copy
import os
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tinyfusion_core as tiny
from planted_search import TRAINER, WORKING, task
from tinyfusion_core.errors import Interrupted
from toys import Match, Planted


def cotrained(**options: Any) -> tiny.CoTrained:
    return tiny.CoTrained(**{"keep": 4, "steps": 40, "lr": 1e-3, "samples": 64, **options})


@dataclass(frozen=True)
class Off(Match):
    """The network is not what the data want: there is something to learn under every mask."""

    def loss(self, prediction, inputs):
        return super().loss(prediction + 1, inputs)


def off(**options: Any) -> tiny.Task:
    return replace(task(), loss=Off(), **options)


def test_it_finds_what_works_and_leaves_the_network_as_it_was() -> None:
    planted = task()
    before = {name: value.clone() for name, value in planted.teacher.state_dict().items()}
    found = cotrained().propose(planted, TRAINER, None, 5)
    assert list(found.decision.kept) == WORKING == list(found.masks[0])
    assert found.decision.method == "CoTrained"
    assert sum(found.decision.marginals) == pytest.approx(4)
    assert len(set(found.masks)) == 5
    assert all(torch.equal(value, before[name]) for name, value in planted.teacher.state_dict().items())
    assert cotrained()(task(), TRAINER) == found.decision


def test_masks_are_judged_by_the_weights_that_they_share() -> None:
    """By hand: the same training, its weights in a copy, and every mask of four blocks on the same samples."""
    work, how = off(), cotrained(steps=60, lr=1e-2, swaps=9)
    found = how.propose(work, TRAINER, None, 70)
    learned = how.learned().learn(off(), TRAINER)
    changed = copy.deepcopy(work.teacher)
    changed.load_state_dict({**changed.state_dict(), **learned.weights})
    masks = torch.tensor([[float(i in kept) for i in range(8)] for kept in found.masks])
    losses, frozen = (
        tiny.Calibration(replace(work, model=model), TRAINER, 64, 64).losses(masks) for model in (changed, work.teacher)
    )
    assert losses == sorted(losses) and len(losses) > 16
    assert losses[0] < 0.9 * min(frozen)  # the weights have moved, and for the better
    assert found.decision.provenance["evaluations"] > learned.evaluations == 60 * 16 * 4
    plain = tiny.Greedy(keep=4, samples=64, swaps=9)(replace(work, model=changed), TRAINER)
    assert plain.kept == found.decision.kept
    assert plain.provenance["losses"] == found.decision.provenance["losses"]


RULES = tiny.Rules(max_run=1)


@pytest.mark.parametrize(
    "options",
    [
        {"protect": [0, 2]},
        {"constraints": RULES},
        {"keep": None, "pattern": [2, 4], "protect": [0]},
        {"keep": None, "budget": "0.6x"},
        {"keep": 8},
    ],
    ids=str,
)
def test_it_obeys_what_a_race_does(options: dict[str, Any]) -> None:
    how = cotrained(**options, steps=2, samples=8)
    found = how.propose(off(), TRAINER, None, 4)
    race = tiny.Race(**how.allowed(), proposers=[how], steps=40, samples=8, masks=4)
    entrants = race(off(), TRAINER).provenance["race"][0]  # who is outside of its budget is refused
    assert {tuple(e["kept"]) for e in entrants if e["of"] == ["CoTrained"]} == set(found.masks)


def test_its_best_masks_enter_a_race() -> None:
    race = tiny.Race(keep=4, proposers=[cotrained()], masks=3, neighbours=False, rounds=1, steps=30, samples=32)
    decision = race(task(), TRAINER)
    (entrants,) = decision.provenance["race"]
    assert [entry["of"] for entry in entrants] == [["CoTrained"]] * 3
    assert {tuple(e["kept"]) for e in entrants} == set(cotrained().propose(task(), TRAINER, None, 3).masks)
    assert decision.kept == tuple(WORKING)


@dataclass(frozen=True)
class Stopped(Off):
    """Asks for a stop in the middle of the training."""

    def prepare(self, batch, rng):
        if (rng.stage, rng.step) == ("search", 3):
            os.kill(os.getpid(), signal.SIGTERM)
        return super().prepare(batch, rng)


def test_one_that_was_stopped_finds_the_same(tmp_path: Path) -> None:
    how, folder = cotrained(steps=8), tiny.RunFolder(tmp_path)
    whole = how(off(), TRAINER)
    with pytest.raises(Interrupted, match="stopped at step 4 of 8"):
        how(replace(task(), loss=Stopped()), TRAINER, folder)
    assert how(off(), TRAINER, folder) == whole
    assert how(off(), TRAINER, folder) == whole  # stopped after its training, it trains no more


def test_a_search_that_fails_leaves_the_network_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    work = off()
    before = {name: value.clone() for name, value in work.teacher.state_dict().items()}

    def broken(*_: object) -> None:
        assert not all(torch.equal(value, before[name]) for name, value in work.teacher.state_dict().items())
        raise RuntimeError("out of memory")

    monkeypatch.setattr(tiny.Greedy, "decide", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        cotrained(steps=4)(work, TRAINER)
    assert all(torch.equal(value, before[name]) for name, value in work.teacher.state_dict().items())


def test_what_is_wrong_is_told() -> None:
    wrong = {"samples": 0, "swaps": -1, "steps": 0, "lr": 0, "batch_size": 0}
    for key, value in wrong.items():
        with pytest.raises(tiny.UserError, match=rf"^{key} is {value}"):
            cotrained(**{key: value})
    with pytest.raises(tiny.UserError, match="Frozen leaves nothing .* to judge masks with"):
        cotrained(update=tiny.Frozen())
    with pytest.raises(tiny.UserError, match="CoTrained: give keep or pattern or budget"):
        cotrained(pattern=[1, 2])
    with pytest.raises(tiny.UserError, match="constraints.max_run: holds across the groups of a pattern"):
        cotrained(keep=None, pattern=[2, 4], constraints=RULES)
    with pytest.raises(tiny.UserError, match="keep is 9; expected 1 to 8 blocks"):
        cotrained(keep=9)(task(), TRAINER)


def test_what_is_tied_is_restored_together() -> None:
    """A weight with two names is trained, searched with and restored as one."""

    class Tied(Planted):
        def build(self):
            model = super().build()
            model.blocks[1].linear.weight = model.blocks[3].linear.weight
            return model

    work = off(backbone=Tied())
    before = {name: value.clone() for name, value in work.teacher.state_dict().items()}
    cotrained(steps=4)(work, TRAINER)
    assert work.teacher.blocks[1].linear.weight is work.teacher.blocks[3].linear.weight
    assert all(torch.equal(value, before[name]) for name, value in work.teacher.state_dict().items())
