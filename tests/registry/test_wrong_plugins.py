"""One message for every way to get a plugin wrong: its hooks, what they brought, its names."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import yaml

import tinyfusion_core as tiny
from plugin_files import EXAMPLE, bringing, install, listed
from tinyfusion_core.cli import main
from tinyfusion_core.registry import registry as plugins
from tinyfusion_core.registry.hooks import KINDS
from tinyfusion_core.testing.scaffold import TEMPLATE

HOOK, LOSSES = "tinyfusion_register_backbones", "tinyfusion_register_losses"


def wrong(code: str, tmp_path: Path) -> str:
    path = tmp_path / "wrong.py"
    path.write_text(code)
    with pytest.raises(tiny.UserError) as caught:
        tiny.load_plugin(path)
    assert str(caught.value).startswith(f"plugin {path}: ")
    assert "plugin_file_wrong" not in sys.modules
    return str(caught.value)


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


# What hooks brought

NAMES = 'return ["blocks.*"]'
NARROWS = "return (x + super().forward(x))[:, None]"


def planned(tmp_path: Path, before: str, after: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert before in EXAMPLE
    (tmp_path / "mine.py").write_text(EXAMPLE.replace(before, after))
    recipe = {"plugins": ["mine.py"], **yaml.safe_load((TEMPLATE / "digits.yaml").read_text())}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["validate", str(tmp_path / "mine.yaml")]) == 2
    return capsys.readouterr().err


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
    from tinyfusion_core.protocols.blocks.batch import named_batch_dims

    net = torch.nn.Sequential(torch.nn.Linear(4, 3))
    with tiny.Gates(net, ["0"], named_batch_dims({"input": 0})) as gates:
        gates.mask = torch.tensor([[1.0], [0.0]])
        with pytest.raises(tiny.UserError, match=r"block '0' makes \[3\] of a stream of \[4\] a sample"):
            net(torch.zeros(2, 4))


def test_a_loss_of_the_wrong_shape_is_refused_in_training_too() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    task = tiny.wrap(model, blocks=["0", "1"], loss_fn=lambda m, b: m(b["x"]), data={"x": torch.zeros(8, 4)})
    with pytest.raises(tiny.UserError, match=r"loss: returns the shape \[8, 4\] for 8 samples"):
        task.loss.losses(model, {"x": torch.zeros(8, 4)})
