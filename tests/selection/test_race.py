"""A race of recovered masks: who enters, who leads, who is out, and that nothing but recovery decides."""

from __future__ import annotations

import os
import signal
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

import tinyfusion_core as tiny
from planted_search import TRAINER, WORKING, task
from small_run import RECIPE, digits_task
from tinyfusion_core.dataloading.order import order_of
from tinyfusion_core.dataloading.set_apart import set_apart
from tinyfusion_core.errors import Interrupted
from tinyfusion_core.protocols.data import Tensors
from tinyfusion_core.selection.judging import pace, recoveries
from tinyfusion_core.selection.judging.paired import leading, surviving
from toys import Match, planted_data

WRONG = tiny.Keep([0, 2, 5, 6])
NEAR = tiny.Keep([0, 3, 4, 7])


def racing(*proposers: tiny.Selector, **options) -> tiny.Race:
    how = {"keep": 4, "steps": 120, "updates_per_batch": 1, "samples": 32, "proposers": proposers}
    return tiny.Race(**{**how, **options})


def test_what_recovers_best_wins_whoever_proposed_it() -> None:
    planted = task()
    before = {name: value.clone() for name, value in planted.teacher.state_dict().items()}
    others = (WRONG, tiny.FirstN(keep=4), tiny.LeaveOneOut(keep=4, samples=32), tiny.LastN(keep=4))
    decision = racing(*others, neighbours=False)(planted, TRAINER)
    assert list(decision.kept) == WORKING
    assert decision.method == "Race"
    assert all(torch.equal(value, before[name]) for name, value in planted.teacher.state_dict().items())
    first = decision.provenance["race"][0]
    assert {tuple(entry["kept"]): entry["of"] for entry in first} == {
        (0, 2, 5, 6): ["Keep"], (0, 1, 2, 3): ["FirstN"], tuple(WORKING): ["LeaveOneOut"], (4, 5, 6, 7): ["LastN"],
    }  # fmt: skip
    assert first[0]["kept"] == WORKING
    assert {entry["steps"] for entry in first} == {120 // 3 // 4}
    assert first[0]["behind"] == first[0]["standard_error"] == 0
    assert all(entry["behind"] > 2 * entry["standard_error"] > 0 for entry in first[1:])


@pytest.mark.parametrize(
    ("batch_size", "micro_batch_size", "processes", "expected"),
    [
        (64, None, 1, (40, 16)),
        (64, 16, 4, (40, 16)),
        (64, None, 32, (20, 32)),  # every process gets a sample
        (64, None, 64, (10, 64)),
        (6, None, 1, (30, 2)),
        (48, 8, 1, (30, 16)),  # passes keep their size
        (1, None, 1, (10, 1)),
    ],
)
def test_recoveries_divide_batches_into_updates_as_far_as_they_can_be_split(
    batch_size: int, micro_batch_size: int | None, processes: int, expected: tuple[int, int]
) -> None:
    trainer = replace(TRAINER, batch_size=batch_size, micro_batch_size=micro_batch_size)
    how = tiny.Race(keep=4).recovery(10, trainer, processes)
    assert (how.steps, how.batch_size) == expected
    assert how.lr == pytest.approx(1e-3 / (how.steps / 10) ** 0.5)
    whole = tiny.Race(keep=4, updates_per_batch=1).recovery(10, trainer, processes)
    assert (whole.steps, whole.batch_size) == (10, batch_size)


def test_a_race_by_smaller_batches_sees_as_many_samples() -> None:
    found = [
        racing(WRONG, NEAR, rounds=1, steps=20, neighbours=False, updates_per_batch=by)(task(), TRAINER)
        for by in (1, 2)
    ]
    first, second = (one.provenance for one in found)
    assert first["evaluations"] == second["evaluations"]
    assert [entry["steps"] for entry in second["race"][0]] == [2 * entry["steps"] for entry in first["race"][0]]


def test_neighbours_of_the_best_are_tried_and_followed() -> None:
    """Nobody proposes the right mask: it is two exchanges away, and 14 of 70 are enough to find it."""
    decision = racing(WRONG, tiny.Keep([0, 2, 4, 7]), rounds=1, steps=160)(task(), TRAINER)
    (entered,) = decision.provenance["race"]
    assert len(entered) == 16
    assert list(decision.kept) == entered[0]["kept"] == WORKING
    assert entered[0]["of"] == ["neighbour"]
    near = [entry for entry in entered if entry["of"] == ["neighbour"]]
    assert all(len({*entry["neighbour_of"]} - {*entry["kept"]}) == 1 for entry in near)
    assert min(entry["predicted"] for entry in near) < max(entry["predicted"] for entry in near)
    assert not any("predicted" in entry for entry in entered if entry not in near)


@pytest.mark.slow
def test_as_many_steps_as_fit_into_the_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake clock: a training takes 5 s and half a second for each update."""
    now = [0.0]
    train = tiny.Recover.__call__

    def slowly(self: tiny.Recover, *args: object, **kwargs: object) -> object:
        now[0] += 5 + 0.5 * self.steps
        return train(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(pace.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(tiny.Recover, "__call__", slowly)
    run = tiny.RunFolder(tmp_path / "run")
    timed = racing(WRONG, NEAR, minutes=1, steps=700)(task(), TRAINER, run)
    counted = racing(WRONG, NEAR, steps=120)(task(), TRAINER)
    assert timed.provenance["race"] == counted.provenance["race"]
    (run.part("search", "pace.json").path).write_text('{"seconds": 0.6}')  # of an earlier run, on a slower machine
    assert racing(WRONG, NEAR, minutes=1, steps=700)._in_time(task(), TRAINER, run).steps == 100
    assert racing(WRONG, NEAR, minutes=1, steps=60)._in_time(task(), TRAINER, run).steps == 60
    with pytest.raises(tiny.UserError, match=r"steps is 4, in the time of minutes 0.04: too few for 5 masks"):
        some = [tiny.Keep([0, 1, 2, i]) for i in range(3, 8)]
        racing(*some, minutes=0.04, neighbours=False)(task(), TRAINER, tiny.RunFolder(tmp_path / "other"))


def test_with_the_weights_of_other_entrants_it_finds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A negative control: were it anything but recovery that decides, this would change nothing."""
    others = (tiny.Keep(WORKING), WRONG)
    assert list(racing(*others, neighbours=False)(task(), TRAINER).kept) == WORKING
    plain = recoveries.prune

    def exchanged(of: tiny.Task, decision: tiny.Decision) -> torch.nn.Module:
        kept = WRONG.blocks if list(decision.kept) == WORKING else WORKING
        return plain(of, replace(decision, kept=tuple(kept)))

    monkeypatch.setattr(recoveries, "prune", exchanged)
    assert list(racing(*others, neighbours=False)(task(), TRAINER).kept) == list(WRONG.blocks)


def test_the_default_proposers_search_within_the_same_budget() -> None:
    how = tiny.Race(keep=4, constraints=tiny.Rules(protect=[0]), steps=100)
    search, *criteria = how.proposed_by()
    assert search == tiny.Search(keep=4, constraints=tiny.Rules(protect=[0]), protect=(), steps=50)
    assert [type(criterion) for criterion in criteria] == [
        tiny.Greedy, tiny.LeaveOneOut, tiny.Taylor, tiny.BlockInfluence,
    ]  # fmt: skip
    assert {criterion.keep for criterion in criteria} == {4}
    assert how.learned() == search
    with_costs = tiny.Race(budget="0.5x", steps=8)
    assert len(with_costs.cost_budgets()) == 1


@dataclass(frozen=True)
class Stopped(Match):
    """Asks for a stop in the middle of the second entrant's recovery."""

    entrants: list[str] = field(default_factory=list)

    def prepare(self, batch, rng):
        if rng.stage == "race 1" and rng.step == 3:
            self.entrants.append(rng.stage)
            if len(self.entrants) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
        return super().prepare(batch, rng)


def test_a_race_that_was_stopped_has_the_same_winner(tmp_path: Path) -> None:
    how = racing(WRONG, NEAR, tiny.Keep(WORKING), steps=48)
    whole = how(task(), TRAINER)
    folder = tiny.RunFolder(tmp_path)
    with pytest.raises(Interrupted, match="stopped at step 4 of"):
        how(replace(task(), loss=Stopped()), TRAINER, folder)
    assert how(task(), TRAINER, folder) == whole


class Diverging(Match):
    """No shallow network can be trained."""

    def predict(self, model, inputs):
        out = super().predict(model, inputs)
        return out * float("nan") if model.training and len(model.blocks) < 8 else out


def test_others_recover_entrants_in_any_order(tmp_path: Path) -> None:
    run, handed = tiny.RunFolder(tmp_path / "run"), list[recoveries.Entrant]()

    def elsewhere(entrants: Sequence[recoveries.Entrant]) -> Iterator[recoveries.Entrant]:
        for entrant in reversed(entrants):
            entrant.recover(task(), TRAINER, run)
            handed.append(entrant)
            yield entrant

    how = racing(WRONG, NEAR, rounds=2, steps=48)
    alone = how(task(), TRAINER)
    assert how(task(), replace(TRAINER, elsewhere=elsewhere), run) == alone
    assert len(handed) == sum(map(len, alone.provenance["race"])) > 2


@pytest.mark.slow
def test_every_round_is_longer_than_the_one_before() -> None:
    """Whatever the neighbours have left: a shorter recovery would have the last word."""
    for steps in (100, 130, 157):
        found = racing(WRONG, NEAR, steps=steps, sure=50.0)(task(), TRAINER).provenance["race"]
        lengths = [entries[0]["steps"] for entries in found]
        assert lengths == sorted(set(lengths))
        assert sum(entry["steps"] for entries in found for entry in entries) <= steps


def test_only_losses_are_kept_of_entrants(tmp_path: Path) -> None:
    folder = tiny.RunFolder(tmp_path)
    decision = racing(WRONG, NEAR, neighbours=False, steps=30)(task(), TRAINER, folder)
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.name for path in left} == {"losses.safetensors", "metrics.jsonl", "now.json"}
    assert len([path for path in left if path.name == "losses.safetensors"]) == sum(
        map(len, decision.provenance["race"])
    )


def test_what_cannot_race_is_told_why() -> None:
    for size, fault in ((3, "at least 4 training samples.* there are 3"), (1, "there are 1")):
        few = replace(task(), train=planted_data(size))
        with pytest.raises(tiny.UserError, match=fault):
            racing(WRONG, NEAR)(few, TRAINER.with_batch_size(1))
    many = [tiny.Keep([first, 5, 6, 7]) for first in range(5)]
    with pytest.raises(tiny.UserError, match=r"^steps is 4: too few for 5 masks to recover; give at least 5"):
        racing(*many, steps=4)(task(), TRAINER)
    with pytest.raises(tiny.UserError, match=r"^proposers\[0\] is a race itself"):
        racing(racing(WRONG))
    outside = racing(tiny.Keep([0, 1, 2]), WRONG)
    with pytest.raises(tiny.UserError, match=r"^proposers\[0\]: keeps 3 blocks, the race 4"):
        outside(task(), TRAINER)
    protected = racing(WRONG, protect=[7])
    with pytest.raises(tiny.UserError, match=r"^proposers\[0\]: Keep keeps 0 2 5 6, which is outside"):
        protected(task(), TRAINER)
    with pytest.raises(tiny.UserError, match=r"^lr is 0\.001: after \d+ steps no entrant has a finite loss"):
        racing(WRONG, NEAR)(replace(task(), loss=Diverging()), TRAINER)
    for key, value in {"steps": 3, "rounds": 0, "masks": 0, "samples": 1, "lr": 0, "sure": -1, "proposers": ()}.items():
        with pytest.raises(tiny.UserError, match=rf"^{key}"):
            replace(racing(WRONG), **{key: value})


def losses(mean: float, spread: float, seed: int) -> Tensor:
    noise = torch.randn(100, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return mean + spread * (noise - noise.mean())


def test_a_leader_is_replaced_only_by_who_is_surely_better() -> None:
    common = losses(0, 1.0, 1)  # hard and easy samples, which the differences do not see
    a, b, c = common + 1.00, common + losses(0.99, 0.2, 2), common + losses(0.9, 0.2, 3)
    found = {(0,): a, (1,): b, (2,): c}
    assert leading(found, None, 2.0) == (2,)
    assert leading({(0,): a, (1,): b}, (0,), 2.0) == (0,)  # better by half of a standard error
    assert leading({(0,): a, (1,): b}, None, 2.0) == (1,)
    assert leading(found, (0,), 2.0) == (2,)
    diverged = torch.full((100,), torch.inf, dtype=torch.float64)
    assert leading({(0,): diverged, (1,): b}, (0,), 2.0) == (1,)


def test_a_third_goes_on_however_far_behind() -> None:
    near = {(i,): losses(1 + 1e-3 * i, 0.2, i) for i in range(9)}
    assert surviving(near, (0,)) == [(0,), (1,), (2,)]
    assert surviving(near, (4,)) == [(4,), (0,), (1,)]
    far = {(0,): losses(1.0, 0.2, 0), (1,): losses(9.0, 0.2, 1)}
    assert surviving(far, (0,)) == [(0,), (1,)]
    far[1,] = torch.full((100,), torch.inf, dtype=torch.float64)
    assert surviving(far, (0,)) == [(0,)]


def test_who_recovers_late_wins_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind by more than ten standard errors after the first round, as 0 4 9 is on Fashion-MNIST at 12 → 3."""

    def falling(self, mask: tuple[int, ...], recovery: tiny.Recover, *others: object) -> Tensor:
        start, power = (4.5, 1.0) if list(mask) == WORKING else (1.0, 0.5)
        return start * recovery.steps**-power + losses(0, 1e-3, 0) + losses(0, 1e-3, sum(mask))

    monkeypatch.setattr(recoveries.ShortRecoveries, "_recovered", falling)
    late = racing(WRONG, tiny.Keep(WORKING), neighbours=False, steps=90)(task(), TRAINER)
    first, *_, last = late.provenance["race"]
    assert first[0]["kept"] == list(WRONG.blocks)
    assert first[1]["behind"] > 10 * first[1]["standard_error"]
    assert (list(late.kept), last[0]["kept"]) == (WORKING, WORKING)


@dataclass(frozen=True)
class Noted(Match):
    """Notes which samples the recoveries see, and which the judge."""

    seen: dict[str, set[float]] = field(default_factory=lambda: defaultdict(set))

    def prepare(self, batch, rng):
        self.seen[rng.stage].update(batch["x"][:, 0].tolist())
        return super().prepare(batch, rng)


def test_a_race_judges_by_samples_that_it_did_not_train_on() -> None:
    loss = Noted()
    racing(WRONG, NEAR, samples=20)(replace(task(), loss=loss), TRAINER)
    trained, judged = set().union(*(loss.seen[f"race {i}"] for i in (1, 2, 3))), loss.seen["calibration"]
    assert len(judged) == 20
    assert len(trained) == 64 - 20
    assert not trained & judged


def test_entrants_begin_as_the_recovery_will(tmp_path: Path) -> None:
    recipe = {**RECIPE, "search": {"keep": 4}, "recover": {"steps": 5, "start": "Refit"}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    search = tiny.load_recipe(tmp_path / "recipe.yaml").search
    assert isinstance(search, tiny.Race) and search.start == tiny.Refit()
    plain, refitted = (
        racing(tiny.Keep([0, 1, 3, 6]), tiny.Keep([0, 1, 2, 3]), steps=3, neighbours=False, start=start)(
            digits_task(), replace(TRAINER, batch_size=8)
        ).provenance["race"][0]
        for start in (None, tiny.Refit(samples=32))
    )
    losses = [{tuple(entry["kept"]): entry["loss"] for entry in entries} for entries in (plain, refitted)]
    assert losses[0].keys() == losses[1].keys()
    assert all(losses[1][kept] < 0.9 * losses[0][kept] for kept in losses[0])  # after one step


class Shards(Tensors):
    sizes, mix = (30, 4, 30), 2


def test_nobody_is_judged_on_what_it_was_trained_on() -> None:
    numbers = torch.arange(64)
    for whole in (Tensors({"x": numbers}), Shards({"x": numbers})):
        rest, apart = set_apart(whole, 20, 3, "race")
        parts = [part.__getitems__(list(range(len(part))))["x"].tolist() for part in (rest, apart)]
        assert [len(part) for part in parts] == [44, 20]
        assert sorted(parts[0] + parts[1]) == list(range(64))
        assert parts[1] != list(range(44, 64))
        again = set_apart(whole, 20, 3, "race")[1]
        assert again.__getitems__(list(range(20)))["x"].tolist() == parts[1]
    assert sum(rest.sizes) == 44
    order = order_of(rest, 0, "race 1", 8)
    assert sorted(order[i] for i in range(44)) == list(range(44))
    assert [len(part) for part in set_apart(planted_data(10), 512, 0, "race")] == [5, 5]
