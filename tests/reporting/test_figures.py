"""Figures: what is drawn says what it is, and files can stand beside each other in one page."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import matplotlib.pyplot as plt
import pytest

from tinyfusion_core.comparison.figures import draw_choices, draw_kept, draw_scatter
from tinyfusion_core.comparison.statistics import MeanStd
from tinyfusion_core.reporting.drawing import STYLE, hover, save_figure
from tinyfusion_core.reporting.figures import draw_budgets, draw_dynamics, draw_loss, draw_quality

SVG = "{http://www.w3.org/2000/svg}"


def told(path: Path) -> list[str | None]:
    return [title.text for title in ElementTree.parse(path).iter(f"{SVG}title")]


def text(path: Path) -> list[str]:
    return ["".join(element.itertext()) for element in ElementTree.parse(path).iter(f"{SVG}text")]


def test_files_share_no_name_and_refer_to_their_own_and_have_the_same_bytes_again(tmp_path: Path) -> None:
    names = []
    for stem in ("a b(c)", "d", "d"):
        with plt.rc_context(STYLE):
            figure, axes = plt.subplots()
            (line,) = axes.plot([1, 2], [3, 9], "o-", clip_on=True)
            hover(line, '<b> & "quoted" \x01')
        save_figure(figure, tmp_path / f"{stem}.svg")
        content = (tmp_path / f"{stem}.svg").read_text()
        assert told(tmp_path / f"{stem}.svg") == ['<b> & "quoted" �']
        ids = re.findall(r'\bid="([^"]*)"', content)
        referred = re.findall(r'href="#([^"]*)"', content) + re.findall(r"url\(#([^)]*)\)", content)
        assert referred and set(referred) <= set(ids)
        names.append(set(ids))
    assert not names[0] & names[1] and names[1] == names[2]


@pytest.mark.parametrize("count", [9, 30])
def test_the_lines_of_a_loss_have_names_and_clipped_points_are_told(count: int, tmp_path: Path) -> None:
    path = tmp_path / "loss.svg"
    entries = [{"step": i, "loss": 1 + i / 100} for i in range(count)]
    draw_loss("search", entries, path)
    names = ["loss, mean between logged steps", "running mean of 3"]
    assert [line for line in text(path) if "mean" in line] == names[: 1 if count == 9 else 2]
    assert "step" in text(path), "nothing is left out"
    draw_loss("search", [*entries, {"step": count, "loss": 50.0}], path)
    assert "step (1 point is above, up to 50)" in text(path)
    draw_loss("recover", [{"step": 1, "loss": None}], path)
    assert "training loss: recover" in text(path)


def test_one_logged_step_is_seen_at_a_whole_step(tmp_path: Path) -> None:
    blocks = ["b.0", "b.1"]
    entry = {"step": 7, "loss": 0.5, "confidence": 0.5, "decision": [1], "marginals": [0.2, 0.8]}
    empty = {**entry, "marginals": [0.0, 0.0]}
    for logged in (entry, empty):
        draw_dynamics([logged], blocks, tmp_path / "kept.svg", tmp_path / f"{logged['marginals']}.svg")
    draw_loss("search", [entry], tmp_path / "loss.svg")
    for name in ("kept", "loss", entry["marginals"]):
        assert {"6", "7", "8"} <= {*text(tmp_path / f"{name}.svg")}, name
    pictures = [re.findall('base64,[^"]*', (tmp_path / f"{e['marginals']}.svg").read_text()) for e in (entry, empty)]
    assert pictures[0][0] != pictures[1][0]
    assert "<use " in (tmp_path / "loss.svg").read_text().partition('id="loss-line2d_')[2].rpartition("legend")[0]


def test_block_lists_are_named(tmp_path: Path) -> None:
    entries = [{"step": s, "confidence": 0.5, "decision": [0, 2], "marginals": [0.5] * 4} for s in (1, 2)]
    for blocks, named in ((["a.0", "a.1", "b$x$.0", "b$x$.1"], ["a", "b$x$"]), ([f"a.{i}" for i in range(4)], [])):
        draw_dynamics(entries, blocks, tmp_path / "dynamics.svg", tmp_path / "marginals.svg")
        for name in ("dynamics", "marginals"):
            assert [line for line in text(tmp_path / f"{name}.svg") if line in ("a", "b$x$")] == named


def test_depths_against_quality(tmp_path: Path) -> None:
    rows = [{"kept": [0, 1], "pruned": 2.0, "recovered": 1.5}, {"kept": [0], "pruned": None, "recovered": 1.75}]
    draw_budgets(rows, 1.0, tmp_path / "budgets.svg")
    assert told(tmp_path / "budgets.svg") == [
        "2 blocks, right after pruning: 2", "1 blocks, recovered: 1.75", "2 blocks, recovered: 1.5",
    ]  # fmt: skip
    depth = {"measured": {"4": 9.0, "8": 7.0}, "teacher": 3.0, "limit": 4.0, "interval": None, "measures": "FID"}
    depths = [{**depth, "kept": [0], "predicted": 6.0}, {**depth, "kept": [0, 1], "predicted": 3.5}]
    draw_quality(depths, (2, 1.2), tmp_path / "quality.svg")
    assert {"FID", "predicted"} <= set(text(tmp_path / "quality.svg"))


def test_marks_of_a_comparison_have_numbers_deviations_and_values(tmp_path: Path) -> None:
    near = (MeanStd(1.0, 0.1), MeanStd(0.5, 0.01))
    draw_scatter([(2.0, 0.7)], {"<a>": near, "b": near, "c": (MeanStd(3.0), MeanStd(0.9))}, ["b"], tmp_path / "s.svg")
    assert {"1, 2", "3"} <= set(text(tmp_path / "s.svg"))
    assert told(tmp_path / "s.svg") == [
        "random subset: 2 right after pruning, 0.7 recovered",
        "<a>: 1.000 ± 0.100 right after pruning, 0.5000 ± 0.0100 recovered",
        "c: 3.000 right after pruning, 0.9000 recovered",
        "b: 1.000 ± 0.100 right after pruning, 0.5000 ± 0.0100 recovered",  # a search is above the others
    ]
    draw_scatter([(2.0, 0.7), (90.0, 0.8)], {}, [], tmp_path / "s.svg")
    assert "50" in text(tmp_path / "s.svg"), "a scale of ratios"
    draw_choices([0.7, 0.8], {"a": [0.5, 0.6], "b": [0.9]}, ["a"], tmp_path / "c.svg")
    assert told(tmp_path / "c.svg") == ["a: 0.5", "a: 0.6", "b: 0.9", "random subsets: 0.7", "random subsets: 0.8"]
    draw_choices([], {"random subsets": [0.5]}, [], tmp_path / "c.svg")
    assert told(tmp_path / "c.svg") == ["random subsets: 0.5"]
    draw_kept({"a": [1.0, 0.5]}, tmp_path / "k.svg")
    assert told(tmp_path / "k.svg") == [
        "a: block 0 kept with 100% of the seeds",
        "a: block 1 kept with 50% of the seeds",
    ]
