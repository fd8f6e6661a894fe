"""Comparisons: the same recovery for all, each part computed once, and tables, figures and a page of what was found."""

from __future__ import annotations

import csv
import functools
import importlib.util
import json
import re
import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

import tinyfusion_core as tiny
import toys
from small_run import RECIPE
from tinyfusion_core.cli import main
from tinyfusion_core.comparison.cache import NEUTRAL, _described
from tinyfusion_core.comparison.legacy_keys import FIELDS, PATHS, Name, then
from tinyfusion_core.comparison.results import Findings, Trial
from tinyfusion_core.comparison.statistics import guides, rows, spearman
from tinyfusion_core.comparison.study import Audit, Compare
from tinyfusion_core.comparison.tables import tables
from tinyfusion_core.errors import Interrupted, UserError
from tinyfusion_core.pipeline.compare import write_comparison
from tinyfusion_core.pipeline.plan import make_comparison_plan, make_plan
from tinyfusion_core.pipeline.run import make_task
from tinyfusion_core.protocols.backbone import Backbone
from tinyfusion_core.protocols.data import Tensors
from tinyfusion_core.runtime.files import digest
from tinyfusion_core.runtime.progress import track
from tinyfusion_core.samplers.grouped import GroupedSampler
from tinyfusion_core.selection.criteria import CriterionResult, FirstN, Keep, LastN, Uniform
from tinyfusion_core.selection.sensitivity import Greedy, LeaveOneOut
from tinyfusion_core.selection.similarity import BlockInfluence
from tinyfusion_images.features import shipped

TRAINER = tiny.Trainer(precision="fp32", batch_size=8, seed=1)
RECOVER = tiny.Recover(steps=12, lr=1e-3)
LOSS = [tiny.HeldOutLoss(draws=1)]
FIRST_AND_LAST = {"first": FirstN(keep=4), "last": LastN(keep=4)}


def task(loss: tiny.LossAdapter | None = None) -> tiny.Task:
    return tiny.Task(
        backbone=toys.Planted(), loss=loss or toys.Match(), train=toys.planted_data(), held_out=toys.planted_data(16)
    )


@pytest.fixture(autouse=True)
def _no_garbage_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate collects garbage after every training, which takes longer than the trainings of these tests."""
    monkeypatch.setattr("gc.collect", lambda: 0)


@pytest.fixture
def worked(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often anything was decided or recovered."""
    count: Counter[str] = Counter()

    def counted(cls: type, what: str) -> None:
        original: Callable = cls.__call__

        def call(*args, **kwargs):
            count[what] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(cls, "__call__", call)

    counted(tiny.Recover, "recovered")
    counted(tiny.Search, "decided")
    counted(FirstN.__mro__[2], "decided")  # every criterion is called through the base class
    return count


def test_spearman_gives_equal_values_the_mean_of_their_ranks() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    # Ranks 1, 2.5, 2.5, 4 against 2, 1, 3, 4: deviations -1.5, 0, 0, 1.5 and -0.5, -1.5, 0.5, 1.5.
    assert spearman([1, 2, 2, 9], [5, 4, 6, float("inf")]) == pytest.approx(3 / (4.5 * 5) ** 0.5)
    assert spearman([1, 1, 1], [1, 2, 3]) is None


def test_an_audit_ranks_the_working_blocks_first(tmp_path: Path) -> None:
    candidates = {"greedy": Greedy(keep=4), "one by one": LeaveOneOut(keep=4), "idle": Keep([0, 2, 5, 6])}
    audit = Audit(candidates=candidates, seeds=1, masks=24, steps=2)
    found = audit(task(), RECOVER, TRAINER, tmp_path, evaluate=LOSS)
    assert found.num_masks == 70
    assert len(found.masks) == len({m.kept for m in found.masks}) == 24
    assert all(len(m.kept) == 4 for m in found.masks)
    by_name = {row.name: row for row in rows(found)}
    assert by_name["greedy"].kept == ((1, 3, 4, 7),)
    assert by_name["greedy"].rank.mean == 1
    assert by_name["greedy"].to_best.mean <= 0
    assert by_name["greedy"].better.mean >= 23 / 24
    assert by_name["idle"].rank.mean > 20
    assert by_name["idle"].better.mean < 0.1
    assert by_name["greedy"].evaluations.mean > 0
    found_guides = guides(found)
    assert set(found_guides) == {"calibration loss", "one by one, sum of scores"}
    assert found_guides["calibration loss"].mean > 0.95
    assert 0.5 < found_guides["one by one, sum of scores"].mean < 0.9
    assert found.steps == 2
    page = write_comparison(tmp_path).read_text()
    assert "rank of 24" in page
    assert "share of 24 random subsets of 70" in page
    assert {p.name for p in (tmp_path / "figures").iterdir()} == {"distribution.png", "scatter.png", "kept.png"}


def test_no_more_subsets_than_there_are(tmp_path: Path) -> None:
    found = Compare(candidates={"first": FirstN(keep=7)}, seeds=1, random=9)(
        task(), replace(RECOVER, steps=1), TRAINER, tmp_path, evaluate=LOSS
    )
    assert {m.kept for m in found.masks} == {tuple(j for j in range(8) if j != i) for i in range(8)}
    assert len(found.masks) == found.num_masks == 8
    best = min(m.healed for m in found.masks)
    (row, _) = rows(found)
    assert row.better.mean == sum(m.healed > row.healed.mean for m in found.masks) / 8
    assert row.to_best.mean == row.healed.mean - best
    assert "share of all 8 subsets" in " ".join(tables(found)[0].notes)


def test_subsets_with_a_seed_of_their_own_and_more_of_them_add_to_the_first(tmp_path: Path) -> None:
    compare = Compare(candidates=FIRST_AND_LAST, seeds=2, random=3)
    few = compare(task(), RECOVER, TRAINER, tmp_path, evaluate=LOSS)
    many = replace(compare, random=6)(task(), RECOVER, TRAINER, tmp_path, evaluate=LOSS)
    assert {m.seed for m in many.masks} == {1}
    assert many.masks[:3] == few.masks
    assert len({m.kept for m in many.masks}) == 6
    assert {t.seed for t in many.trials} == {1, 2}


def test_finished_cells_are_never_computed_again(tmp_path: Path, worked: Counter[str]) -> None:
    def compare(candidates: dict, recover: tiny.Recover = RECOVER, seeds: int = 1, **given) -> Findings:
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
    assert {t.method: t.healed for t in added.trials}["again"] == before.trials[0].healed
    compare(FIRST_AND_LAST, seeds=2)
    assert worked == {"decided": 2, "recovered": 2}
    changed = compare(FIRST_AND_LAST, recover=replace(RECOVER, lr=2e-3))
    assert worked == {"recovered": 4}
    assert changed.trials[0].calibration == before.trials[0].calibration
    assert changed.trials[0].healed != before.trials[0].healed
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
    assert changed.trials[0].calibration != seen.trials[0].calibration
    assert worked == {"recovered": 4}
    compare(FIRST_AND_LAST, evaluate=[tiny.HeldOutLoss(draws=2)])
    assert worked == {"recovered": 4}
    assert not [p for p in (tmp_path / "cells").iterdir() if p.is_dir()]


def test_the_search_of_a_final_has_the_trainers_batch_whatever_the_final_has(tmp_path: Path) -> None:
    compare = Compare(candidates={"final": tiny.Finals(search=tiny.Search(keep=4, steps=2), masks=1, batch_size=4)})
    compare = replace(compare, seeds=1, random=0)

    def looked_at(batch_size: int) -> int:
        trainer = replace(TRAINER, batch_size=batch_size)
        return compare(task(), RECOVER, trainer, tmp_path, evaluate=LOSS).trials[0].evaluations

    assert looked_at(16) == 2 * looked_at(8) > 0


def test_a_setting_that_counts_for_nothing_costs_nothing(tmp_path: Path, worked: Counter[str]) -> None:
    recover = replace(RECOVER, steps=2, batch_size=4)

    def compare(samples: int, steps: int, batch_size: int, trainer: tiny.Trainer, metric: tiny.HeldOutLoss) -> Findings:
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
        candidates = {"search": tiny.Search(sampler=sampler, steps=1)}
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
        assert _described(value) != _described(value)
    assert _described((1, {"a": float("inf")}, Path("x"), torch.float32)) == [
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

    first, again, other = (_described(load(text).sampler) for text in ("one", "one", "two"))
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
    key = _described(search)
    old = then(key)
    assert digest(old) != digest(key)
    for cls in (tiny.Search, tiny.ScoreFunction, tiny.Rules, tiny.LoRA):
        monkeypatch.setattr(cls, "__module__", "tinyfusion_core.somewhere.else")
    assert _described(search) == key
    assert then(_described(search)) == old
    assert "somewhere" not in json.dumps([key, old])
    monkeypatch.setattr(Grown, "__module__", "plugin.now")  # not in the tables: what is not of this package
    assert then(_described(Grown(more=1))) == {"class": "plugin.now.Grown", "size": 3}
    monkeypatch.setitem(PATHS, "plugin:Grown", "plugin.then.Small")
    monkeypatch.setitem(FIELDS, "plugin:Grown", {"size": "width"})
    assert then(_described([Grown(more=1)])) == [{"class": "plugin.then.Small", "width": 3}]


def test_a_field_that_is_added_costs_no_results_and_a_default_that_changes_does() -> None:
    assert _described(Grown(more=1)) == {"class": Name.of(Grown), "size": 3}
    assert _described(Grown()) == {"class": Name.of(Grown), "size": 3, "more": 2}


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


@dataclass(frozen=True)
class Fragile(toys.Match):
    """What begins with a block that does nothing cannot be trained."""

    def predict(self, model: torch.nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        out = super().predict(model, inputs)
        return out * float("nan") if model.training and model.config["scales"][0] == 0 else out


def test_a_recovery_that_diverges_is_a_finding(tmp_path: Path, worked: Counter[str]) -> None:
    compare = Compare(candidates=FIRST_AND_LAST, seeds=1, random=12)
    recover, trainer = replace(RECOVER, steps=4), replace(TRAINER, max_skipped=3)
    found = compare(task(Fragile()), recover, trainer, tmp_path, evaluate=LOSS)
    first, last = found.trials
    assert first.healed is None and first.calibration is not None and last.healed is not None
    lost = [m.kept for m in found.masks if m.healed is None]
    assert lost == [m.kept for m in found.masks if m.kept[0] in (0, 2, 5, 6)] != []
    assert [row.name for row in rows(found)] == ["last", "first", "random subsets"]
    write_comparison(tmp_path)
    worked.clear()
    assert compare(task(Fragile()), recover, trainer, tmp_path, evaluate=LOSS) == found
    assert worked == {}
    few = replace(compare, random=0)
    few(task(Fragile()), recover, replace(trainer, max_skipped=9), tmp_path, evaluate=LOSS)
    assert worked == {"recovered": 2}, "with more patience it may get through"


def test_a_search_that_diverges_is_an_error_with_its_name(tmp_path: Path) -> None:
    compare = Compare(candidates={"mine": tiny.Search(pattern=[4, 8], steps=12)}, seeds=1, random=0)
    with pytest.raises(UserError, match="candidate 'mine', seed 1: search: loss or gradient not finite"):
        compare(task(toys.Match(explode_at=tuple(range(12)))), RECOVER, TRAINER, tmp_path, evaluate=LOSS)


def test_an_audit_heals_with_an_average_of_its_own_steps() -> None:
    def ema(given: float | None) -> float | None:
        return Audit(steps=100).recovery(replace(RECOVER, ema=given)).ema

    assert [ema(None), ema(0.9999), ema(0.0)] == [None, None, 0.0]
    assert Compare().recovery(replace(RECOVER, ema=0.9999)).ema == 0.9999


@dataclass(frozen=True)
class Two(Backbone):
    """Two block lists, of four and two blocks."""

    def build(self) -> torch.nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return toys.Net(depths=(4, 2)).eval()

    def config(self, model: torch.nn.Module | None = None) -> dict[str, Any]:
        return {"depths": (4, 2) if model is None else (len(model.first), len(model.second))}

    @classmethod
    def construct(cls, config: Mapping[str, Any]) -> torch.nn.Module:
        return toys.Net(**config)

    def blocks(self, model: torch.nn.Module) -> Sequence[str]:
        return ["first.*", "second.*"]

    def after_prune(self, model: torch.nn.Module, kept: Mapping[str, Sequence[int]]) -> None:
        pass

    def example(self, num_rows: int) -> dict[str, torch.Tensor]:
        return {"x": torch.zeros(num_rows, 3, 8), "c": torch.zeros(num_rows, 8)}

    @classmethod
    def tiny(cls) -> Two:
        return cls()


@dataclass(frozen=True)
class Imitate(toys.Match):
    """Squared distance to what the whole network gives."""

    def prepare(self, batch: Mapping[str, torch.Tensor], rng: tiny.Rng) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            return {**batch, "target": Two().build()(**batch)}

    def predict(self, model: torch.nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return model(inputs["x"], inputs["c"])


def test_several_block_lists(tmp_path: Path) -> None:
    source = torch.Generator().manual_seed(0)
    data = Tensors({"x": torch.randn(16, 3, 8, generator=source), "c": torch.randn(16, 8, generator=source)})
    two = tiny.Task(backbone=Two(), loss=Imitate(), train=data, held_out=data)
    runs = iter(range(9))

    def compare(candidates: dict | None, search: tiny.Search | None = None) -> Findings:
        stage = Compare(candidates=candidates, seeds=1, random=99)
        recover = replace(RECOVER, steps=1)
        return stage(two, recover, TRAINER, tmp_path / str(next(runs)), search, LOSS)

    def splits(found: Sequence[Trial]) -> set[tuple[int, int]]:
        return {(sum(i < 4 for i in t.kept), sum(i >= 4 for i in t.kept)) for t in found}

    # One number for both lists: the choice between them is the candidates' own, and the random subsets' too.
    found = compare(
        {"first": FirstN(keep=3), "last": LastN(keep=3), "data": BlockInfluence(keep=3), "my": Keep([0, 4, 5])}
    )
    assert found.budget == 3
    assert splits(found.trials) >= {(3, 0), (1, 2)}
    assert len(found.masks) == found.num_masks == 20
    assert splits(found.masks) == {(3, 0), (2, 1), (1, 2)}
    assert tables(found)[0].title.startswith("6 → 3 blocks")
    found = compare({"list": Uniform(keep={"first": 2, "second": 1}), "group": FirstN(pattern=[1, 2])})
    assert found.budget == {"first": 2, "second": 1}
    assert splits(found.trials) == splits(found.masks) == {(2, 1)}
    assert len(found.masks) == found.num_masks == 12
    assert "6 → 2 of 'first' + 1 of 'second' blocks" in tables(found)[0].title
    with pytest.raises(
        UserError, match=r"a keeps 2 of 'first' \+ 1 of 'second'; b keeps 1 of 'first' \+ 2 of 'second'"
    ):
        compare({"a": Keep([0, 1, 4]), "b": Keep([0, 4, 5])})
    found = compare(None, tiny.Search(pattern={"first": [3, 4], "second": [0, 2]}, steps=1))
    assert found.budget == {"first": 3, "second": 0}
    assert (len(found.trials), found.left_out) == (11, {})
    assert splits(found.trials) == splits(found.masks) == {(3, 0)}


class Disobedient(FirstN):
    def decide(self, quota, task, trainer):
        return CriterionResult((0, 1))


def test_a_candidate_that_does_not_keep_its_budget_is_refused(tmp_path: Path, worked: Counter[str]) -> None:
    compare = Compare(candidates={"bad": Disobedient(keep=4)}, seeds=1)
    with pytest.raises(UserError, match="with seed 1 bad keeps 2, where its preview keeps 4"):
        compare(task(), RECOVER, TRAINER, tmp_path, evaluate=LOSS)
    assert "recovered" not in worked


def test_what_else_a_folder_holds_is_not_overwritten(tmp_path: Path) -> None:
    def run(stage: Compare | Audit) -> None:
        stage(task(), replace(RECOVER, steps=1), TRAINER, tmp_path, evaluate=LOSS)

    compare, audit = (cls(candidates=FIRST_AND_LAST, seeds=1) for cls in (Compare, Audit))
    run(replace(compare, random=0))
    before = (tmp_path / "findings.json").read_text()
    with pytest.raises(UserError, match=r"holds the findings of another command \(compare\); choose another --run-dir"):
        run(audit)
    run(replace(compare, random=0))
    assert (tmp_path / "findings.json").read_text() == before
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UserError, match="holds a run; choose another --run-dir"):
        run(compare)


@pytest.mark.parametrize("name", [1, "", " ", "random subsets"])
def test_names_that_no_candidate_can_have(name: Any) -> None:
    with pytest.raises(UserError, match=r"audit.candidates: the name of one is .*; expected a text"):
        Audit(candidates={"first": FirstN(keep=4), name: LastN(keep=4)})


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
    assert [t.healed for t in found.trials] == [t.healed for t in whole.trials]


def test_the_budget_must_be_the_same_and_all_problems_come_at_once(tmp_path: Path) -> None:
    def problem(candidates: dict, **kwargs) -> str:
        with pytest.raises(UserError) as e:
            Compare(candidates=candidates)(task(), RECOVER, TRAINER, tmp_path / "run", **kwargs)
        return str(e.value)

    text = problem({"first": FirstN(keep=4), "last": LastN(keep=3)})
    assert "not the same budget: first keeps 4; last keeps 3" in text
    text = problem({"first": FirstN(keep=9), "search": tiny.Search(pattern=[2, 3]), "last": LastN(keep=4)})
    assert "compare.candidates.first: FirstN.keep is 9" in text
    assert "compare.candidates.search: search.pattern: [2, 3] does not fit" in text
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="give candidates, or a search"):
        Audit()(task(), RECOVER, TRAINER, tmp_path)


def test_by_default_every_criterion_stands_beside_the_search(tmp_path: Path) -> None:
    found = Compare(seeds=1, random=0)(
        task(), replace(RECOVER, steps=1), TRAINER, tmp_path, tiny.Search(pattern=[2, 4], steps=2), LOSS
    )
    assert [t.method for t in found.trials] == [
        "search", "Uniform", "FirstN", "LastN", "BKSDM", "BlockInfluence", "InputOutputMSE", "SpanSimilarity",
        "LeaveOneOut", "Greedy", "Taylor",
    ]  # fmt: skip
    assert found.learned == ("search",)
    assert {len(t.kept) for t in found.trials} == {4}
    assert found.trials[0].evaluations == 2 * 8
    write_comparison(tmp_path)  # without a reference to judge by, too


@pytest.fixture
def comparing(recipe: Path) -> Path:
    settings = {
        **RECIPE,
        "search": {"pattern": [4, 8], "steps": 3},
        "recover": {"steps": 2},
        "evaluate": [*RECIPE["evaluate"], {"class_path": "Frechet", "init_args": {"num_samples": 10}}],
        "compare": {
            "candidates": {
                "learned": {"pattern": [4, 8], "steps": 3, "lr_gates": 1e-2},
                "<first>": {"class_path": "FirstN", "init_args": {"keep": 4}},
            },
            "seeds": 2,
            "random": 2,
        },
        "audit": {"candidates": {"last": {"class_path": "LastN", "init_args": {"keep": 4}}}, "masks": 3, "steps": 1},
    }
    recipe.write_text(yaml.safe_dump(settings))
    return recipe


def test_one_command_makes_table_page_and_figures(
    comparing: Path, tmp_path: Path, worked: Counter[str], capsys, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("runs/small-compare")
    assert main(["compare", str(comparing)]) == 0
    out = capsys.readouterr().out
    assert "8 → 4 blocks, 2 recovery steps, 2 seeds" in out
    assert f"report: {folder / 'report.html'}" in out
    names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.parent.name != "cells"}
    assert names == {
        ".lock", "findings.json", "recipe.yaml", "report.html", "table.csv", "trials.csv", "figures/kept.png",
        "figures/scatter.png",
    }  # fmt: skip
    found = Findings.load(folder / "findings.json")
    assert all(t.frechet is not None for t in found.trials)
    assert found.teacher < min(t.calibration for t in found.trials)
    with (folder / "table.csv").open() as file:
        table = {line["candidate"]: line for line in csv.DictReader(file)}
    assert set(table) == {"learned", "<first>", "random subsets"}
    assert table["<first>"]["kept"] == "0 1 2 3"
    healed = [t.healed for t in found.trials if t.method == "<first>"]
    assert float(table["<first>"]["healed"]) == pytest.approx(sum(healed) / 2)
    with (folder / "trials.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 2 * 2 + 2
    page = (folder / "report.html").read_text()
    assert not re.search(r"(src|href)=['\"](?!data:)", page)
    assert page.count("data:image/png;base64,") == 2
    assert "&lt;first&gt;" in page and "<first>" not in page
    assert shlex.join(["tinyfusion", "compare", str(comparing)]) in page
    # Nothing is left to do; the sampling decides the distance alone, and an audit shares the decisions.
    worked.clear()
    assert main(["compare", str(comparing)]) == 0
    assert worked == {}
    recipe = tiny.load_recipe(comparing)
    again = recipe.compare(make_task(recipe), recipe.recover, recipe.trainer, folder, evaluate=recipe.evaluate)
    assert again == found
    assert worked == {}
    quick = replace(recipe.evaluate[1], batch_size=7)
    fewer = replace(recipe.compare, seeds=1, random=0)
    features = shipped("digits")
    for recovered in (0, 2):
        worked.clear()
        given = replace(make_task(recipe), feature_space=features)
        fewer(given, recipe.recover, recipe.trainer, folder, evaluate=[recipe.evaluate[0], quick])
        assert worked["recovered"] == recovered
        with torch.no_grad():
            features.head.bias += 1
    worked.clear()
    assert main(["compare", str(comparing), "--loss.sampling_steps=3", "--compare.seeds=1"]) == 0
    assert worked == {"recovered": 2}
    assert main(["audit", str(comparing), "--audit.seeds", "1"]) == 0
    assert "Which cheap score foretells" in capsys.readouterr().out


def test_a_recipe_that_cannot_be_compared_is_told_why(comparing: Path, tmp_path: Path, capsys) -> None:
    def error(*flags: str) -> str:
        assert main(["compare", str(comparing), "--run-dir", str(tmp_path / "run"), *flags]) == 2
        return capsys.readouterr().err

    assert "compare: needs recover, to heal" in error("--search=null", "--recover=null")
    assert "compare: give candidates, or a search" in error("--search=null", "--compare.candidates=null")
    rounds = "--rounds={a: {search: {pattern: [4, 8], steps: 2}}}"
    assert "takes one search and one recovery" in error("--search=null", "--recover=null", rounds)
    assert "set train: null" in error("--train={steps: 2}", "--backbone.checkpoint=null", "--backbone.variant=null")
    assert "compare.seeds is 0" in error("--compare.seeds=0")
    assert "compare.candidates.learned.stepz: unknown key" in error("--compare.candidates.learned.stepz=3")
    assert "did you mean 'Greedy'" in error("--compare.candidates.learned={class_path: Gready}")
    assert "<first> keeps 3; learned keeps 4" in error("--compare.candidates.<first>.keep=3")
    assert "the name of one is 1; expected a text" in error(
        "--compare.candidates={1: {class_path: FirstN, init_args: {keep: 4}}}"
    )
    message = error("--compare.candidates={a: FirstN}")
    assert "FirstN: give keep or pattern, one of the two" in message and "search" not in message
    assert not (tmp_path / "run").exists()


def test_a_run_does_not_mind_what_its_comparisons_say_and_validate_shows_it(comparing: Path) -> None:
    def problems(*flags: str) -> list[str]:
        recipe = tiny.load_recipe(comparing, flags)
        run, everything = make_plan(recipe), make_plan(recipe, comparisons=True)
        assert everything.rows[: len(run.rows)] == run.rows
        assert everything.problems[: len(run.problems)] == run.problems
        return everything.problems[len(run.problems) :]

    assert problems() == []
    (problem,) = problems("--audit.candidates.first={class_path: FirstN, init_args: {keep: 3}}")
    assert "audit.candidates: not the same budget" in problem
    first, second = (
        problems("--compare.candidates.<first>.keep=9", "--recover=null", "--audit=null"),
        problems("--search=null", "--recover=null", "--rounds={a: {search: {pattern: [4, 8], steps: 2}}}"),
    )
    assert first == ["compare: needs recover, to heal what was pruned"]
    assert [problem.partition(":")[0] for problem in second] == ["compare", "audit"]
    assert "compare: give candidates" in problems("--search=null", "--compare.candidates=null", "--audit=null")[0]
    # With candidates of its own a comparison needs no search.
    recipe = tiny.load_recipe(comparing, ["--search=null"])
    assert make_comparison_plan(recipe, recipe.compare).problems == []
    plan = make_comparison_plan(recipe, replace(recipe.compare, candidates={"a": FirstN(keep=9)}))
    assert plan.problems == ["compare.candidates.a: FirstN.keep is 9; expected 1 to 8 blocks"]
    unbuilt = make_plan(tiny.load_recipe(comparing, ["--backbone.checkpoint=null"]), comparisons=True)
    assert sum("hidden_size, depth" in problem for problem in unbuilt.problems) == 1


def test_the_page_of_a_deep_network_with_losses_that_are_not_finite(tmp_path: Path) -> None:
    kept = [tuple(range(i % 3, 28 - 14 + i % 3)) for i in range(9)]
    trials = [Trial(f"method {i}", s, kept[i], 0.3 + i / 50, 0.1 + i * 1e-3, 5.0) for i in range(8) for s in (0, 1)]
    trials = [replace(t, method=t.method.replace("method 7", "$a_{$")) for t in trials]
    trials.append(Trial("diverged", 0, kept[8], 40.0, None, None))
    trials.append(Trial("diverged", 1, kept[7], 40.0, 0.2, None))
    masks = [Trial("", 0, kept[i], 0.5 + i, 0.2 + i / 100) for i in range(5)] + [Trial("", 0, kept[5], None, None)]
    found = Findings(
        view="compare", blocks=tuple(f"blocks.{i}" for i in range(28)), budget=14, num_masks=40_116_600,
        steps=10, seeds=(0, 1), teacher=None, learned=("method 0",), trials=tuple(trials), masks=tuple(masks),
        left_out={"SpanSimilarity": "why <not>"},
    )  # fmt: skip
    found.save(tmp_path / "findings.json")
    assert Findings.load(tmp_path / "findings.json") == found
    (table,) = tables(found)
    by_name = {row[0]: row for row in table.rows}
    assert list(by_name)[-2:] == ["diverged", "random subsets (6)"]  # what has no figure comes last
    assert by_name["diverged"][3] == "n/a"
    assert by_name["method 1"][5] == "100%"
    assert "seed 0: 2 3" in by_name["diverged"][1]
    page = write_comparison(tmp_path).read_text()
    assert "6 random subsets of 40,116,600" in page
    assert "SpanSimilarity left out: why &lt;not&gt;" in page
    assert "Not shown: 2 with a loss that is not finite." in page
    (tmp_path / "findings.json").write_text(json.dumps({"format_version": 0}))
    with pytest.raises(UserError, match="not the findings of a comparison"):
        write_comparison(tmp_path)


def test_work_inside_work_shows_in_the_line_of_the_outer_one(capsys, monkeypatch) -> None:
    monkeypatch.setattr("tinyfusion_core.runtime.progress.SECONDS_BETWEEN_LINES", 0)
    with track("all", 2) as outer:
        outer.tell("this")
        with track("part", 3) as inner:
            inner.advance(note="loss 1")
        outer.advance(2)
    with track("alone", 1) as alone:
        alone.advance()
    lines = [re.sub(r" \(\d+ s\)$", "", line) for line in capsys.readouterr().err.splitlines()]
    assert lines == ["all: 0/2 this", "all: 0/2 this (part 1/3 loss 1)", "all: 2/2", "alone: 1/1"]
