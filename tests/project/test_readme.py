"""What README shows is what runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from torch import nn

import tinyfusion_core as tiny
from places import ROOT
from tinyfusion_core.cli import parse
from tinyfusion_core.pipeline.plan import make_plan
from tinyfusion_core.registry.registry import registry
from toys import Residual

README = (ROOT / "README.md").read_text()


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(Residual(8, 1.0) for _ in range(4)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def test_the_python_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, own = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    short = {"steps=300": "steps=3", "steps=400": "steps=3"}
    for text, less in short.items():
        whole, own = whole.replace(text, less), own.replace(text, less)
    exec(whole, names)
    assert len(names["decision"].kept) == 4
    again = tiny.load_pretrained("student")
    assert all(torch.equal(v, names["student"].state_dict()[k]) for k, v in again.state_dict().items())

    # The second goes on from the first, with a network of the reader's.
    assert len(own.strip().splitlines()) <= 12
    names |= {"model": Stack(), "x": torch.randn(128, 8), "y": torch.arange(128) % 8}
    exec(own, names)
    assert len(names["student"].layers) == 2
    assert len(names["model"].layers) == 4


def test_the_commands_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    lines = re.findall(r"^tinyfusion (.*?)(?:  #.*)?$", README, re.MULTILINE)
    commands = [shlex.split(line) for line in lines]
    assert {c[0] for c in commands} == set(registry().classes["command"])
    for words in commands:
        _, options = parse(words)
        if options.command in ("run", "validate"):
            assert make_plan(tiny.load_recipe(options.recipe, options.overrides)).problems == []
        else:
            assert not getattr(options, "overrides", [])


def test_the_file_map_names_every_room() -> None:
    rooms = README.split("## Find your way")[1].split("```")[1]
    named = set(re.findall(r"^  (\w+)/", rooms, re.MULTILINE))
    assert named == {p.parent.name for p in (ROOT / "tinyfusion_core").glob("*/__init__.py")}
