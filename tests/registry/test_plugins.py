"""The author's journey: a plugin from a file, one from the template, and one message for every way to get it wrong."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

import tinyfusion_core as tiny
from places import ROOT
from plugin_files import PLUGIN, install, own_tests, pip_install
from small_run import run
from tinyfusion_core.cli import main
from tinyfusion_core.comparison.cache import _described
from tinyfusion_core.registry import registry as plugins
from tinyfusion_core.registry.hooks import KINDS
from tinyfusion_core.testing import name_of
from tinyfusion_core.testing.checks import CHECKS
from tinyfusion_core.testing.scaffold import TEMPLATE, new_plugin
from tinyfusion_dit import DiT

EXAMPLE = (TEMPLATE / "my_backbone.py").read_text()
DOCS = ROOT / "docs" / "writing-a-plugin.md"


@pytest.fixture(autouse=True)
def _own_plugins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test sees the plugins of another."""
    monkeypatch.setattr(plugins, "_files", {})
    yield
    monkeypatch.undo()
    plugins._installed.cache_clear()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose packages count as installed."""
    (tmp_path / "site").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    plugins._installed.cache_clear()
    return tmp_path / "site"


def listed(capsys: pytest.CaptureFixture[str]) -> dict[str, dict]:
    assert main(["plugins", "--json"]) == 0
    return {p["name"]: p for p in json.loads(capsys.readouterr().out)}


# Listing, and switches


def test_switches(site: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    install(site, "flowers", PLUGIN.format(name="Flowers"))
    monkeypatch.setenv("TINYFUSION_BLOCK", "flowers,mar,ditt")
    with pytest.warns(UserWarning, match="TINYFUSION_BLOCK") as warned:
        found = listed(capsys)
    known = ", ".join(sorted({*found} - {"core"}))
    assert [str(w.message) for w in warned] == [
        f"TINYFUSION_BLOCK: no plugin 'ditt' is installed; did you mean 'dit'? (known: {known})"
    ]
    assert found["flowers"]["error"] == found["mar"]["error"] == "switched off by TINYFUSION_BLOCK"
    assert not found["flowers"]["brings"]
    assert found["dit"]["brings"]
    assert set(found["flowers"]) == {"name", "module", "distribution", "version", "brings", "error"}
    assert (found["flowers"]["distribution"], found["flowers"]["version"]) == ("flowers", "1.0")
    monkeypatch.delenv("TINYFUSION_BLOCK")
    monkeypatch.setenv("TINYFUSION_PLUGINS", "flowers, dit")
    plugins._installed.cache_clear()
    assert {name for name, p in listed(capsys).items() if not p["error"]} == {"core", "flowers", "dit"}
    assert main(["plugins"]) == 0
    assert "\nmar: switched off by TINYFUSION_PLUGINS\n" in capsys.readouterr().out


def test_a_name_of_two_is_refused_until_one_is_switched_off(
    site: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(site, "otherdigits", PLUGIN.format(name="Digits"))
    assert main(["plugins"]) == 2
    message = "plugins 'images' and 'otherdigits' both bring a data named 'Digits' (tinyfusion_register_data); switch"
    assert message in capsys.readouterr().err
    assert plugins.record_of(DiT) == {}  # a network can be saved all the same
    monkeypatch.setenv("TINYFUSION_BLOCK", "otherdigits")
    assert listed(capsys)["images"]["brings"]
    assert plugins.record_of(DiT)["distribution"] == "tinyfusion"


def test_two_packages_with_a_plugin_of_one_name(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install(site, "dit", PLUGIN.format(name="Flowers"))
    assert main(["plugins"]) == 2
    err = capsys.readouterr().err
    assert "two plugins are named 'dit', of " in err
    assert "tinyfusion 0.1.0" in err and "dit 1.0" in err


# Bad input: hooks


def wrong(code: str, tmp_path: Path) -> str:
    path = tmp_path / "wrong.py"
    path.write_text(code)
    with pytest.raises(tiny.UserError) as caught:
        tiny.load_plugin(path)
    assert str(caught.value).startswith(f"plugin {path}: ")
    assert "plugin_file_wrong" not in sys.modules
    return str(caught.value)


HOOK, LOSSES = "tinyfusion_register_backbones", "tinyfusion_register_losses"


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("[MyBackbone]", "[MyBackbone()]", f"{HOOK} returns an instance of MyBackbone; return the class itself"),
        ("[MyBackbone]", "MyBackbone", f"{HOOK} returns MyBackbone, not a list; return a list of classes"),
        ("[MyBackbone]", "[MyBackboneLoss]", f"{HOOK} returns MyBackboneLoss, which is no Backbone; derive"),
        ("[MyBackbone]", "[tiny.Backbone]", f"{HOOK} returns Backbone, which lacks after_prune, blocks, build"),
        ("[MyBackbone]", "[MyBackbone, type('MyBackbone', (MyBackbone,), {})]", f"{HOOK} returns two classes"),
        ("return [MyBackbone]", "return 1 / 0", "ZeroDivisionError"),
        (LOSSES, LOSSES[:-2], f"{LOSSES[:-2]}: there is no such hook; did you mean '{LOSSES}'?"),
        (f"@tiny.hookimpl\ndef {LOSSES}", f"def {LOSSES}", f"{LOSSES} is not marked as a hook; put @hookimpl"),
        ("tinyfusion_api = 1", "tinyfusion_api = 2", "tinyfusion_api: built for version 2 of the plugin interface"),
        ("tinyfusion_api = 1", "tinyfusion_api = 2", "tinyfusion has version 1; upgrade tinyfusion"),
        ("tinyfusion_api = 1", "tinyfusion_api = 0", "get a newer release of the plugin"),
        ("import tinyfusion_core", "import a_module_that_does_not_exist", "a_module_that_does_not_exist"),
    ],
)  # fmt: skip
def test_hooks_that_are_wrong(before: str, after: str, message: str, tmp_path: Path) -> None:
    assert before in EXAMPLE
    assert message in wrong(EXAMPLE.replace(before, after), tmp_path)


def test_a_file_without_hooks_or_with_names_of_others(tmp_path: Path) -> None:
    assert "has none of the hooks tinyfusion_register_backbones" in wrong("x = 1", tmp_path)
    message = wrong(EXAMPLE.replace("MyBackboneLoss", "FlowMatching"), tmp_path)
    assert "plugins 'sit' and 'wrong.py' both bring a loss named 'FlowMatching' (tinyfusion_register_losses)" in message
    with pytest.raises(tiny.UserError, match=r"no_such\.py: No such file"):
        tiny.load_plugin(tmp_path / "no_such.py")


def test_an_installed_plugin_with_a_wrong_hook_costs_one_warning(
    site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install(site, "wronghook", EXAMPLE.replace("return [MyBackbone]", "return [MyBackbone()]"))
    with pytest.warns(UserWarning, match="wronghook") as warned:
        assert listed(capsys)["wronghook"]["error"].startswith(f"{HOOK} returns an instance of MyBackbone")
    (warning,) = warned
    assert str(warning.message).startswith(f"plugin 'wronghook' (wronghook 1.0) left out: {HOOK} returns an instance")
    assert main(["check-plugin", "wronghook"]) == 2
    assert f"error: plugin 'wronghook' could not be loaded: {HOOK} returns" in capsys.readouterr().err


# Bad input: what hooks brought


def planned(tmp_path: Path, before: str, after: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert before in EXAMPLE
    (tmp_path / "mine.py").write_text(EXAMPLE.replace(before, after))
    recipe = {"plugins": ["mine.py"], **yaml.safe_load((TEMPLATE / "digits.yaml").read_text())}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["validate", str(tmp_path / "mine.yaml")]) == 2
    return capsys.readouterr().err


NAMES = 'return ["blocks.*"]'
NARROWS = "return (x + super().forward(x))[:, None]"


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (NAMES, 'return ["layers.*"]', "{owner} blocks: block path 'layers.*': Network has no module 'layers'"),
        (
            NAMES,
            'return ["blocks.*", "blocks.1.0"]',
            "{owner} blocks: block path 'blocks.1.0' lies inside of",
        ),
        (NAMES, 'return ["blocks.*", "blocks.1"]', "{owner} blocks: block path(s) named twice: blocks.1; name every"),
        (
            "return x + super().forward(x)",
            NARROWS,
            "{owner} blocks: block 'blocks.0' makes [2, 1, 64] float32 of",
        ),
        (
            ', reduction="none")',
            ")",
            "{loss} loss: returns the shape [] for 2 samples; return one number for each",
        ),
    ],
)
def test_what_hooks_brought_is_wrong(
    before: str, after: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = message.format(owner="MyBackbone (of plugin_file_mine):", loss="MyBackboneLoss (of plugin_file_mine):")
    assert named in planned(tmp_path, before, after, capsys)


def test_the_gates_refuse_a_block_that_changes_its_stream() -> None:
    from tinyfusion_core.protocols.block_call import named_batch_dims

    net = torch.nn.Sequential(torch.nn.Linear(4, 3))
    with tiny.Gates(net, ["0"], named_batch_dims({"input": 0})) as gates:
        gates.mask = torch.tensor([[1.0], [0.0]])
        with pytest.raises(tiny.UserError, match=r"block '0' makes \[3\] of a stream of \[4\] a sample"):
            net(torch.zeros(2, 4))


def test_a_loss_of_the_wrong_shape_is_refused_in_training_too() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    task = tiny.wrap(model, blocks="0", loss_fn=lambda m, b: m(b["x"]), data={"x": torch.zeros(8, 4)})
    with pytest.raises(tiny.UserError, match=r"loss: returns the shape \[8, 4\] for 8 samples"):
        task.loss.losses(model, {"x": torch.zeros(8, 4)})


# A plugin that is one file


def test_a_recipe_runs_with_a_file_beside_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home, away = tmp_path / "home", tmp_path / "run"
    home.mkdir()
    (home / "my_backbone.py").write_text(EXAMPLE)
    recipe = {"plugins": ["my_backbone.py"], **yaml.safe_load((TEMPLATE / "digits.yaml").read_text())}
    (home / "mine.yaml").write_text(yaml.safe_dump(recipe))
    short = ["--train.steps=3", "--search.steps=3", "--recover.steps=3", "--evaluate=[HeldOutLoss]"]
    assert run(home / "mine.yaml", away, *short) == 0
    assert run(home / "mine.yaml", away, *short) == 0  # goes on from where it is: it is done
    identity = json.loads((away / "run.json").read_text())["settings"]
    assert identity["plugins.my_backbone.py (its content)"] == plugins.load_plugin(home / "my_backbone.py").sha256

    # An edited file is another run.
    capsys.readouterr()
    (home / "my_backbone.py").write_text(EXAMPLE.replace("size=64", "size=48"))
    assert run(home / "mine.yaml", away, *short) == 2
    assert "plugins.my_backbone.py (its content): " in capsys.readouterr().err

    # The run folder has what it needs to be read, wherever the file has gone.
    shutil.rmtree(home)
    plugins._files.clear()
    assert main(["show", str(away)]) == 0
    again = tiny.load_recipe(away / "recipe.yaml")
    assert type(again.backbone).__name__ == "MyBackbone"
    assert main(["sample", str(away)]) == 2
    assert "MyBackboneLoss cannot generate samples" in capsys.readouterr().err

    # A student alone does not run the code of others; it says whose it needs.
    assert len(tiny.load_pretrained(away / "student").blocks) == 4
    plugins._files.clear()
    with pytest.raises(tiny.UserError, match=r"'MyBackbone', which came from the file my_backbone\.py"):
        tiny.load_pretrained(away / "student")
    tiny.load_plugin(away / "my_backbone.py")
    assert len(tiny.load_pretrained(away / "student").blocks) == 4


def test_plugins_of_a_recipe_that_are_wrong(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a").mkdir()
    for value, message in (
        ("mine.py", "plugins: expected a list of Python files beside the recipe: [my_backbone.py]"),
        ("[mine.py]", "mine.py: No such file or directory; paths are relative to the recipe"),
        ("[mine.py, a/mine.py]", "plugins: two files have the same name; rename one"),
    ):
        assert main(["validate", str(recipe), f"--plugins={value}"]) == 2
        assert message in capsys.readouterr().err


def test_a_file_is_run_once_and_takes_the_place_of_its_elder(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(EXAMPLE)
    tiny.load_plugin(path)
    first = plugins.registry().classes["backbone"]["MyBackbone"]
    tiny.load_plugin(path)
    assert plugins.registry().classes["backbone"]["MyBackbone"] is first
    assert plugins.record_of(first) == {"file": "mine.py", "sha256": hashlib.sha256(EXAMPLE.encode()).hexdigest()}
    path.write_text(EXAMPLE.replace("depth=8", "depth=6"))
    tiny.load_plugin(path)
    second = plugins.registry().classes["backbone"]["MyBackbone"]
    assert second is not first
    assert second().config() == {"size": 64, "depth": 6}
    assert plugins.record_of(first) == {}
    assert _described(second) == ["plugin_file_mine:MyBackbone", plugins.record_of(second)["sha256"]]  # for compare
    (listed,) = (p for p in plugins.registry().plugins if p.name == "mine.py")
    assert (listed.distribution, listed.module) == ("file", str(path))
    path.write_text("raise RuntimeError('half-written')")
    with pytest.raises(tiny.UserError, match="half-written"):
        tiny.load_plugin(path)
    assert plugins.registry().classes["backbone"]["MyBackbone"] is second  # the one that worked stays


# The template and the page


def test_the_page_shows_the_example_as_it_is() -> None:
    page = DOCS.read_text()
    assert f"```python\n{EXAMPLE}```" in page
    assert f"```yaml\n{(TEMPLATE / 'digits.yaml').read_text()}```" in page
    assert len(EXAMPLE.splitlines()) <= 60


def test_every_hook_is_documented_and_has_a_user() -> None:
    users = [*ROOT.glob("plugins/*/__init__.py"), ROOT / "tinyfusion_core" / "builtins.py"]
    code, page = "".join(p.read_text() for p in users), DOCS.read_text()
    for kind in KINDS.values():
        module, _, base = kind.base.partition(":")
        public = f"tiny.{base}" if hasattr(tiny, base) else f"{module}.{base}"
        assert f"| `{kind.hook}` | `{public}` | {kind.where} |" in page
        assert f"def {kind.hook}(" in code
        assert getattr(tiny, base, kind.base_class()) is kind.base_class()
    assert "18 checks" in page
    for check in CHECKS:
        assert f"| `{name_of(check)}` | {' '.join((check.__doc__ or '').split())} |" in page


CONCRETE = {
    "backbone": "from toys import Planted as Base",
    "loss": "from toys import Match as Base",
    "data": "from tinyfusion_images import Digits as Base",
    "metric": "from tinyfusion_core import Latency as Base",
    "selector": "from tinyfusion_core import Uniform as Base",
    "sampler": "from tinyfusion_core import ExactK as Base",
    "weight_update": "from tinyfusion_core import Frozen as Base",
    "distillation": "from tinyfusion_core import OutputKD as Base",
    "feature_space": "from tinyfusion_images.features import ShippedFeatures as Base",
    "command": "from tinyfusion_core.cli.plugins import Keys as Base",
}


def bringing(kind: str, body: str = "pass") -> str:
    """A plugin with one class of a kind, called `Mine`."""
    return (
        f"import tinyfusion_core as tiny\n{CONCRETE[kind]}\nclass Mine(Base):\n    {body}\n"
        f"@tiny.hookimpl\ndef {KINDS[kind].hook}():\n    return [Mine]\n"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_every_hook_brings_its_classes_under_their_names(kind: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(bringing(kind, "name = 'Mine'" if kind == "command" else "pass"))
    file = tiny.load_plugin(tmp_path / "mine.py")
    found = plugins.registry()
    mine = found.find(kind, "Mine")
    assert mine.__module__ == "plugin_file_mine"
    assert (kind, "Mine") in next(p for p in found.plugins if p.name == "mine.py").brings
    assert plugins.record_of(mine) == {"file": "mine.py", "sha256": file.sha256}
    with pytest.raises(tiny.UserError, match="no plugin brings 'Mime'; did you mean 'Mine'"):
        found.find(kind, "Mime")


@pytest.mark.parametrize("kind", KINDS)
def test_a_name_of_the_core_or_of_a_plugin_is_taken(kind: str, tmp_path: Path) -> None:
    owner, taken = next((p.name, name) for p in plugins.registry().plugins for k, name in p.brings if k == kind)
    code = bringing(kind, f"name = {taken!r}") if kind == "command" else bringing(kind).replace("Mine", taken)
    message = wrong(code, tmp_path)
    spoken = kind.replace("_", " ")
    assert f"plugins '{owner}' and 'wrong.py' both bring a {spoken} named '{taken}' ({KINDS[kind].hook})" in message
    assert ("TINYFUSION_BLOCK" in message) == (owner != "core")


@pytest.mark.parametrize("kind", KINDS)
def test_a_class_without_its_hook_is_told_which(kind: str, tmp_path: Path) -> None:
    message = wrong(bringing(kind).partition("@tiny")[0], tmp_path)
    assert f"has the class Mine but no hook that returns it; add a function {KINDS[kind].hook}() with @tiny" in message


def test_a_class_of_another_kind_and_a_command_without_a_name(tmp_path: Path) -> None:
    hook = KINDS["selector"].hook
    assert f"{hook} returns Mine, which is no Selector; derive it" in wrong(
        bringing("sampler").replace(KINDS["sampler"].hook, hook), tmp_path
    )
    command = (
        "import tinyfusion_core as tiny\nfrom tinyfusion_core.protocols.command import Command\n"
        "class Mine(Command):\n    def add_arguments(self, parser): ...\n    def __call__(self, options): ...\n"
        f"@tiny.hookimpl\ndef {KINDS['command'].hook}():\n    return [Mine]\n"
    )
    assert "returns Mine, which lacks name; give it that attribute, a text" in wrong(command, tmp_path)
    assert "returns Mine, which lacks help; give it that attribute, a text" in wrong(
        command.replace("(Command):\n", "(Command):\n    name = 'mine'\n"), tmp_path
    )


def test_the_core_cannot_be_switched_off(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TINYFUSION_PLUGINS", "images")
    monkeypatch.setenv("TINYFUSION_BLOCK", "core")
    plugins._installed.cache_clear()
    found = listed(capsys)
    assert {name for name, p in found.items() if not p["error"]} == {"core", "images"}
    assert ["selector", "Search"] in found["core"]["brings"]


def test_a_new_plugin_installs_and_passes_its_own_tests(
    tmp_path: Path, site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["new-plugin", "my-backbone", "--into", str(tmp_path)]) == 0
    folder = tmp_path / "my-backbone"
    assert (folder / "my_backbone.py").read_text() == EXAMPLE
    pip_install(folder, site)
    assert "18 passed" in own_tests(folder, site)
    capsys.readouterr()
    plugin = listed(capsys)["my-backbone"]
    assert plugin["brings"] == [["backbone", "MyBackbone"], ["loss", "MyBackboneLoss"]]
    assert (plugin["distribution"], plugin["version"]) == ("my-backbone", "0.1.0")
    assert main(["new-plugin", "my-backbone2", "--into", str(tmp_path)]) == 0
    assert main(["new-plugin", "my-backbone2", "--into", str(tmp_path)]) == 2
    assert "my-backbone2 exists; choose another name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"), [("My Backbone", "use small letters"), ("torch", "installed already"), ("class", "use small")]
)
def test_names_that_a_new_plugin_cannot_have(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(tiny.UserError, match=message):
        new_plugin(name, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_words_of_a_new_plugin(tmp_path: Path) -> None:
    folder = new_plugin("tiny-unet2", tmp_path)
    text = "".join(p.read_text() for p in folder.rglob("*") if p.is_file())
    assert "my" not in {
        word.lower()[:2] for word in text.split() if "backbone" in word.lower() and "my" in word.lower()
    }
    assert "class TinyUnet2(tiny.CheckpointBackbone)" in (folder / "tiny_unet2.py").read_text()
    assert 'tiny-unet2 = "tiny_unet2"' in (folder / "pyproject.toml").read_text()
    assert (folder / ".github" / "workflows" / "test.yml").exists()
    assert (folder / "tests" / "test_tiny_unet2.py").exists()


def test_check_plugin_takes_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.py").write_text(EXAMPLE)
    assert main(["check-plugin", str(tmp_path / "mine.py")]) == 0
    assert "MyBackbone + MyBackboneLoss" in capsys.readouterr().out
