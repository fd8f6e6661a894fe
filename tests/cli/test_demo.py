"""The quickstart is a command of its own, and shells complete the command line."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from places import ROOT
from tinyfusion_core.cli import COMMANDS, main
from tinyfusion_core.cli.run import QUICKSTART

PRUNE_ONLY = ["--search", '{"class_path": "Keep", "init_args": {"blocks": [0, 1, 6, 7]}}', "--recover", "null"]


def test_the_recipe_is_that_of_the_recipes() -> None:
    assert QUICKSTART.is_symlink()
    assert QUICKSTART.resolve() == ROOT / "recipes" / "quickstart.yaml"


def test_the_demo_runs_in_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["demo", *PRUNE_ONLY, "--evaluate", "[]"]) == 0
    assert capsys.readouterr().out.endswith("report: runs/quickstart/report.html\n")
    assert json.loads(Path("runs/quickstart/decision.json").read_text())["kept"] == [0, 1, 6, 7]
    assert main(["demo", *PRUNE_ONLY, "--evaluate", "[]", "--trainer.seed", "1"]) == 2
    assert "\n  tinyfusion demo --search " in capsys.readouterr().err  # how to go on is what can be typed


def test_the_demo_has_keys_but_no_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["demo", "--help"])
    assert "\n  tinyfusion demo --search.steps 600\n" in capsys.readouterr().out


TYPED = {
    "va": ["validate"],
    "--vers": ["--version"],
    "samp": ["sample"],
    "run recipes/quickst": ["recipes/quickstart.yaml"],
    "run recipes/quickstart.yaml --search.steps 600 --re": ["--restart-from"],
    "demo --run": ["--run-dir"],
    "show tinyfusion_c": ["tinyfusion_core"],
    "completion ": ["bash", "zsh"],
    "": [*(command.name for command in COMMANDS), "encode-prompts", "encode", "sample"],
}


def test_bash_completes_commands_flags_and_paths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    (tmp_path / "completion").write_text(capsys.readouterr().out)
    script = f"""
source {tmp_path}/completion
[[ "$(complete -p tinyfusion)" == *"-F _shtab_tinyfusion tinyfusion" ]] || exit 1
while IFS= read -r line; do
    read -ra COMP_WORDS <<< "tinyfusion $line"
    [[ "$line" == *" " || -z "$line" ]] && COMP_WORDS+=("")
    COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
    _shtab_tinyfusion
    echo "${{COMPREPLY[*]}}"
done
"""
    done = subprocess.run(
        ["bash", "--norc", "-c", script],
        input="".join(f"{line}\n" for line in TYPED),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert [line.split() for line in done.stdout.splitlines()] == list(TYPED.values())


def test_the_script_for_zsh_is_valid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "zsh"]) == 0
    script = capsys.readouterr().out
    assert script.startswith("#compdef tinyfusion\n")
    assert "validate" in script
    if shell := shutil.which("zsh"):
        (tmp_path / "_tinyfusion").write_text(script)
        assert subprocess.run([shell, "-n", str(tmp_path / "_tinyfusion")]).returncode == 0
