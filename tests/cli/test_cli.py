"""The command line answers at once and lists what there is; plugins come through one door."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from plugin_files import PLUGIN, install
from tinyfusion_core.cli import main
from tinyfusion_core.registry.hooks import KINDS
from tinyfusion_core.runtime.progress import track


def test_help_needs_no_heavy_import() -> None:
    code = """
import sys
from tinyfusion_core.cli import main
try:
    main(["--help"])
except SystemExit as e:
    assert e.code == 0
heavy = {"torch", "numpy", "rich", "jsonargparse", "matplotlib", "yaml", "pluggy"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for command in ("run", "validate", "plugins", "show", "sample"):
        assert f"    {command} " in done.stdout


def test_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "tinyfusion_core", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("usage: tinyfusion")


def test_plugins_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins", "--json"]) == 0
    found = {p["name"]: p for p in json.loads(capsys.readouterr().out)}
    assert ["backbone", "DiT"] in found["dit"]["brings"]
    assert found["images"]["brings"] == [
        ["data", "Digits"],
        ["data", "Fashion"],
        ["metric", "Fidelity"],
        ["metric", "Pictures"],
        ["metric", "PromptScore"],
        ["feature_space", "ShippedFeatures"],
        ["command", "encode"],
        ["command", "sample"],
    ]
    assert {kind for p in found.values() for kind, _ in p["brings"]} == set(KINDS)
    assert ["selector", "Greedy"] in found["core"]["brings"]
    assert ["command", "run"] in found["core"]["brings"]
    assert found["core"]["distribution"] == "tinyfusion"
    assert found["dit"]["distribution"] == "tinyfusion"
    assert found["dit"]["version"] == importlib.metadata.version("tinyfusion")
    assert found["dit"]["module"] == "tinyfusion_dit"
    assert main(["plugins"]) == 0
    assert "GaussianDiffusion" in capsys.readouterr().out


@pytest.mark.slow
def test_every_key_is_listed_with_its_type_and_meaning() -> None:
    # In a process of its own, where no test has made classes of its own.
    done = subprocess.run([sys.executable, "-m", "tinyfusion_core", "keys"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "    tau (a pair of numbers) = [4.0, 0.1]: Gumbel temperature at the first" in done.stdout
    assert "recover: as train\n" in done.stdout
    assert re.search(r"^  MAR:.*\n(    .*\n)*    checkpoint .* = null: as in DiT$", done.stdout, re.MULTILINE)
    for line in done.stdout.splitlines():
        if line.startswith("    "):
            assert re.match(r"    \w+ \(.+?\)( = .+?)?: \S", line), f"no type or no meaning: {line}"
            assert not re.search("<class|typing|[Cc]allable", line), line


@pytest.mark.parametrize(
    ("word", "there", "missing"),
    [
        ("trainer", ["trainer:", "batch_size (a whole number) = 128"], ["search:", "lr_final"]),
        ("race", ["  Race:", "    sure (a number) = 2.0"], ["  Shallowest:", "trainer:"]),
        ("BATCH_", ["    micro_batch_size", "  Race:", "recover: as train"], ["    steps", "  Uniform:"]),
        ("search.st", ["search:", "    steps"], ["train:", "batch_size"]),
        ("recover.kd.alpha_kd", ["  OutputKD:", "= 0.9: as in OutputKD"], ["    sigma"]),
    ],
)
def test_keys_are_found(word: str, there: list[str], missing: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", word]) == 0
    out = capsys.readouterr().out
    assert [text for text in there if text not in out] == []
    assert [text for text in missing if text in out] == []


def test_a_key_that_is_not_there_has_a_near_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "batch_sise"]) == 2
    assert capsys.readouterr().err == "error: keys: nothing is named 'batch_sise'; did you mean 'batch_size'?\n"


def plugins_with(folder: Path) -> subprocess.CompletedProcess[str]:
    code = (
        f"import sys; sys.path.insert(0, {str(folder)!r}); "
        "from tinyfusion_core.cli import main; sys.exit(main(['plugins', '--json']))"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_a_third_party_plugin_is_found_and_a_broken_one_costs_a_warning(tmp_path: Path) -> None:
    install(tmp_path, "goodplugin", PLUGIN.format(name="Flowers"))
    install(tmp_path, "badplugin", "import a_module_that_does_not_exist")
    install(tmp_path, "aplugin", PLUGIN.format(name="Birds").replace("register_data", "register_datta"))
    done = plugins_with(tmp_path)
    assert done.returncode == 0, done.stderr
    found = {p["name"]: p for p in json.loads(done.stdout)}
    assert found["goodplugin"]["brings"] == [["data", "Flowers"]]
    assert "a_module_that_does_not_exist" in found["badplugin"]["error"]
    assert "tinyfusion_register_datta" in found["aplugin"]["error"]
    warned = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert len(warned) == 2
    assert "plugin 'badplugin' (badplugin 1.0) left out" in warned[1]
    assert found["dit"]["error"] is found["images"]["error"] is None  # the mistakes of others are not theirs


@pytest.mark.slow
def test_two_plugins_with_one_name_are_both_named(tmp_path: Path) -> None:
    install(tmp_path, "otherdigits", PLUGIN.format(name="Digits"))
    done = plugins_with(tmp_path)
    assert done.returncode == 2
    assert "plugins 'images' and 'otherdigits' both bring a data named 'Digits'" in done.stderr


@pytest.mark.parametrize(
    "wanted", [lambda: torch.empty(2**55), lambda: torch.empty(2**62, 2), lambda: bytearray(2**62)]
)
def test_what_fits_into_no_memory_is_one_message(
    wanted: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tinyfusion_core.cli.results.Show.__call__", lambda self, options: wanted())
    assert main(["show", "run"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: not enough memory (")
    assert "Lower trainer.batch_size" in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("command", ["sample run --num", "costs r.yaml --batch-size", "budgets run --recover-steps"])
@pytest.mark.parametrize("number", ["-1", "1.5", "many", "1" + "0" * 18, "9" * 5000])
def test_counts_that_are_typed_are_moderate(command: str, number: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*command.split(), number])
    assert stopped.value.code == 2
    assert f"'{number[:40]}' is no whole number from 0 to 10,000,000" in capsys.readouterr().err


@pytest.mark.slow
def test_whoever_reads_what_is_printed_may_stop_reading() -> None:
    command = [sys.executable, "-m", "tinyfusion_core", "plugins"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        error = process.stderr.read()
    assert error == ""


def test_an_interruption_that_says_nothing_is_told_all_the_same(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tinyfusion_core.cli.results.Show.__call__", stopped)
    assert main(["show", "runs/mine"]) == 130
    assert capsys.readouterr().err == "interrupted. Go on with:\n  tinyfusion show runs/mine\n"


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    numbers = [importlib.metadata.version("tinyfusion"), importlib.metadata.version("torch")]
    assert capsys.readouterr().out.startswith("tinyfusion {}, torch {}, Python 3.".format(*numbers))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["valdate", "r.yaml"], "error: no command 'valdate'; did you mean 'validate'?"),
        (["Show", "run"], "error: no command 'Show'; did you mean 'show'?"),
        (["check-plugin", "Dit"], "error: no plugin 'Dit' is installed; did you mean 'dit'?"),
    ],
)
def test_a_name_that_is_nearly_right_is_told(words: list[str], message: str, capsys: Any) -> None:
    try:
        code: Any = main(words)
    except SystemExit as e:
        code = e.code
    assert code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--quiet", "show", "run"], ["show", "run", "--quiet"], ["show", "run"]])
def test_quiet_shows_no_progress(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def work(self: Any, options: Any) -> int:
        assert vars(options).keys() == {"debug", "command", "run_dir", "json"}
        with track("work", 1) as progress:
            progress.advance()
        warnings.warn("something is odd", stacklevel=1)
        print("result")
        return 0

    monkeypatch.setattr("tinyfusion_core.cli.results.Show.__call__", work)
    with pytest.warns(UserWarning, match="something is odd"):
        assert main(words) == 0
    out, err = capsys.readouterr()
    assert out == "result\n"
    assert ("work: 1/1" in err) == ("--quiet" not in words)
