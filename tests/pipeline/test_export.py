"""What other tools are told is what they understand, and what they say is understood here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

import tinyfusion_core as tiny
from llm_toys import folder, settings
from small_run import run
from tinyfusion_core.cli import main
from tinyfusion_core.pruning.interop_formats import TEXTS, ranges, read_kept
from tinyfusion_dit import DiT
from tinyfusion_dit.model import position_table

BLOCKS = tuple(f"model.layers.{i}" for i in range(8))
KEPT = [0, 1, 2, 4, 7]


@pytest.mark.parametrize("form", TEXTS)
@given(kept=st.sets(st.integers(0, 7), min_size=1, max_size=7).map(sorted))
def test_every_form_reads_back(form: str, kept: list[int], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("forms") / "kept.yaml"
    path.write_text(TEXTS[form](kept, 8, "some/model"))
    assert read_kept(path, 8) == kept
    assert list(tiny.Keep(decision=str(path)).preview(BLOCKS).kept) == kept


def test_the_forms_are_the_tools_own() -> None:
    assert TEXTS["llama.cpp"](KEPT, 8, "") == "--prune-layers 3,5,6\n"
    assert ranges(KEPT) == [[0, 3], [4, 5], [7, 8]]
    merge = yaml.safe_load(TEXTS["mergekit"](KEPT, 8, "some/model"))
    assert merge["merge_method"] == "passthrough"
    assert [s["sources"][0]["layer_range"] for s in merge["slices"]] == [[0, 3], [4, 5], [7, 8]]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # datasets and dill under a new numpy
def test_mergekit_reads_its_form() -> None:
    from mergekit.config import MergeConfiguration

    made = MergeConfiguration.model_validate(yaml.safe_load(TEXTS["mergekit"](KEPT, 8, "some/model")))
    found = [i for piece in made.slices for i in range(*piece.sources[0].layer_range)]
    assert found == KEPT


@pytest.mark.filterwarnings("ignore")
def test_peft_replicates_the_layers_that_stay(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    path = folder(tmp_path, "llama")
    kept = [0, 2, 3, 5]
    ranges_ = json.loads(TEXTS["peft"](kept, 6, ""))
    model = AutoModelForCausalLM.from_pretrained(path)
    whole = [layer.mlp.up_proj.weight.clone() for layer in model.model.layers]
    made = get_peft_model(model, LoraConfig(layer_replication=ranges_, target_modules=["q_proj"], r=2))
    left = [layer.mlp.up_proj.weight for layer in made.base_model.model.model.layers]
    assert len(left) == settings("llama")["num_hidden_layers"] - 2
    assert all(torch.equal(a, whole[i]) for a, i in zip(left, kept, strict=True))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[0, 0, 1]", "at most once"),
        ("[[0, 4], [2, 6]]", "at most once"),
        ("[0, 9]", "among 0 to 7"),
        ("--prune-layers 9", "among 0 to 7"),
        ("hello", "not a decision"),
        ("{slices: [{sources: [{model: a}]}]}", "one source with a layer_range"),
    ],
)
def test_what_is_no_pruning_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "kept.yaml"
    path.write_text(text)
    with pytest.raises(tiny.UserError, match=message):
        read_kept(path, 8)


@pytest.mark.filterwarnings("ignore")
def test_a_dit_is_the_same_network_in_diffusers(tmp_path: Path) -> None:
    from diffusers import DiTTransformer2DModel

    backbone = DiT(
        input_size=8, patch_size=2, hidden_size=32, depth=3, num_heads=2, num_classes=10, learn_sigma=True,
        _random_seed=0,
    )  # fmt: skip
    model = backbone.build()
    with pytest.raises(tiny.UserError, match="position table"):
        backbone.export(model, "diffusers", tmp_path)
    model.pos_embed.data = position_table(32, 4).float()[None]
    backbone.export(model, "diffusers", tmp_path)
    theirs = DiTTransformer2DModel.from_pretrained(tmp_path)
    for block in theirs.transformer_blocks:  # its own frequencies of time, see `to_diffusers`
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.tensor([1, 10])
    with torch.no_grad():
        assert torch.allclose(model(x, t, y), theirs(x, timestep=t, class_labels=y).sample, atol=1e-4)
    with pytest.raises(tiny.UserError, match="mlp_ratio 2.0"):
        DiT.tiny().export(DiT.tiny().build(), "diffusers", tmp_path)


@pytest.mark.slow
def test_a_run_of_two_rounds_names_the_blocks_of_its_first_teacher(recipe: Path, tmp_path: Path, capsys) -> None:
    content = yaml.safe_load(recipe.read_text())
    keeps = [{"class_path": "Keep", "init_args": {"blocks": blocks}} for blocks in ([0, 2, 3, 7], [1, 3])]
    del content["search"], content["recover"]
    content["rounds"] = {name: {"search": keep} for name, keep in zip("ab", keeps, strict=True)}
    content["evaluate"] = []
    recipe.write_text(yaml.safe_dump(content))
    assert run(recipe, tmp_path / "run") == 0
    capsys.readouterr()
    assert main(["export", str(tmp_path / "run"), "--to", "indices", "--out", str(tmp_path / "kept.json")]) == 0
    assert json.loads((tmp_path / "kept.json").read_text()) == [2, 7]


@pytest.mark.slow
def test_an_export_that_ends_early_leaves_no_riddle(recipe: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    content = yaml.safe_load(recipe.read_text())
    keep = {"class_path": "Keep", "init_args": {"blocks": [0, 2, 3, 7]}}
    recipe.write_text(yaml.safe_dump({**content, "search": keep, "recover": None, "evaluate": []}))
    assert run(recipe, tmp_path / "run") == 0
    out, empty = tmp_path / "out", tmp_path / "empty"
    empty.mkdir()
    command = ["export", str(tmp_path / "run"), "--to", "diffusers", "--out"]
    for place in (out, empty):
        assert main([*command, str(place)]) == 2  # a DiT with MLPs of another width
    assert "mlp_ratio 2.0" in capsys.readouterr().err
    assert not out.exists()
    assert list(empty.iterdir()) == []

    def killed(self: DiT, model: torch.nn.Module, library: str, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        assert (folder / "tinyfusion_export.json").exists()  # whoever ends here leaves a folder that is known as ours
        if (folder / "again").exists():
            (folder / "again").rename(folder / "done")
            return
        raise KeyboardInterrupt

    monkeypatch.setattr(DiT, "export", killed)
    assert main([*command, str(out)]) == 130
    assert not out.exists()
    out.mkdir()
    for name in ("config.json", "again"):
        (out / name).write_text("{}")
    (out / "tinyfusion_export.json").write_text('{"format_version": 1, "library": "diffusers"}')
    assert main([*command, str(out)]) == 0
    assert (out / "done").exists()
