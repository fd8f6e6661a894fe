"""Weights that are missing, damaged or of another network are named when the plan is made, before anything is spent."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import tinyfusion_core as tiny
from llm_toys import folder, recipe_of
from tinyfusion_core.errors import MissingFileError
from tinyfusion_core.pipeline.planning.plan import make_plan
from tinyfusion_llm import CausalLM
from tinyfusion_llm.pretrained.readers import load_processor, load_tokenizer
from tinyfusion_llm.pretrained.reading import check_path

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers
FILE, NORM = "model.safetensors", "model.norm.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory.mktemp("whole") / "model", "llama")


def _cut(path: Path) -> None:
    content = (path / FILE).read_bytes()
    (path / FILE).write_bytes(content[: len(content) - 100])


def _pickled(path: Path) -> None:
    torch.save(load_file(path / FILE), path / "pytorch_model.bin")
    (path / FILE).unlink()


def _without_a_part(path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(path).save_pretrained(path, max_shard_size="40KB")
    (path / FILE).unlink(missing_ok=True)
    next(path.glob("model-00002-of-*")).unlink()


def _with(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        weights = load_file(path / FILE)
        change(weights)
        save_file(weights, path / FILE, {"format": "pt"})

    return damage


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "gone": (lambda path: (path / FILE).unlink(), r"no file named model.safetensors"),
    "pickled": (_pickled, r"no file named model.safetensors"),
    "cut short": (_cut, r"model.safetensors: damaged or cut short \(.*not fully covered\)"),
    "a pointer": (lambda path: (path / FILE).write_text("version https://git-lfs"), r"model.safetensors: damaged"),
    "a part gone": (_without_a_part, r"No such file or directory: \S+model-00002-of-"),
    "a name": (_with(lambda w: w.update(other=w.pop(NORM))), rf"do not fit its config: {NORM}"),
    "a shape": (_with(lambda w: w.update({NORM: w[NORM][1:]})), rf"config: {NORM} torch.Size\(\[31\]\)"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_weights_are_named_without_being_read(damage: str, whole: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(whole, tmp_path / "model"))
    change, message = DAMAGES[damage]
    change(path)
    for reads in (CausalLM(model=str(path)).check_weights, CausalLM(model=str(path)).build):
        with pytest.raises(tiny.UserError, match=message):
            reads()


def test_whole_weights_are_not_read(whole: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = torch.random.get_rng_state()
    backbone = CausalLM(model=str(whole))
    backbone.check_weights()
    model, _ = backbone._loaded(strict=False, device_map={"": "meta"})
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_plan_names_damaged_weights(whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = Path(shutil.copytree(whole, tmp_path / "model"))
    _cut(path)
    problems = make_plan(tiny.load_recipe(recipe_of(path, tmp_path))).problems
    assert len(problems) == 1
    assert "model.safetensors: damaged or cut short" in problems[0]
    assert "Loading" not in capfd.readouterr().err


@pytest.mark.parametrize("name", ["./no", "~/no", "/no/such", "a/b/c", "{here}/no", "beside/no"])
def test_a_path_to_nothing_is_not_looked_for_on_the_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "beside" / "none").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    given = name.format(here=tmp_path)
    hint = "; did you mean 'beside/none'" if name == "beside/no" else ""
    for reads in (
        CausalLM(model=given).config,
        CausalLM(model=given, network={"model_type": "llama"}).check_weights,
        lambda: load_tokenizer(given, None, None),
        lambda: load_processor(given, None),
    ):
        with pytest.raises(MissingFileError, match=rf"no folder '{given}'{hint}"):
            reads()


@pytest.mark.parametrize("name", ["no", "some/no"])
def test_other_names_are_ids(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_path(name, "backbone.model")
