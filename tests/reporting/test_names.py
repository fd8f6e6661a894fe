"""Names are names: whatever they look like, they are printed and written as they are."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

import tinyfusion_core as tiny
from marks import slow_but
from places import TESTS
from small_run import digits_task
from tinyfusion_core.cli import main
from tinyfusion_core.pipeline.compare import write_comparison
from tinyfusion_core.reporting.report import write_report
from tinyfusion_core.runtime.progress import plain_console, track

NAMES = slow_but(["a[/b]", "a[red]", "a:bug:", "a[link=x]y", "a$\\frac$", "<th>a", "a&amp;"], "a[/b]", "<th>a")


@pytest.mark.parametrize("name", NAMES)
def test_a_run_folder_is_called_what_it_is_called(
    name: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "/" in name:
        (tmp_path / name).parent.mkdir()
    folder = Path(shutil.copytree(finished, tmp_path / name))
    recipe = shutil.copy(folder / "recipe.yaml", tmp_path / "again.yaml")
    assert main(["run", str(recipe), "--run-dir", str(folder)]) == 0
    out = capsys.readouterr().out
    assert f"report: {folder / 'report.html'}" in out
    assert f"{folder.name}: 8 → 4 blocks" in out
    assert main(["show", str(folder)]) == 0
    assert f"{folder.name}: 8 → 4 blocks" in capsys.readouterr().out
    assert main(["watch", str(folder), "--once"]) == 0
    assert folder.name in capsys.readouterr().out
    shutil.copy(recipe, folder.parent / f"{folder.name}.yaml")
    assert main(["validate", str(folder.parent / f"{folder.name}.yaml")]) == 0
    assert f"{folder.name}.yaml" in "".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("name", NAMES)
def test_candidates_and_models_are_called_what_they_are_called(
    name: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(TESTS / "before_rooms" / "compare", tmp_path / "compare"))
    found = json.loads((folder / "findings.json").read_text())
    first = found["trials"][0]["method"]
    text = (folder / "findings.json").read_text().replace(json.dumps(first), json.dumps(name))
    (folder / "findings.json").write_text(text)
    page = write_comparison(folder).read_text()
    assert main(["watch", str(folder), "--once"]) == 0
    assert name in capsys.readouterr().out
    assert_escaped(page, name)

    run = tiny.RunFolder(shutil.copytree(finished, tmp_path / "run"))
    metrics = json.loads((run / "metrics.json").read_text())
    for row in metrics["measurements"]:
        row["values"] = {name if key != "teacher" else key: value for key, value in row["values"].items()}
        row["name"], row["note"], row["unit"] = f"{name} {row['name']}", f"note {name}", name
    (run / "metrics.json").write_text(json.dumps(metrics))
    assert_escaped(write_report(run).read_text(), name)


def assert_escaped(page: str, name: str) -> None:
    """The name is nowhere in the page as markup."""
    escaped = name.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    assert escaped in page
    if escaped != name:
        assert name not in page.replace(escaped, "")


@pytest.mark.parametrize("name", NAMES)
def test_progress_tells_names_as_they_are(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    plain_console().print(f"note {name}")
    assert f"note {name}\n" in capsys.readouterr().out
    with track(name, 1) as tracker:
        tracker.advance(note=f"note {name}")
    assert f"{name}: 1/1 note {name}" in capsys.readouterr().err


@pytest.mark.parametrize("licence", ["MIT: with words", "a\nlicense: b\n---\n# c", "no", "[x]", "*a", "  ", "Ünï"])
def test_a_licence_is_one_text_of_the_model_card(licence: str, tmp_path: Path) -> None:
    task = digits_task()
    task = type(task)(**{**vars(task), "origin": {"licence": licence, "checkpoint": "a`b\n\n# c"}})
    decision = tiny.Keep([0, 1, 5])(task, tiny.Trainer(precision="fp32"))
    card = (tiny.save_pretrained(tiny.prune(task, decision), task, decision, tmp_path) / "README.md").read_text()
    matter, body = re.fullmatch(r"---\n(.*?)---\n(.*)", card, re.DOTALL).groups()
    told = yaml.safe_load(matter)
    assert told["license"] == " ".join(licence.split())
    assert told["tags"] == ["pruned", "depth-pruning", "tinyfusion"]
    assert [line for line in body.splitlines() if line.startswith("# ")] == ["# DiT, 8 → 3 blocks"]
