"""Comparisons: the same budget and the same recovery for all candidates, beside random subsets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tinyfusion_core as tiny
import toys
from comparisons import FIRST_AND_LAST, LOSS, RECOVER, TRAINER, task
from tinyfusion_core.comparison.results import ComparisonResults, Entry
from tinyfusion_core.comparison.statistics import guides, summaries
from tinyfusion_core.comparison.study import Audit, Compare
from tinyfusion_core.comparison.tables import tables
from tinyfusion_core.errors import UserError
from tinyfusion_core.pipeline.compare import write_comparison
from tinyfusion_core.protocols.backbone import Backbone
from tinyfusion_core.protocols.data import Tensors
from tinyfusion_core.selection.criteria.base import CriterionResult
from tinyfusion_core.selection.criteria.positions import FirstN, LastN, Uniform
from tinyfusion_core.selection.criteria.sensitivity import Greedy, LeaveOneOut
from tinyfusion_core.selection.criteria.similarity import BlockInfluence
from tinyfusion_core.selection.given import Keep


def test_an_audit_ranks_the_working_blocks_first(tmp_path: Path) -> None:
    candidates = {"greedy": Greedy(keep=4), "one by one": LeaveOneOut(keep=4), "idle": Keep([0, 2, 5, 6])}
    audit = Audit(candidates=candidates, seeds=1, masks=24, steps=2)
    found = audit(task(), RECOVER, TRAINER, tmp_path, evaluate=LOSS)
    assert found.num_masks == 70
    assert len(found.masks) == len({m.kept for m in found.masks}) == 24
    assert all(len(m.kept) == 4 for m in found.masks)
    by_name = {row.name: row for row in summaries(found)}
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
    assert {p.name for p in (tmp_path / "figures").iterdir()} == {"choices.svg", "scatter.svg", "kept.svg"}


class Protecting(toys.Planted):
    """A network that nothing could save without two of its blocks."""

    def limits(self, model: torch.nn.Module) -> Mapping[str, Sequence[Any]]:
        return {"protect": [5, 6]}


def test_random_subsets_obey_the_limits_of_the_network(tmp_path: Path) -> None:
    compare = Compare(candidates={"first": FirstN(keep=3)}, seeds=1, random=9)
    limited = replace(task(), backbone=Protecting())
    found = compare(limited, replace(RECOVER, steps=1), TRAINER, tmp_path, evaluate=LOSS)
    assert found.num_masks == 6  # one block of six beside the two
    assert len(found.masks) == 6 and all({5, 6} < set(entry.kept) for entry in found.masks)
    assert [entry.kept for entry in found.entries] == [(0, 5, 6)]


def test_no_more_subsets_than_there_are(tmp_path: Path) -> None:
    found = Compare(candidates={"first": FirstN(keep=7)}, seeds=1, random=9)(
        task(), replace(RECOVER, steps=1), TRAINER, tmp_path, evaluate=LOSS
    )
    assert {m.kept for m in found.masks} == {tuple(j for j in range(8) if j != i) for i in range(8)}
    assert len(found.masks) == found.num_masks == 8
    best = min(m.recovered for m in found.masks)
    (row, _) = summaries(found)
    assert row.better.mean == sum(m.recovered > row.recovered.mean for m in found.masks) / 8
    assert row.to_best.mean == row.recovered.mean - best
    assert "share of all 8 subsets" in " ".join(tables(found)[0].notes)


@pytest.mark.slow
def test_subsets_with_a_seed_of_their_own_and_more_of_them_add_to_the_first(tmp_path: Path) -> None:
    compare = Compare(candidates=FIRST_AND_LAST, seeds=2, random=3)
    few = compare(task(), RECOVER, TRAINER, tmp_path, evaluate=LOSS)
    many = replace(compare, random=6)(task(), RECOVER, TRAINER, tmp_path, evaluate=LOSS)
    assert {m.seed for m in many.masks} == {1}
    assert many.masks[:3] == few.masks
    assert len({m.kept for m in many.masks}) == 6
    assert {t.seed for t in many.entries} == {1, 2}


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
    first, last = found.entries
    assert first.recovered is None and first.calibration is not None and last.recovered is not None
    lost = [m.kept for m in found.masks if m.recovered is None]
    assert lost == [m.kept for m in found.masks if m.kept[0] in (0, 2, 5, 6)] != []
    assert [row.name for row in summaries(found)] == ["last", "first", "random subsets"]
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


def test_an_audit_recovers_with_an_average_of_its_own_steps() -> None:
    def ema(given: float | None) -> float | None:
        return Audit(steps=100).recovery(replace(RECOVER, steps=100_000, ema=given)).ema

    assert [ema(None), ema(0.9999), ema(0.0)] == [None, None, 0.0]
    assert Compare().recovery(replace(RECOVER, steps=100_000, ema=0.9999)).ema == 0.9999


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


@pytest.mark.slow
def test_several_block_lists(tmp_path: Path) -> None:
    source = torch.Generator().manual_seed(0)
    data = Tensors({"x": torch.randn(16, 3, 8, generator=source), "c": torch.randn(16, 8, generator=source)})
    two = tiny.Task(backbone=Two(), loss=Imitate(), train=data, held_out=data)
    runs = iter(range(9))

    def compare(candidates: dict | None, search: tiny.Search | None = None) -> ComparisonResults:
        stage = Compare(candidates=candidates, seeds=1, random=99)
        recover = replace(RECOVER, steps=1)
        return stage(two, recover, TRAINER, tmp_path / str(next(runs)), search, LOSS)

    def splits(found: Sequence[Entry]) -> set[tuple[int, int]]:
        return {(sum(i < 4 for i in t.kept), sum(i >= 4 for i in t.kept)) for t in found}

    # One number for both lists: the choice between them is the candidates' own, and the random subsets' too.
    found = compare(
        {"first": FirstN(keep=3), "last": LastN(keep=3), "data": BlockInfluence(keep=3), "my": Keep([0, 4, 5])}
    )
    assert found.budget == 3
    assert splits(found.entries) >= {(3, 0), (1, 2)}
    assert len(found.masks) == found.num_masks == 20
    assert splits(found.masks) == {(3, 0), (2, 1), (1, 2)}
    assert tables(found)[0].title.startswith("6 → 3 blocks")
    found = compare({"list": Uniform(keep={"first": 2, "second": 1}), "group": FirstN(pattern=[1, 2])})
    assert found.budget == {"first": 2, "second": 1}
    assert splits(found.entries) == splits(found.masks) == {(2, 1)}
    assert len(found.masks) == found.num_masks == 12
    assert "6 → 2 of 'first' + 1 of 'second' blocks" in tables(found)[0].title
    with pytest.raises(
        UserError, match=r"a keeps 2 of 'first' \+ 1 of 'second'; b keeps 1 of 'first' \+ 2 of 'second'"
    ):
        compare({"a": Keep([0, 1, 4]), "b": Keep([0, 4, 5])})
    found = compare(None, tiny.Search(pattern={"first": [3, 4], "second": [0, 2]}, steps=2))
    assert found.budget == {"first": 3, "second": 0}
    assert (len(found.entries), found.left_out) == (11, {})
    assert splits(found.entries) == splits(found.masks) == {(3, 0)}


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
    with pytest.raises(UserError, match=r"holds the results of another command \(compare\); choose another --run-dir"):
        run(audit)
    run(replace(compare, random=0))
    assert (tmp_path / "findings.json").read_text() == before
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UserError, match="holds a run; choose another --run-dir"):
        run(compare)


@pytest.mark.parametrize("name", ["", " ", "random subsets"])
def test_names_that_no_candidate_can_have(name: Any) -> None:
    with pytest.raises(UserError, match=r"^Audit\.candidates: the name of one is .*; expected a text"):
        Audit(candidates={"first": FirstN(keep=4), name: LastN(keep=4)})


def test_the_budget_must_be_the_same_and_all_problems_come_at_once(tmp_path: Path) -> None:
    def problem(candidates: dict, **kwargs) -> str:
        with pytest.raises(UserError) as e:
            Compare(candidates=candidates)(task(), RECOVER, TRAINER, tmp_path / "run", **kwargs)
        return str(e.value)

    text = problem({"first": FirstN(keep=4), "last": LastN(keep=3)})
    assert "not the same budget: first keeps 4; last keeps 3" in text
    text = problem({"first": FirstN(keep=9), "search": tiny.Search(pattern=[2, 3]), "last": LastN(keep=4)})
    assert "Compare.candidates.first: FirstN.keep is 9" in text
    assert "Compare.candidates.search: pattern: [2, 3] does not fit" in text
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="give candidates, or a search"):
        Audit()(task(), RECOVER, TRAINER, tmp_path)


def test_by_default_every_criterion_stands_beside_the_search(tmp_path: Path) -> None:
    found = Compare(seeds=1, random=0)(
        task(), replace(RECOVER, steps=1), TRAINER, tmp_path, tiny.Search(pattern=[2, 4], steps=2), LOSS
    )
    assert [t.method for t in found.entries] == [
        "search", "Uniform", "FirstN", "LastN", "BKSDM", "BlockInfluence", "InputOutputMSE", "SpanSimilarity",
        "LeaveOneOut", "Greedy", "Taylor",
    ]  # fmt: skip
    assert found.learned == ("search",)
    assert {len(t.kept) for t in found.entries} == {4}
    assert found.entries[0].evaluations == 2 * 8
    write_comparison(tmp_path)  # without a reference to judge by, too
