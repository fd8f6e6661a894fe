"""What a comparison has found: statistics, tables, its file and its page."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest

import tinyfusion_core as tiny
from tinyfusion_core.comparison.results import ComparisonResults, Entry
from tinyfusion_core.comparison.statistics import spearman
from tinyfusion_core.comparison.tables import table_csv, tables, trials_csv
from tinyfusion_core.errors import UserError
from tinyfusion_core.pipeline.compare import write_comparison


def test_spearman_gives_equal_values_the_mean_of_their_ranks() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    # Ranks 1, 2.5, 2.5, 4 against 2, 1, 3, 4: deviations -1.5, 0, 0, 1.5 and -0.5, -1.5, 0.5, 1.5.
    assert spearman([1, 2, 2, 9], [5, 4, 6, float("inf")]) == pytest.approx(3 / (4.5 * 5) ** 0.5)
    assert spearman([1, 1, 1], [1, 2, 3]) is None


def test_the_page_of_a_deep_network_with_losses_that_are_not_finite(tmp_path: Path) -> None:
    kept = [tuple(range(i % 3, 28 - 14 + i % 3)) for i in range(9)]
    entries = [
        Entry(f"method {i}", s, kept[i], 0.3 + i / 50, 0.1 + i * 1e-3, {"Fréchet distance": 5.0})
        for i in range(8)
        for s in (0, 1)
    ]
    entries = [replace(t, method=t.method.replace("method 7", "$a_{$")) for t in entries]
    entries.append(Entry("diverged", 0, kept[8], 40.0, None))
    entries.append(Entry("diverged", 1, kept[7], 40.0, 0.2))
    masks = [Entry("", 0, kept[i], 0.5 + i, 0.2 + i / 100) for i in range(5)] + [Entry("", 0, kept[5], None, None)]
    found = ComparisonResults(
        view="compare", blocks=tuple(f"blocks.{i}" for i in range(28)), budget=14, num_masks=40_116_600,
        steps=10, seeds=(0, 1), teacher=None, learned=("method 0",), entries=tuple(entries), masks=tuple(masks),
        left_out={"SpanSimilarity": "why <not>"},
    )  # fmt: skip
    found.save(tmp_path / "findings.json")
    assert ComparisonResults.load(tmp_path / "findings.json") == found
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
    with pytest.raises(UserError, match="'format_version' is 0; expected 1"):
        write_comparison(tmp_path)


OLD = {"method": "a", "seed": 3, "kept": [0, 2], "calibration": 1.5, "healed": 0.5, "frechet": 7.0, "scores": None,
       "seconds": 0.1, "evaluations": 8}  # fmt: skip


@pytest.mark.parametrize("distance", [7.0, None])
def test_an_entry_without_other_metrics_is_written_as_ever(distance: float | None) -> None:
    old = {**OLD, "frechet": distance}
    entry = Entry.from_json(old)
    assert (entry.recovered, entry.metrics) == (0.5, {} if distance is None else {"Fréchet distance": 7.0})
    assert json.loads(json.dumps(entry.to_json())) == old
    more = replace(entry, metrics={"seed": 2.0, **entry.metrics})  # a metric may be called like a key
    assert more.to_json() == {**entry.to_json(), "metrics": {"seed": 2.0}}
    assert Entry.from_json(json.loads(json.dumps(more.to_json()))) == more


def test_every_metric_of_the_candidates_is_a_column(tmp_path: Path) -> None:
    entries = (Entry("a", 0, (0,), 1.0, 0.5, {"accuracy": 0.25, "Fréchet distance": 7.0}), Entry("b", 0, (1,), 1.0))
    found = ComparisonResults(
        view="compare", blocks=("x.0", "x.1"), budget=1, num_masks=2, steps=1, seeds=(0,), teacher=None, learned=(),
        entries=entries, masks=(Entry("", 0, (1,), 1.0, 0.6),),
    )  # fmt: skip
    found.save(tmp_path / "findings.json")
    assert ComparisonResults.load(tmp_path / "findings.json") == found
    (table,) = tables(found)
    assert table.columns[3:7] == ("recovered loss", "accuracy", "Fréchet distance", "better than random")
    assert [row[4:6] for row in table.rows] == [("0.2500", "7.000"), ("n/a", "n/a"), ("", "")]
    a, b, _ = csv.DictReader(io.StringIO(table_csv(found)))
    assert (a["accuracy"], a["frechet"], a["healed"], b["accuracy"]) == ("0.25", "7.0", "0.5", "")
    a, b, random = csv.DictReader(io.StringIO(trials_csv(found)))
    assert (a["accuracy"], a["frechet"], random["method"]) == ("0.25", "7.0", "random subsets")
    assert list(a)[:6] == ["method", "seed", "kept", "calibration", "healed", "frechet"]


def test_the_old_name_of_the_results_still_leads_there() -> None:
    with pytest.warns(DeprecationWarning, match="tinyfusion_core.Findings is now tinyfusion_core.ComparisonResults"):
        assert tiny.Findings is tiny.ComparisonResults
