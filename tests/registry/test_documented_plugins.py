"""The plugins that docs/writing-a-plugin.md shows, as they stand there: one of each kind."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import tinyfusion_core as tiny
from places import ROOT
from plugin_files import install
from small_run import RECIPE, SHIPPED, run
from tinyfusion_core.cli import main
from tinyfusion_core.testing import check_plugin
from tinyfusion_images import Digits

PAGE = (ROOT / "docs" / "writing-a-plugin.md").read_text()
EVERY_OTHER = {"class_path": "EveryOther", "init_args": {"keep": 4}}


def shown(name: str) -> str:
    """The code on the page that defines a class."""
    (code,) = [c for c in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if f"class {name}(" in c]
    return code


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe beside the files of the page."""
    for file, name in (("every_other.py", "EveryOther"), ("eager.py", "Eager")):
        (tmp_path / file).write_text(shown(name))
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, "plugins": ["every_other.py", "eager.py"]}))
    return path


def test_a_file_with_nothing_but_a_criterion_prunes(recipe: Path, tmp_path: Path, capsys) -> None:
    own = shown("EveryOther").partition("@dataclass")[2].partition("@tiny")[0]
    assert len([line for line in own.splitlines() if line]) <= 10
    settings = {**yaml.safe_load(recipe.read_text()), "plugins": ["every_other.py"], "search": EVERY_OTHER}
    recipe.write_text(yaml.safe_dump({k: v for k, v in settings.items() if k != "recover"}))
    assert run(recipe, tmp_path / "run") == 0
    decision = tiny.Decision.load(tmp_path / "run" / "decision.json")
    assert (decision.method, decision.kept) == ("EveryOther", (0, 2, 4, 6))
    assert main(["validate", str(recipe), "--search.kep=4"]) == 2
    assert "search.kep: unknown key; did you mean 'keep'? (known: keep)" in capsys.readouterr().err
    assert main(["validate", str(recipe), "--search=EveryOtter"]) == 2
    assert "search: unknown class 'EveryOtter'; did you mean 'EveryOther'?" in capsys.readouterr().err


def test_it_is_a_candidate_of_comparisons_under_its_short_and_its_full_name(recipe: Path) -> None:
    full = {**EVERY_OTHER, "class_path": "plugin_file_every_other.EveryOther"}
    compare = json.dumps({"candidates": {"short": EVERY_OTHER, "full": full}})
    loaded = tiny.load_recipe(recipe, [f"--compare={compare}"])
    assert loaded.compare is not None
    short, long = loaded.compare.candidates.values()
    assert type(short).__name__ == "EveryOther"
    assert short == long


@pytest.mark.slow
def test_a_sampler_searches(recipe: Path, tmp_path: Path) -> None:
    sampler = {"class_path": "Eager", "init_args": {"rules": {"keep": 4}}}
    flags = [f"--search={json.dumps({'sampler': sampler, 'steps': 3})}", "--recover=null"]
    loaded = tiny.load_recipe(recipe, flags)
    assert isinstance(loaded.search, tiny.Search)
    assert loaded.search.make_sampler({"blocks": 8}).lr_gates == 0.25
    assert run(recipe, tmp_path / "run", *flags) == 0
    assert len(tiny.Decision.load(tmp_path / "run" / "decision.json").kept) == 4


def test_data_a_metric_a_weight_update_and_a_distillation_make_a_run(recipe: Path, tmp_path: Path) -> None:
    for name in ("Arrays", "Drift", "Vectors", "LastBlockKD"):
        (tmp_path / f"{name.lower()}.py").write_text(shown(name))
    for part, samples in (("train", Digits().train()), ("held_out", Digits().held_out())):
        np.savez(tmp_path / f"{part}.npz", **{k: v.numpy() for k, v in samples.__getitems__(list(range(100))).items()})
    settings = {
        **yaml.safe_load(recipe.read_text()),
        "plugins": ["every_other.py", "arrays.py", "drift.py", "vectors.py", "lastblockkd.py"],
        "data": {"class_path": "Arrays", "init_args": {"folder": str(tmp_path)}},
        "search": EVERY_OTHER,
        "recover": {"steps": 3, "update": "Vectors", "kd": "LastBlockKD"},
        "evaluate": [{"class_path": "Drift", "init_args": {"samples": 16}}],
    }
    recipe.write_text(yaml.safe_dump(settings))
    assert run(recipe, tmp_path / "run") == 0
    measured = json.loads((tmp_path / "run" / "metrics.json").read_text())["measurements"]
    (drift,) = [m for m in measured if m["name"] == "drift"]
    assert drift["note"] == "16 samples"
    assert drift["values"]["teacher"] == 0 < drift["values"]["pruned"] != drift["values"]["recovered"] > 0
    teacher, student = (load_file(folder / "model.safetensors") for folder in (SHIPPED, tmp_path / "run" / "student"))
    names = {name: re.sub(r"blocks\.(\d+)", lambda found: f"blocks.{2 * int(found[1])}", name) for name in student}
    assert {w.ndim for name, w in student.items() if not torch.equal(w, teacher[names[name]])} == {1}
    assert main(["validate", str(recipe), "--data.folder=away"]) == 2


@pytest.mark.parametrize("name", ["EveryOther", "Eager", "Vectors", "LastBlockKD"])
def test_it_passes_the_conformance_kit(name: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(shown(name))
    results = list(check_plugin(str(tmp_path / "mine.py")))
    assert results
    assert [result for result in results if result.error] == []


def test_a_name_of_the_core_is_refused_by_the_command_line(recipe: Path, capsys) -> None:
    beside = recipe.parent / "every_other.py"
    beside.write_text(beside.read_text().replace("EveryOther", "Uniform"))
    assert main(["validate", str(recipe)]) == 2
    assert (
        "plugins 'core' and 'every_other.py' both bring a selector named 'Uniform' (tinyfusion_register_selectors); "
        "rename the class\n"
    ) in capsys.readouterr().err


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose packages count as installed."""
    (tmp_path / "site").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return tmp_path / "site"


def help_of(capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_a_command_is_listed_and_runs(site: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    install(site, "keptplugin", shown("Kept"))
    (tmp_path / "run").mkdir()
    tiny.Decision(blocks=("a.0", "a.1", "a.2"), kept=(0, 2), method="Keep").save(tmp_path / "run" / "decision.json")
    assert re.search("^    kept +print which blocks a run has kept$", help_of(capsys), re.MULTILINE)
    assert main(["kept", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out == "0 2\n"
    assert main(["kept", str(tmp_path / "away")]) == 2  # a mistake of the user's is one line here too
    assert capsys.readouterr().err.startswith("error: ")
    monkeypatch.setenv("TINYFUSION_BLOCK", "keptplugin")
    assert "    kept " not in help_of(capsys)


def test_a_command_that_there_is_and_one_that_fails(site: Path, capsys) -> None:
    install(site, "brokenplugin", "def tinyfusion_register_commands(): ...")
    with pytest.warns(UserWarning, match="plugin 'brokenplugin' left out: tinyfusion_register_commands is not marked"):
        assert "    run " in help_of(capsys)
    (site / "brokenplugin.py").write_text("")
    (site / "brokenplugin-1.0.dist-info" / "entry_points.txt").unlink()
    install(site, "runplugin", shown("Kept").replace('"kept"', '"run"'))
    assert main(["--help"]) == 2
    assert (
        "plugins 'core' and 'runplugin' both bring a command named 'run' (tinyfusion_register_commands); switch one of "
        "them off (TINYFUSION_BLOCK=runplugin), uninstall it, or rename the command\n"
    ) in capsys.readouterr().err


def test_a_metric_names_its_feature_space_and_old_paths_of_classes_are_known(recipe: Path) -> None:
    features = {"class_path": "ShippedFeatures", "init_args": {"data": "digits"}}
    named = [{"class_path": "Frechet", "init_args": {"features": features}}, "tinyfusion_core.fidelity.Fidelity"]
    frechet, fidelity = tiny.load_recipe(recipe, [f"--evaluate={json.dumps(named)}"]).evaluate
    assert isinstance(frechet, tiny.Frechet)
    assert frechet.features is not None
    assert frechet.features.name == "penultimate layer (32) of a small CNN trained on digits"
    assert type(fidelity).__module__ == "tinyfusion_images.fidelity"
    with pytest.raises(tiny.UserError, match=r"unknown class 'others\.HeldOutLoss'"):
        tiny.load_recipe(recipe, ["--evaluate=[others.HeldOutLoss]"])
