"""The list of a run's stages, and what decides that a finished one is not run again."""

from __future__ import annotations

from pathlib import Path

import pytest

import tinyfusion_core as tiny
from places import ROOT
from tinyfusion_core.pipeline.resuming.fingerprint import stage_keys
from tinyfusion_core.runtime.stages import stages_of

KEYS = {
    "quickstart": {
        "search": "34c818d5c3c63f840a54cb92530042c3c6403fe9ce086f5a739f1f108c021128",
        "recover": "5390fae94346249dcd7689c4e9da831f7bce6628e686c90a9898f82e4c7f1eb8",
        "evaluate": "bd8fee89e95f872db580622f403663d034f7aa87d4deebf030838856da575787",
    },
    "progressive_digits": {
        "d4.search": "e981af3e56f71499788c70030eca2d609b664f075f6433acaad07f2076fc2130",
        "d4.recover": "48eaeb38aa8638306621f5a1558b574bd1e253b23c56dc51591a9bf36ddda572",
        "d2.search": "d6318e6a33b275419b8be56c1eeaadece3492d50f57aa412b1559596e69b029b",
        "d2.recover": "f47f32968715f9067eeeaf169adb27d23172e76e25a57d1609a53922e59833cf",
        "evaluate": "1babd40bca03658256c38bb0797759a8b1163661f61feeadc217353c48978e26",
    },
    "teacher_digits": {
        "train": "a8eea6eb48d80adb3f2dc7ea508fe129b86420acd5957a3b113e5b1bf3683ccc",
        "evaluate": "9affd7f4cf237f7a2937ea0786f9d6d7640522f368113ecea52ca852ecbf21a9",
    },
}
"""What `stages.json` holds of shipped recipes. With other keys, finished stages of old run folders would run again."""
SAID = {
    "quickstart": ["--search={class_path: Search, init_args: {keep: 4, steps: 300, batch_size: 16, update: LoRA}}"],
}
"""What a recipe said when its keys were noted, where it says something else now."""


@pytest.mark.parametrize("name", KEYS)
def test_the_keys_of_stages_stay_the_same(name: str) -> None:
    assert stage_keys(tiny.load_recipe(ROOT / "recipes" / f"{name}.yaml", SAID.get(name, ()))) == KEYS[name]


def test_rules_that_came_later_change_no_key() -> None:
    ruled = "--search={class_path: Greedy, init_args: {keep: 4, constraints: {max_run: 2}}}"
    found = stage_keys(tiny.load_recipe(ROOT / "recipes" / "quickstart.yaml", [ruled]))
    assert found["search"] == "68cbf3158636a9b57483a7cf29418e020ddf4150b5a6199f9203188d4b5af597"  # before `period`


@pytest.mark.parametrize("name", KEYS)
def test_a_recipe_and_its_run_folder_have_the_same_stages(name: str, tmp_path: Path) -> None:
    recipe = tiny.load_recipe(ROOT / "recipes" / f"{name}.yaml")
    recipe.save(tmp_path)
    live, stored = recipe.stages(), tiny.RunFolder(tmp_path).stages()
    assert [stage.key for stage in live] == list(KEYS[name])
    assert live == stored
    assert [stage.settings is None for stage in live] == [stage.settings is None for stage in stored]


def test_a_section_that_is_left_out_has_no_stage() -> None:
    assert [stage.key for stage in stages_of({"search": None, "recover": None, "rounds": None})] == ["evaluate"]
    # A round without recovery saves its student all the same.
    rounds = {"a": {"search": {}, "recover": None}, "b": {"search": {}, "recover": {}}}
    stages = stages_of({"train": {}, "rounds": rounds, "evaluate": []})
    assert [stage.key for stage in stages] == ["train", "a.search", "a.recover", "b.search", "b.recover", "evaluate"]
    assert [stage.title for stage in stages[:3]] == ["train", "a search", "a recover"]
    assert [stage.settings is None for stage in stages] == [False, False, True, False, False, False]
