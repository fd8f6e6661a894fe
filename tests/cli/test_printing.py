"""What commands print: tables for people and for pipes, JSON, colours; and what reading files does not import."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rich.table import Table

import tinyfusion_core as tiny
from places import TESTS
from small_run import RECIPE
from tinyfusion_core.cli import OVERRIDES, main
from tinyfusion_core.cli.printing import print_table, print_tables
from tinyfusion_core.comparison.results import ComparisonResults

COMPARED = TESTS / "before_rooms" / "compare"


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal of 60 columns that has colours."""
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm-256color", "COLUMNS": "60"}.items():
        monkeypatch.setenv(name, value)


def a_table() -> Table:
    table = Table("name", "what it is", title="A title", caption="a note")
    table.add_row("GaussianDiffusion", "noise that is added in many small steps and taken away again")
    table.add_row("Frechet", "a distance\nof two lines")
    return table


def printed(capsys: pytest.CaptureFixture[str]) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)


def words(text: str) -> set[str]:
    return set(re.findall(r"[\w.]+", text))


@pytest.mark.usefixtures("terminal")
def test_a_table_is_wrapped_at_spaces(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(a_table())
    out = printed(capsys)
    assert max(map(len, out.splitlines())) <= 60
    assert "│ GaussianDiffusion │ noise" in out
    assert {"A", "title", "note", "GaussianDiffusion", "again", "lines"} <= words(out)


@pytest.mark.usefixtures("terminal")
def test_where_words_do_not_fit_there_is_a_line_for_each_cell(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "28")
    print_table(a_table())
    out = printed(capsys)
    assert max(map(len, out.splitlines())) <= 28
    assert "\nGaussianDiffusion\n  what it is: noise" in out
    assert re.search(r"\nFrechet\n  what it is: a distance of +\n  two lines", out) and "a note" in out


def test_a_pipe_gets_tabs(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(a_table())
    assert capsys.readouterr().out.splitlines() == [
        "A title",
        "name\twhat it is",
        "GaussianDiffusion\tnoise that is added in many small steps and taken away again",
        "Frechet\ta distance of two lines",
        "a note",
    ]


@pytest.mark.usefixtures("terminal")
def test_60_columns_hold_every_word(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins"]) == 0
    out = printed(capsys)
    assert max(map(len, out.splitlines())) <= 60
    main(["plugins", "--json"])
    brought = json.loads(capsys.readouterr().out)
    assert {name for p in brought for _, name in p["brings"] if "-" not in name} <= words(out)
    for command in (["show", str(finished)], ["watch", str(finished)]):
        assert main(command) == 0
        out = printed(capsys)
        assert max(map(len, out.splitlines())) <= 60
        assert "parameters" in out and "5.38 MFLOP" in out
    print_tables(ComparisonResults.load(COMPARED / "findings.json"))
    out = printed(capsys)
    assert max(map(len, out.splitlines())) <= 60
    assert "calibration loss: " in out


@pytest.mark.usefixtures("terminal")
def test_no_color_means_none(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "stages.json").unlink()  # so that it stands, in colours
    command = ["watch", str(tmp_path / "run"), "--once"]
    coloured = r"\x1b\[[\d;]*3\d"
    assert main(command) == 0
    out = capsys.readouterr().out
    assert re.search(coloured, out)
    assert max(len(re.sub(r"\x1b\[[0-9;]*m", "", line)) for line in out.splitlines()[1:]) <= 60
    monkeypatch.setenv("NO_COLOR", "1")
    assert main(command) == 0
    assert not re.search(coloured, capsys.readouterr().out)


def test_results_are_printed_as_json(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(finished), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["run_dir"] == str(finished)
    assert found["decisions"][""]["kept"] == [0, 1, 6, 7]
    assert found["measurements"] == json.loads((finished / "metrics.json").read_text())["measurements"]
    assert found["faults"] == []
    assert main(["show", str(finished.parent), "--json"]) == 2
    assert capsys.readouterr().out == ""


def test_costs_are_printed_as_json(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["costs", str(recipe), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [part["block"] for part in found["blocks"]] == [f"blocks.{i}" for i in range(8)]
    parts = [*found["blocks"], found["outside"]]
    assert all(part["parameters"] > 0 and part["flops"] > 0 and part["latency_ms"] >= 0 for part in parts)
    model = tiny.load_recipe(recipe).backbone.build()
    assert sum(part["parameters"] for part in parts) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("command", ["run", "validate", "compare", "audit", "costs", "cache-teacher", "generate-data"])
def test_the_help_names_the_common_keys(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert f"  tinyfusion {command} recipes/quickstart.yaml --search.steps 600\n" in capsys.readouterr().out


def test_the_common_keys_are_keys(recipe: Path) -> None:
    flags = [shlex.split(line)[:2] for line in OVERRIDES.splitlines() if line.startswith("  --")]
    recipe.write_text(json.dumps({**RECIPE, "search": {"keep": 2}}))
    tiny.load_recipe(recipe, [word for flag in flags for word in flag])
    assert len(flags) >= 6


@pytest.mark.parametrize("command", ["run", "show", "watch"])
def test_a_path_that_is_nearly_right_is_told(
    command: str, recipe: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = recipe if command == "run" else finished
    assert main([command, str(there.with_name(there.stem + "s"))]) == 2
    assert f"; did you mean '{there}'?" in capsys.readouterr().err


def test_a_file_that_is_nearly_right_is_told(tmp_path: Path, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("my_backbone.py", "weights.safetensors"):
        (tmp_path / name).touch()
    assert main(["check-plugin", str(tmp_path / "my_bakbone.py")]) == 2
    assert f"; did you mean '{tmp_path / 'my_backbone.py'}'?" in capsys.readouterr().err
    main(["validate", str(recipe), "--backbone.checkpoint", str(tmp_path / "weigths.safetensors")])
    assert f"does not exist; did you mean '{tmp_path / 'weights.safetensors'}'? Put" in capsys.readouterr().out


def test_what_only_reads_files_imports_no_torch(finished: Path) -> None:
    commands = [["show", str(finished)], ["show", str(finished), "--json"]]
    commands += [["watch", str(folder), "--once"] for folder in (finished, COMPARED)]
    code = f"""
import sys
from tinyfusion_core.cli import main
assert [main(command) for command in {commands!r}] == [0, 0, 0, 0]
heavy = {{"torch", "numpy", "matplotlib", "jsonargparse", "scipy"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_finding_the_plugins_imports_nothing_that_only_some_need() -> None:
    code = """
import sys
from tinyfusion_core.registry.registry import registry
registry()
network = {"peft", "transformers", "diffusers", "timm", "torchvision", "accelerate"}
heavy = {*network, "torch._dynamo", "triton", "scipy", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
