"""The core needs none of the libraries of networks: what does need one says which extra brings it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from places import ROOT
from plugin_files import PLUGIN, install
from tinyfusion_core.cli import main
from tinyfusion_core.registry.extras import missing

WITHOUT = """
import sys
from importlib.machinery import PathFinder

AWAY = {"diffusers", "transformers", "timm", "peft", "datasets", "gguf", "pyarrow", "soundfile", "jiwer"}

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in AWAY else PathFinder.find_spec(name, path, target)

    @classmethod
    def find_distributions(cls, *context):
        return (found for found in PathFinder.find_distributions(*context) if found.name not in AWAY)

sys.meta_path[sys.meta_path.index(PathFinder)] = Without
"""
"""Python in which the packages are not installed, as far as imports and their metadata tell."""
CHECKS = """
import contextlib, io, json, torch
from tinyfusion_core.cli import main
from pathlib import Path
from PIL import Image
import tinyfusion_core as tiny
from tinyfusion_core.cli.run import QUICKSTART

def said(*words):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = main(words)
    return [code, out.getvalue()]

Path("pictures/a").mkdir(parents=True)
Image.new("RGB", (16, 16)).save("pictures/a/one.png")

class Block(torch.nn.Linear):
    def forward(self, x):
        return x + super().forward(x)

model = torch.nn.Sequential(torch.nn.Sequential(*(Block(4, 4) for _ in range(4))))
loss = lambda model, batch: (model(batch["x"]) - batch["y"]).square().mean(1)
task = tiny.wrap(model, blocks="0.*", loss_fn=loss, data={"x": torch.randn(64, 4), "y": torch.randn(64, 4)})
trainer = tiny.Trainer(batch_size=8)
decision = tiny.Search(keep=2, steps=2, update=tiny.Full())(task, trainer)
student = tiny.Recover(steps=2)(task, tiny.prune(task, decision), decision, trainer)
try:
    tiny.Search(keep=2, steps=2)(task, trainer)
except tiny.UserError as e:
    refused = str(e)
print(json.dumps({
    "kept": len(student[0]), "refused": refused, "parsed": type(tiny.load_recipe(QUICKSTART).backbone).__name__,
    **{name: said(*words) for name, words in WORDS.items()},
}))
"""
RECIPES = ROOT / "recipes"
WORDS = {
    "plugins": ["plugins", "--json"],
    "keys": ["keys", "search"],
    "demo": ["demo"],
    "dit": ["validate", str(RECIPES / "quickstart.yaml")],
    "sit": ["validate", str(RECIPES / "sit_small.yaml")],
    "mar": ["validate", str(RECIPES / "mar_small.yaml")],
    "llm": ["validate", str(RECIPES / "qwen3_8b.yaml")],
    "diffusers": ["validate", str(RECIPES / "flux_dev.yaml")],
    "encode": ["encode", "pictures", "--out", "latents", "--vae", "vae", "--size", "16"],
}


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", f"{WITHOUT}\nWORDS = {WORDS}\n{CHECKS}"],
        cwd=tmp_path_factory.mktemp("bare"),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_the_core_prunes_without_them(bare: dict) -> None:
    assert bare["kept"] == 2
    assert bare["parsed"] == "DiT"
    assert bare["keys"][0] == 0
    assert "    steps (" in bare["keys"][1]


@pytest.mark.slow
def test_every_plugin_is_there_and_says_what_it_lacks(bare: dict) -> None:
    code, out = bare["plugins"]
    assert code == 0
    found = json.loads(out)
    assert [p["name"] for p in found if p["error"]] == []
    assert {p["name"]: [line.partition(">")[0] for line in p["missing"]] for p in found if p["missing"]} == {
        "diffusers": ["diffusers", "transformers"],
        "dit": ["timm"],
        "llm": ["transformers"],
        "mar": ["timm"],
        "sit": ["timm"],
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["demo", "dit", "sit", "mar", "llm", "diffusers", "encode"])
def test_what_needs_one_is_one_message_that_names_the_extra(name: str, bare: dict) -> None:
    code, out = bare[name]
    assert code == 2
    extra = "diffusers" if name == "encode" else name
    (line,) = (line for line in out.splitlines() if line.startswith("error: "))
    assert line.endswith(f": pip install 'tinyfusion[{extra}]'")
    assert "Traceback" not in out


@pytest.mark.slow
def test_lora_names_its_own(bare: dict) -> None:
    assert bare["refused"] == ("update: LoRA needs peft (No module named 'peft'): pip install 'tinyfusion[lora]'")


def test_lora_is_missed_before_a_teacher_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    recipe = str(RECIPES / "teacher_digits.yaml")
    assert main(["run", recipe, "--run-dir", str(tmp_path / "run"), "--search.keep", "4"]) == 2
    assert capsys.readouterr().err.endswith(": pip install 'tinyfusion[lora]'\n")
    assert not (tmp_path / "run").exists()


def test_what_a_plugin_of_others_lacks_is_told(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install(site, "flowers", PLUGIN.format(name="Flowers"))
    lines = ["torch; extra == 'flowers'", "petals>2; extra == 'flowers'", "torch>99; extra == 'flowers'", "leaves>=1"]
    lines += ["flowers[roots]; extra == 'flowers'", "roots; extra == 'roots'", "stones; extra == 'other'"]
    with (site / "flowers-1.0.dist-info" / "METADATA").open("a") as metadata:
        metadata.writelines(f"Requires-Dist: {line}\n" for line in lines)
    assert missing("flowers", "none") == missing("no-such-package", "flowers") == []
    assert main(["plugins"]) == 0
    assert "flowers: needs petals>2, roots, torch>99: pip install 'flowers[flowers]'\n" in capsys.readouterr().out
