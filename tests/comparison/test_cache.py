"""What has finished is never computed again, and what decides it is known by it."""

from __future__ import annotations

import functools
import importlib.util
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

import tinyfusion_core as tiny
import toys
from comparisons import FIRST_AND_LAST, LOSS, RECOVER, TRAINER, task
from tinyfusion_core.comparison.keys import described
from tinyfusion_core.comparison.legacy_keys import FIELDS, PATHS, Name, then
from tinyfusion_core.comparison.results import ComparisonResults
from tinyfusion_core.comparison.study import Compare
from tinyfusion_core.errors import Interrupted
from tinyfusion_core.runtime.files import NEUTRAL, digest
from tinyfusion_core.samplers.grouped import GroupedSampler
from tinyfusion_core.selection.criteria.positions import FirstN, LastN, Uniform
from tinyfusion_core.selection.criteria.sensitivity import Greedy


def test_finished_cells_are_never_computed_again(tmp_path: Path, worked: Counter[str]) -> None:
    def compare(candidates: dict, recover: tiny.Recover = RECOVER, seeds: int = 1, **given) -> ComparisonResults:
        worked.clear()
        stage = Compare(candidates=candidates, seeds=seeds, random=2)
        metrics = given.get("evaluate", LOSS)
        return stage(given.get("task", task()), recover, given.get("trainer", TRAINER), tmp_path, evaluate=metrics)

    before = compare(FIRST_AND_LAST)
    assert worked == {"decided": 2, "recovered": 4}
    assert compare(FIRST_AND_LAST, trainer=replace(TRAINER, log_every=1, checkpoint_every=2)) == before
    assert worked == {}
    # Another candidate that chooses what one has chosen: a decision, no recovery.
    added = compare({**FIRST_AND_LAST, "uniform": Uniform(keep=4), "again": FirstN(pattern=[4, 8])})
    assert worked == {"decided": 2, "recovered": 1}
    assert {t.method: t.recovered for t in added.entries}["again"] == before.entries[0].recovered
    compare(FIRST_AND_LAST, seeds=2)
    assert worked == {"decided": 2, "recovered": 2}
    changed = compare(FIRST_AND_LAST, recover=replace(RECOVER, lr=2e-3))
    assert worked == {"recovered": 4}
    assert changed.entries[0].calibration == before.entries[0].calibration
    assert changed.entries[0].recovered != before.entries[0].recovered
    assert compare(FIRST_AND_LAST) == before
    assert worked == {}
    # Other weights, or other data: nothing is known about them.
    other = toys.Planted().build()
    with torch.no_grad():
        other.blocks[3].linear.bias += 0.1
    compare(FIRST_AND_LAST, task=replace(task(), model=other))
    assert worked == {"decided": 2, "recovered": 4}
    compare(FIRST_AND_LAST, task=replace(task(), train=toys.planted_data(63)))
    assert worked == {"decided": 2, "recovered": 4}
    # Whatever is measured is measured of what was recovered then: nothing keeps the students.
    seen = compare(FIRST_AND_LAST, task=replace(task(), held_out=toys.planted_data(600)))
    assert worked == {"recovered": 4}
    held_out = toys.planted_data(600)
    held_out.columns["x"][301] += 50
    changed = compare(FIRST_AND_LAST, task=replace(task(), held_out=held_out))
    assert changed.entries[0].calibration != seen.entries[0].calibration
    assert worked == {"recovered": 4}
    compare(FIRST_AND_LAST, evaluate=[tiny.HeldOutLoss(draws=2)])
    assert worked == {"recovered": 4}
    assert not [p for p in (tmp_path / "cells").iterdir() if p.is_dir()]


def test_the_search_of_a_final_has_the_trainers_batch_whatever_the_final_has(tmp_path: Path) -> None:
    compare = Compare(candidates={"final": tiny.Finals(search=tiny.Search(keep=4, steps=2), masks=1, batch_size=4)})
    compare = replace(compare, seeds=1, random=0)

    def looked_at(batch_size: int) -> int:
        trainer = replace(TRAINER, batch_size=batch_size)
        return compare(task(), RECOVER, trainer, tmp_path, evaluate=LOSS).entries[0].evaluations

    assert looked_at(16) == 2 * looked_at(8) > 0


def test_a_setting_that_counts_for_nothing_costs_nothing(tmp_path: Path, worked: Counter[str]) -> None:
    recover = replace(RECOVER, steps=2, batch_size=4)

    def compare(
        samples: int, steps: int, batch_size: int, trainer: tiny.Trainer, metric: tiny.HeldOutLoss
    ) -> ComparisonResults:
        worked.clear()
        greedy = Greedy(keep=4, samples=samples, batch_size=batch_size)
        candidates = {"greedy": greedy, "search": tiny.Search(pattern=[4, 8], steps=steps, batch_size=4)}
        return Compare(candidates=candidates, seeds=1, random=1)(task(), recover, trainer, tmp_path, evaluate=[metric])

    first = compare(8, 2, 4, TRAINER, *LOSS)
    other = tiny.HeldOutLoss(draws=1, batch_size=5)
    assert compare(8, 2, 8, replace(TRAINER, batch_size=16, num_workers=1, log_every=3), other) == first
    assert worked == {}
    compare(9, 3, 4, TRAINER, *LOSS)
    assert worked["decided"] == 2


def halves(lists: Mapping[str, int]) -> GroupedSampler:
    return GroupedSampler(lists, [4, 8])


def test_what_cannot_be_described_is_never_taken_from_a_cell(tmp_path: Path, worked: Counter[str]) -> None:
    def decided(sampler: Callable) -> int:
        worked.clear()
        candidates = {"search": tiny.Search(sampler=sampler, steps=2)}
        Compare(candidates=candidates, seeds=1, random=0)(
            task(), replace(RECOVER, steps=1), TRAINER, tmp_path / "run", evaluate=LOSS
        )
        return worked["decided"]

    assert (decided(halves), decided(halves)) == (1, 0)
    nameless = lambda lists: GroupedSampler(lists, [4, 8])  # noqa: E731
    assert (decided(nameless), decided(nameless)) == (1, 1)

    class Local:
        pass

    @functools.wraps(halves)
    def wrapped(lists: Mapping[str, int]) -> GroupedSampler:
        return nameless(lists)

    for value in (nameless, Local, Local(), decided, wrapped, {"a": [print]}):
        assert described(value) != described(value)
    assert described((1, {"a": float("inf")}, Path("x"), torch.float32)) == [
        1,
        {"a": "inf"},
        repr(Path("x")),
        "torch.float32",
    ]


def test_a_function_is_known_by_its_source(tmp_path: Path) -> None:
    def load(text: str) -> ModuleType:
        path = tmp_path / f"{text}.py"
        path.write_text(f"def sampler(lists):\n    return {text!r}\n")
        spec = importlib.util.spec_from_file_location("samplers", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    first, again, other = (described(load(text).sampler) for text in ("one", "one", "two"))
    assert first == again != other
    assert first[0] == other[0] == "samplers:sampler"
    assert then(first) == ["samplers.sampler", first[1]]


@dataclass(frozen=True)
class Grown:
    """Settings of which one was renamed and another added; 1 is what was done before there was `more`."""

    size: int = 3
    more: int = field(default=2, metadata={NEUTRAL: 1})


def test_a_key_does_not_depend_on_where_a_class_is_and_old_keys_do(monkeypatch: pytest.MonkeyPatch) -> None:
    search = tiny.Search(sampler=functools.partial(tiny.ScoreFunction, rules=tiny.Rules(keep=4)))
    key = described(search)
    old = then(key)
    assert digest(old) != digest(key)
    for cls in (tiny.Search, tiny.ScoreFunction, tiny.Rules, tiny.LoRA):
        monkeypatch.setattr(cls, "__module__", "tinyfusion_core.somewhere.else")
    assert described(search) == key
    assert then(described(search)) == old
    assert "somewhere" not in json.dumps([key, old])
    monkeypatch.setattr(Grown, "__module__", "plugin.now")  # not in the tables: what is not of this package
    assert then(described(Grown(more=1))) == {"class": "plugin.now.Grown", "size": 3}
    monkeypatch.setitem(PATHS, "plugin:Grown", "plugin.then.Small")
    monkeypatch.setitem(FIELDS, "plugin:Grown", {"size": "width"})
    assert then(described([Grown(more=1)])) == [{"class": "plugin.then.Small", "width": 3}]


def test_a_field_that_is_added_costs_no_results_and_a_default_that_changes_does() -> None:
    assert described(Grown(more=1)) == {"class": Name.of(Grown), "size": 3}
    assert described(Grown()) == {"class": Name.of(Grown), "size": 3, "more": 2}


def test_what_is_computed_now_is_found_when_classes_have_moved(
    tmp_path: Path, worked: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compare = Compare(candidates=FIRST_AND_LAST, seeds=1, random=1)
    before = compare(task(), RECOVER, TRAINER, tmp_path, evaluate=LOSS)
    for cls in (FirstN, LastN, tiny.Recover, tiny.Trainer, tiny.HeldOutLoss, toys.Match, toys.Planted):
        monkeypatch.setattr(cls, "__module__", cls.__module__.partition(".")[0] + ".somewhere")
    worked.clear()
    assert compare(task(), RECOVER, TRAINER, tmp_path, evaluate=LOSS) == before
    assert worked == {}


class Counting(toys.StopAt):
    """Counts the training steps that were prepared."""

    steps: Counter[int] = Counter()

    def prepare(self, batch, rng):
        if rng.stage == "recover":
            self.steps[rng.step] += 1
        return super().prepare(batch, rng)


def test_a_stopped_comparison_goes_on_in_the_middle_of_a_recovery(tmp_path: Path) -> None:
    compare = Compare(candidates=FIRST_AND_LAST, seeds=1, random=0)
    recover = replace(RECOVER, steps=20)
    Counting.steps.clear()
    for _ in FIRST_AND_LAST:  # each recovery stops once, at its twelfth step
        with pytest.raises(Interrupted, match="step 12 of 20 of recover"):
            compare(task(Counting()), recover, TRAINER, tmp_path / "stopped", evaluate=LOSS)
    found = compare(task(Counting()), recover, TRAINER, tmp_path / "stopped", evaluate=LOSS)
    assert set(Counting.steps.values()) == {2}, "a step was computed again"
    whole = compare(task(), recover, TRAINER, tmp_path / "whole", evaluate=LOSS)
    assert [t.recovered for t in found.entries] == [t.recovered for t in whole.entries]
