"""The report: complete, self-contained, and looked at in a real browser."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
import yaml
from safetensors.torch import save_file

import tinyfusion_core as tiny
from browser import Browser
from places import TESTS
from tinyfusion_core.pipeline.compare import write_comparison
from tinyfusion_core.reporting.measured import results
from tinyfusion_core.reporting.report import write_report
from tinyfusion_core.reporting.strip import strip_of
from tinyfusion_core.runtime.run_folder import RunFolder
from tinyfusion_images.pictures import Pictures


def measurement(name: str, *values: float | None, unit: str = "", better: str = "", note: str = "") -> dict:
    by_model = dict(zip(("teacher", "recovered"), values, strict=True))
    return {"name": name, "values": by_model, "unit": unit, "better": better, "note": note}


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A finished run of a 28-block network, written by hand: reports are made from files alone."""
    run = RunFolder(tmp_path / "deep<run>")
    kept = tuple(range(0, 28, 2))
    groups = tuple((i, i + 1) for i in range(0, 28, 2))
    confidences = tuple(0.5 + i / 40 for i in range(14))
    blocks = tuple(f"blocks.{i}" for i in range(28))
    marginals = tuple(float(i % 2 == 0) for i in range(28))
    tiny.Decision(
        blocks=blocks,
        kept=kept,
        method="<script>alert(1)</script>",
        pattern=[1, 2],
        choices=groups,
        confidences=confidences,
        marginals=marginals,
        provenance={"seed": 0},
    ).save(run / "decision.json")
    for step in range(10, 110, 10):
        state = {"decision": list(kept), "marginals": [0.5] * 28, "confidence": step / 100, "tau": 1.0}
        run.log("search", step, {"loss": 1 / step, **state})
    run.log("recover", 10, {"loss": None})
    for step in range(20, 900, 10):
        run.log(
            "recover",
            step,
            {"loss": 1 / step, "share_kd": 0.9, "share_gt": 0.1 if step > 450 else 0.3, "share_feature": 0.004},
        )
    figures = [
        measurement("blocks", 28, 14),
        measurement("FLOPs", None, None, note="why <not>"),
        measurement("latency", 12.5, 6.25, unit="ms", better="lower", note="how"),
    ]
    (run / "metrics.json").write_text(json.dumps({"measurements": figures}))
    (run / "run.json").write_text(
        json.dumps({"settings": {}, "command": "tinyfusion run x.yaml", "versions": {}, "hardware": {}})
    )
    (run / "recipe.yaml").write_text(yaml.safe_dump({"trainer": {"seed": 0}, "search": {}, "recover": {}}))
    run.finish("search", "key", 3700)
    images = torch.randint(0, 255, (12, 3, 8, 8), dtype=torch.uint8)
    save_file(
        {"teacher": images, "recovered": images.clone(), "labels": torch.arange(12) % 3}, run / "samples.safetensors"
    )
    return run


def test_the_page_is_self_contained_and_says_what_was_found(folder: RunFolder) -> None:
    page = write_report(folder, Pictures().show(folder)).read_text()
    assert not re.search(r"(src|href)=['\"](?!data:|#)", page)
    assert page.count("<svg") == 4
    assert page.count("<img") == 2
    assert "28 → 14 blocks" in page
    assert "deep&lt;run&gt;" in page
    assert "why &lt;not&gt;" in page
    assert "<script>" not in page
    assert "2.00 times as fast (latency 12.5 ms → 6.25 ms)." in page
    assert (
        "0.50 in the least sure of 14 choices, that among blocks 0 and 1: undecided; try more steps or a race." in page
    )
    assert page.count('class="choice sure"') == 14
    assert "1 h 1 min in all" in page
    assert (
        "Of the gradient of recover, the distance to the teacher&#39;s prediction was 90%, the training loss 20%, "
        "the features less than 1%." in page
    )
    for name in ("dynamics.svg", "marginals.svg", "loss_search.svg", "loss_recover.svg", "samples_teacher.png"):
        assert (folder / "figures" / name).stat().st_size > 1000


def test_the_table_has_ratios_and_says_what_cannot_be_had(folder: RunFolder) -> None:
    names, rows = results(folder)
    assert names == ["teacher", "recovered"]
    assert rows[0] == ("blocks", ["28", "14"], "0.50x", "")
    assert rows[1][1:3] == (["n/a", "n/a"], "")
    assert rows[2] == ("latency ↓", ["12.5 ms", "6.25 ms"], "0.50x", "how")


def test_confidences_are_below_what_was_chosen_together_and_lists_have_rows(folder: RunFolder) -> None:
    groups = strip_of(tiny.Decision.load(folder / "decision.json"))[0].groups
    assert [[b.number for b in blocks] for blocks, _ in groups] == [[i, i + 1] for i in range(0, 28, 2)]
    assert groups[0][1] == "0.50" and groups[13][1] == "0.82"
    assert groups[0][0][1].told == "blocks.1: removed, probability to be kept 0.00"
    blocks = ("a.0", "a.1", "b.0", "b.1")
    across = tiny.Decision(blocks=blocks, kept=(0, 3), method="x", choices=((0, 1, 2, 3),), confidences=(0.7,))
    rows = strip_of(across)
    assert [row.name for row in rows] == ["a", "b"]
    assert [[([b.kept for b in blocks], told) for blocks, told in row.groups] for row in rows] == [
        [([True, False], "")], [([False, True], "")],
    ]  # fmt: skip


@pytest.mark.slow
def test_in_a_real_browser(folder: RunFolder, browser: Browser) -> None:
    measured = json.loads((folder / "metrics.json").read_text())
    for row in measured["measurements"]:  # as of a whole run
        teacher, recovered = row["values"].values()
        row["values"] = {"teacher": teacher, "pruned": recovered, "recovered": recovered}
    (folder / "metrics.json").write_text(json.dumps(measured))
    page = write_report(folder, Pictures().show(folder)).as_uri()
    papers = set()
    for width in (1280, 768, 400):
        for scheme in ("light", "dark"):
            browser.open(page, width, scheme)
            assert browser("return [...document.images].every(i => i.naturalWidth > 0 && i.clientWidth > 0)")
            sizes = browser("return [...document.querySelectorAll('svg')].map(s => [s.clientWidth, s.clientHeight])")
            assert len(sizes) == 4 and all(across > 300 and up > 100 for across, up in sizes), "a figure is small"
            assert browser("return document.documentElement.scrollWidth - innerWidth") <= 0, "wider than the window"
            table = "document.querySelector('.results')"
            assert browser(f"return {table}.scrollWidth - {table}.parentNode.clientWidth") <= 0, "a column is cut"
            papers.add((scheme, paper(browser), ink(browser)))
            assert browser.complaints() == []
    assert len(papers) == 2
    (_, light, dark_ink), (_, dark, light_ink) = sorted(papers, reverse=True)
    assert min(light) > 200 > max(dark_ink) and max(dark) < 60 < 200 < min(light_ink)
    browser.open(page, 768, "dark", media="print")
    assert (paper(browser), ink(browser)) == ((255, 255, 255), dark_ink), "printed on white, whatever is preferred"


@pytest.mark.slow
def test_a_comparison_in_a_real_browser(browser: Browser, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(TESTS / "before_rooms" / "compare", tmp_path / "compare"))
    page = write_comparison(folder).as_uri()
    for width in (1280, 768, 400):
        browser.open(page, width, "dark")
        wide = "return [document.documentElement, ...document.querySelectorAll('.scroll')]"
        assert browser(f"{wide}.map(e => e.scrollWidth - e.clientWidth)") == [0, 0], "something is cut"
        named = browser("return getComputedStyle(document.querySelector('.plain td'), '::before').content")
        assert named == ('"kept blocks"' if width == 400 else "none")
        assert browser.complaints() == []


def paper(browser: Browser) -> tuple[int, ...]:
    return color(browser("return getComputedStyle(document.body).backgroundColor"))


def ink(browser: Browser) -> tuple[int, ...]:
    """The colour of the texts of a figure."""
    return color(browser("return getComputedStyle(document.querySelector('svg text')).fill"))


def color(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text)))[:3]


def test_a_race_is_drawn(folder: RunFolder) -> None:
    kept = [[0, 1], [0, 2], [1, 2]]
    losses = [(0.0, 0.0), (0.1, 0.02), (None, None)]  # the last has diverged
    entries = [
        {
            "kept": mask,
            "of": ["<b>Mine", "Greedy"],
            "steps": 8,
            "loss": behind,
            "behind": behind,
            "standard_error": error,
        }
        for mask, (behind, error) in zip(kept, losses, strict=True)
    ]
    decision = json.loads((folder / "decision.json").read_text())
    decision["provenance"]["race"] = [entries, entries[:2]]
    (folder / "decision.json").write_text(json.dumps(decision))
    page = write_report(folder).read_text()
    assert "The race" in page
    drawn = ElementTree.parse(folder / "figures" / "race_1.svg").getroot()
    told = [title.text for title in drawn.iter("{http://www.w3.org/2000/svg}title")]
    assert told == ["keeps 0 1: 0 ± 0 behind", "keeps 0 2: 0.1 ± 0.02 behind"]
    assert "round 1: 8 steps, best 2 of 3" in "".join(drawn.itertext())
    assert (folder / "figures" / "race_2.svg").exists()
