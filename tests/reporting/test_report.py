"""The report: complete, self-contained, and looked at in a real browser."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

import tinyfusion_core as tiny
from tinyfusion_core.reporting.measured import results
from tinyfusion_core.reporting.report import write_report
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
        run.log("recover", step, {"loss": 1 / step})
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
    assert not re.search(r"(src|href)=['\"](?!data:)", page)
    assert page.count("data:image/png;base64,") == 5
    assert "28 → 14 blocks" in page
    assert "deep&lt;run&gt;" in page
    assert "why &lt;not&gt;" in page
    assert "<script>" not in page
    assert "latency 0.50x" in page
    assert "confidence 0.50" in page
    assert "1 h 1 min in all" in page
    for name in ("blocks", "dynamics", "losses", "samples_teacher", "samples_recovered"):
        assert (folder / "figures" / f"{name}.png").stat().st_size > 1000


def test_the_table_has_ratios_and_says_what_cannot_be_had(folder: RunFolder) -> None:
    names, rows = results(folder)
    assert names == ["teacher", "recovered"]
    assert rows[0] == ("blocks", ["28", "14"], "0.50x", "")
    assert rows[1][1:3] == (["n/a", "n/a"], "")
    assert rows[2] == ("latency ↓", ["12.5 ms", "6.25 ms"], "0.50x", "how")


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_real_browser(folder: RunFolder, width: int, tmp_path: Path) -> None:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    browser, driver_path = shutil.which("chromium"), shutil.which("chromedriver")
    assert browser, "install Chromium and its driver (Debian: apt-get install chromium chromium-driver)"
    assert driver_path, "install Chromium's driver (Debian: apt-get install chromium-driver)"
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--disable-quic", f"--user-data-dir={tmp_path / 'profile'}",
    ):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(driver_path))
    try:
        driver.set_window_size(width, 1200)
        driver.get(write_report(folder, Pictures().show(folder)).as_uri())
        sizes = driver.execute_script("return [...document.images].map(i => [i.naturalWidth, i.clientWidth])")
        overflow = driver.execute_script("return document.documentElement.scrollWidth - window.innerWidth")
        errors = [entry for entry in driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
    finally:
        driver.quit()
    assert len(sizes) == 5
    assert all(natural > 0 and shown > 0 for natural, shown in sizes), "an image is missing"
    assert errors == []
    assert overflow <= 0, "the page is wider than the window"


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
    assert (folder / "figures" / "race.png").read_bytes().startswith(b"\x89PNG")
