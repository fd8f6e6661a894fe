"""The command line answers at once and lists what there is; plugins come through one door."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from plugin_files import PLUGIN, install
from tinyfusion_core.cli import main
from tinyfusion_core.registry.hooks import KINDS


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


def test_every_key_is_listed_with_its_meaning() -> None:
    # In a process of its own, where no test has made classes of its own.
    done = subprocess.run([sys.executable, "-m", "tinyfusion_core", "keys"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "    tau = (4.0, 0.1): Gumbel temperature at the first and at the last step" in done.stdout
    for line in done.stdout.splitlines():
        if line.startswith("    "):
            assert not line.rstrip().endswith(":"), f"no meaning: {line}"


def plugins_with(folder: Path) -> subprocess.CompletedProcess[str]:
    code = (
        f"import sys; sys.path.insert(0, {str(folder)!r}); "
        "from tinyfusion_core.cli import main; sys.exit(main(['plugins', '--json']))"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


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
    warnings = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 2
    assert "plugin 'badplugin' (badplugin 1.0) left out" in warnings[1]
    assert found["dit"]["error"] is found["images"]["error"] is None  # the mistakes of others are not theirs


def test_two_plugins_with_one_name_are_both_named(tmp_path: Path) -> None:
    install(tmp_path, "otherdigits", PLUGIN.format(name="Digits"))
    done = plugins_with(tmp_path)
    assert done.returncode == 2
    assert "plugins 'images' and 'otherdigits' both bring a data named 'Digits'" in done.stderr


def test_importing_a_plugin_is_light() -> None:
    code = """
import sys, tinyfusion_dit, tinyfusion_images
heavy = {"diffusers", "transformers", "timm", "peft", "accelerate", "matplotlib", "torchvision"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


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


def test_whoever_reads_what_is_printed_may_stop_reading() -> None:
    command = [sys.executable, "-m", "tinyfusion_core", "plugins"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        error = process.stderr.read()
    assert error == ""
