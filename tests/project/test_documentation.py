"""What README and the pages show is what runs, and what they link to is there."""

from __future__ import annotations

import inspect
import re
import shlex
from pathlib import Path

import pytest
import torch
from torch import nn

import tinyfusion_core as tiny
from pages import examples, text
from places import ROOT
from tinyfusion_core.cli import parse
from tinyfusion_core.pipeline.planning.plan import make_plan
from tinyfusion_core.registry.registry import registry
from toys import Residual

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "benchmarks" / "RESULTS.md",
]


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(Residual(8, 1.0) for _ in range(4)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class TwoStreams(nn.Module):
    """A block that takes and returns two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return a + self.a(b), b + self.b(a)


class Attending(nn.Module):
    """A block that returns its weights too."""

    def __init__(self) -> None:
        super().__init__()
        self.weights, self.values = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights = self.weights(x).softmax(-1)
        return x + weights * self.values(x), weights


class Blocks(nn.Module):
    """Eight blocks of a kind, whose first output is the network's; each gets what the one before it has returned."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(kind() for _ in range(8))

    def forward(self, *streams: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            streams = block(*streams)[: len(streams)]
        return streams[0]


def test_a_network_of_the_readers_is_pruned_in_six_lines() -> None:
    (own,) = examples("README.md")
    assert len(own.strip().splitlines()) <= 2 + 1 + 6
    names = {"model": Stack(), "x": torch.randn(128, 8), "y": torch.arange(128) % 8}
    exec(own, names)
    assert len(names["student"].layers) == 2
    assert len(names["model"].layers) == 4


def test_the_quickstart_runs_in_python_and_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (whole,) = examples("docs/quickstart.md")
    names: dict = {}
    exec(whole, names)
    assert len(names["decision"].kept) == 4
    again = tiny.load_pretrained("student")
    assert all(torch.equal(v, names["student"].state_dict()[k]) for k, v in again.state_dict().items())


def test_the_page_on_ones_own_network_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    whole, data_and_loss, streams, dropped, choices, loop, again, told, imitation = examples("docs/own-network.md")
    names: dict = {}
    exec(whole, names)
    assert len(names["student"].layers) == 4
    assert len(torch.load("student.pt", weights_only=True)) == len(names["student"].state_dict())
    exec(data_and_loss, names)
    assert len(names["task"].held_out) == 64
    exec(choices, names)
    assert names["decision"].kept == (0, 1, 2, 6)
    exec(loop, names)
    recovered = names["student"].state_dict()
    assert not torch.equal(recovered["layers.0.inner.1.weight"], names["model"].layers[0].inner[1].weight)
    exec(again, names)
    assert all(torch.equal(v, recovered[k]) for k, v in names["student"].state_dict().items())
    exec(told, names)
    assert [(line["stage"], line["step"], line["of"]) for line in names["mine"].lines] == [("search", 4, 4)]
    exec(imitation, names)
    assert [(line["stage"], len(line["lr"])) for line in names["mine"].lines][1:] == [("recover", 1)]
    assert not torch.equal(names["student"].layers[0].inner[1].weight, recovered["layers.0.inner.1.weight"])
    for example, network in (
        (streams, {"two_streams": Blocks(TwoStreams)}),
        (dropped, {"attending": Blocks(Attending)}),
    ):
        exec(example, own := {**names, **network})
        decision = tiny.Search(keep=4, steps=2)(own["task"], own["trainer"])
        assert len(tiny.prune(own["task"], decision).blocks) == 4


def test_every_argument_of_wrap_is_explained() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", text("docs/own-network.md"), re.MULTILINE)
    assert rows == list(inspect.signature(tiny.wrap).parameters)


def test_the_commands_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    lines = re.findall(r"^tinyfusion (.*?)(?:  #.*)?$", text("docs/quickstart.md"), re.MULTILINE)
    commands = [shlex.split(line) for line in lines]
    assert {c[0] for c in commands} == set(registry().classes["command"])
    for words in commands:
        _, options = parse(words)
        if options.command in ("run", "validate"):
            assert make_plan(tiny.load_recipe(options.recipe, options.overrides)).problems == []
        else:
            assert not getattr(options, "overrides", [])


def test_the_file_map_names_every_room() -> None:
    rooms = text("CONTRIBUTING.md").split("## Find your way")[1].split("```")[1]
    named = set(re.findall(r"^  (\w+)/", rooms, re.MULTILINE))
    assert named == {p.parent.name for p in (ROOT / "tinyfusion_core").glob("*/__init__.py")}


def test_every_recipe_is_listed() -> None:
    named = re.findall(r"`(\w+\.yaml)`", text("docs/recipes.md"))
    assert sorted(named) == sorted(p.name for p in (ROOT / "recipes").glob("*.yaml"))


def test_the_readme_is_short_and_leads_to_every_page() -> None:
    readme = text("README.md")
    assert len(readme.split()) <= 900
    pages = {f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")} | {"docs/reference/README.md"}
    assert pages <= set(re.findall(r"\]\((docs/[\w/-]+\.md)", readme))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith(("http://", "https://")):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
