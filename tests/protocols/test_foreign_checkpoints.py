"""Checkpoints as training scripts leave them: wrapped names, many entries, shards, arguments beside the weights."""

from __future__ import annotations

import argparse
import collections
import json
import os
import pathlib
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import llm_toys
import tinyfusion_core as tiny
from places import TESTS
from tinyfusion_core.parsing.state_dicts import unwrapped
from tinyfusion_core.parsing.weights import read_weights
from tinyfusion_core.pipeline.planning.on_meta import build_on_meta
from tinyfusion_dit import DiT
from tinyfusion_llm import CausalLM
from tinyfusion_mar import MAR
from tinyfusion_sit import SiT

Weights = dict[str, Tensor]
CONFIG = {name: value for name, value in DiT.tiny().config().items() if value is not None}


def weights(backbone: type[DiT] = DiT) -> Weights:
    return backbone.tiny().build().state_dict()


def renamed(change: Callable[[str], str], of: Weights) -> Weights:
    return {change(name): value for name, value in of.items()}


def per_block(name: str) -> str:
    """What compiling every block leaves."""
    parts = name.split(".")
    return ".".join([*parts[:2], "_orig_mod", *parts[2:]]) if parts[0] == "blocks" else name


def saved(content: Any, folder: Path) -> str:
    torch.save(content, folder / "w.pt")
    return str(folder / "w.pt")


WRAPPED: dict[str, Callable[[Weights], Any]] = {
    "as it is": lambda w: w,
    "DDP": partial(renamed, "module.{}".format),
    "compiled": partial(renamed, "_orig_mod.{}".format),
    "compiled, then DDP": partial(renamed, "module._orig_mod.{}".format),
    "every block compiled": partial(renamed, per_block),
    "every block compiled, then DDP": lambda w: renamed("module.{}".format, renamed(per_block, w)),
    "Lightning": lambda w: {"state_dict": renamed("model.{}".format, w), "epoch": 3},
    "model_state_dict": lambda w: {"model_state_dict": w, "step": 7},
    "AveragedModel": lambda w: {"n_averaged": torch.tensor(9), **renamed("module.{}".format, w)},
    "ema before model": lambda w: {"model": {n: v * 0 for n, v in w.items()}, "ema": w, "opt": {"lr": 1e-4}},
    "ema_model": lambda w: {"model": {n: v * 0 for n, v in w.items()}, "ema_model": w},
    "without the table": lambda w: {n: v for n, v in w.items() if n != "pos_embed"},
}


@pytest.mark.parametrize("how", WRAPPED)
def test_a_wrapped_checkpoint_is_the_same_network(how: str, tmp_path: Path) -> None:
    expected = weights() if how != "without the table" else weights() | {"pos_embed": DiT.construct(CONFIG).pos_embed}
    found = DiT(checkpoint=saved(WRAPPED[how](weights()), tmp_path), **CONFIG).build().state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_recipe_chooses_the_entry(tmp_path: Path) -> None:
    ema, raw = weights(), {name: value + 1 for name, value in weights().items()}
    both = {"state_dict": {**renamed("ema.{}".format, ema), **renamed("net.{}".format, raw)}}
    path = saved(both, tmp_path)

    def chosen(key: str) -> Weights:
        backbone = DiT(checkpoint={"file": path, "key": key}, **CONFIG)
        assert backbone.source()["key"] == key
        return backbone.build().state_dict()

    assert_equal(chosen("state_dict.net"), raw)
    assert_equal(chosen("state_dict.ema"), ema)
    for wrong, fault in {
        "nothing": "has no entry 'nothing'",
        "state_dict.eme": r"has no entry 'state_dict\.eme'; did you mean 'ema'",
    }.items():
        with pytest.raises(tiny.UserError, match=fault):
            chosen(wrong)
    with pytest.raises(
        tiny.UserError, match=r"none of its .* is one of DiT: they begin with ema, net, not with blocks"
    ):
        DiT(checkpoint=path, **CONFIG).build()
    with pytest.raises(tiny.UserError, match=r"^checkpoint\.kee: unknown key; did you mean 'key'"):
        DiT(checkpoint={"file": path, "kee": "x"}, **CONFIG).build()
    with pytest.raises(tiny.UserError, match=r"^checkpoint: has a key, but no file"):
        DiT(checkpoint={"key": "x"}, **CONFIG).build()


def assert_equal(found: Weights, expected: Weights) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_heads_that_inference_ignores_are_named_and_left_out(tmp_path: Path) -> None:
    more = {f"projectors.{i}.weight": torch.ones(2, 2) for i in range(3)}
    path = saved({"ema": weights(SiT) | more}, tmp_path)
    sizes = {name: value for name, value in SiT.tiny().config().items() if value is not None}
    with pytest.raises(tiny.UserError, match=r"3 weights that SiT has no .*ignore: \[projectors\.\*\]"):
        SiT(checkpoint=path, **sizes).build()
    assert_equal(
        SiT(checkpoint=path, ignore=["projectors.*"], **sizes).build().state_dict(), SiT.tiny().build().state_dict()
    )
    with pytest.raises(tiny.UserError, match=r"^ignore: 'heads\.\*' matches no name"):
        SiT(checkpoint=path, ignore=["projectors.*", "heads.*"], **sizes).build()
    with pytest.raises(tiny.UserError, match=r"^ignore: '\*' matches .*, which the network needs"):
        SiT(checkpoint=path, ignore=["*"], **sizes).build()
    with pytest.raises(
        tiny.UserError, match=r"another architecture.*unexpected blocks\.3"
    ):  # not advised to ignore them
        SiT(checkpoint=path, ignore=["projectors.*"], **sizes | {"depth": 3}).build()


def test_mar_without_an_average(tmp_path: Path) -> None:
    sizes = {name: value for name, value in MAR.tiny().config().items() if value is not None}
    path = saved({"model": MAR.tiny().build().state_dict(), "epoch": 1}, tmp_path)
    assert_equal(MAR(checkpoint=path, **sizes).build().state_dict(), MAR.tiny().build().state_dict())


def sharded(folder: Path, names: tuple[str, str] = ("a-1.safetensors", "a-2.safetensors")) -> Path:
    own = weights()
    half = list(own)[: len(own) // 2]
    for name, part in zip(names, (half, own.keys() - set(half)), strict=True):
        if Path(name).name == name:
            save_file({key: own[key].clone() for key in part}, folder / name)
    index = {"metadata": {}, "weight_map": {key: names[0] if key in half else names[1] for key in own}}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_shards_and_their_index(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    index = next(folder.glob("*.json"))
    for place in (folder, index):
        backbone = DiT(checkpoint=str(place), **CONFIG)
        assert_equal(backbone.build().state_dict(), DiT.tiny().build().state_dict())
    before = backbone.source()["sha256"]
    changed = {name: value + 1 for name, value in read_weights(folder / "a-2.safetensors").items()}
    save_file(changed, folder / "a-2.safetensors")
    os.utime(folder / "a-2.safetensors", (1, 1))
    assert backbone.source()["sha256"] != before
    (folder / "a-1.safetensors").unlink()
    with pytest.raises(tiny.UserError, match=r"a-1\.safetensors: no such file, but .*index\.json needs it"):
        backbone.build()
    elsewhere = tmp_path / "other"
    elsewhere.mkdir()
    with pytest.raises(tiny.UserError, match=r"names the file '\.\./secret\.safetensors', which is not beside it"):
        DiT(checkpoint=str(sharded(elsewhere, ("a-1.safetensors", "../secret.safetensors"))), **CONFIG).build()


def test_a_folder_with_one_file_and_no_config(tmp_path: Path) -> None:
    save_file(weights(), tmp_path / "ema.safetensors")
    assert_equal(DiT(checkpoint=str(tmp_path), **CONFIG).build().state_dict(), DiT.tiny().build().state_dict())


ARGUMENTS = {
    "path": pathlib.Path("/data/images"),
    "namespace": argparse.Namespace(out=pathlib.Path("runs"), lr=np.float64(1e-4)),
    "numpy": [np.float32(3), np.int64(3), np.bool_(True), np.arange(3), np.dtype("float16")],
    "defaultdict": collections.defaultdict(list, {"a": [1]}),
    "counter": collections.Counter("aab"),
}


@pytest.mark.parametrize(
    ("size", "wrong"),
    [
        ({"input_size": 1}, "input_size 1 is not divisible by patch_size 2"),
        ({"hidden_size": 16.0}, "its sizes make no network"),
        ({"depth": 10**5}, "depth is 100,000"),
    ],
)
def test_sizes_that_a_file_says_are_refused_by_its_name(size: dict[str, Any], wrong: str, tmp_path: Path) -> None:
    content = json.loads((TESTS / "before_rooms" / "teacher" / "config.json").read_text())
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**content, "network": {**content["network"], **size}}))
    with pytest.raises(tiny.UserError, match=f"{path}: {wrong}"):
        build_on_meta(DiT(checkpoint=str(tmp_path)))


def test_a_saved_network_of_no_size_is_refused_by_its_folder(tmp_path: Path) -> None:
    shutil.copytree(TESTS / "before_rooms" / "teacher", tmp_path / "saved")
    path = tmp_path / "saved" / "config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "network": {**content["network"], "depth": "n" * 9}}))
    with pytest.raises(tiny.UserError, match=f"{tmp_path / 'saved'}: its sizes make no network"):
        tiny.load_pretrained(tmp_path / "saved")


def test_a_folder_of_transformers_is_named_too(tmp_path: Path) -> None:
    path = llm_toys.folder(tmp_path, "llama") / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_hidden_layers": 10**5}))
    with pytest.raises(tiny.UserError, match=f"{tmp_path}: num_hidden_layers is 100,000"):
        build_on_meta(CausalLM(model=str(tmp_path)))


@pytest.mark.parametrize("kind", ARGUMENTS)
def test_arguments_beside_the_weights_are_data(kind: str, tmp_path: Path) -> None:
    path = saved({"model": {"w": torch.ones(2)}, "args": ARGUMENTS[kind]}, tmp_path)
    assert read_weights(Path(path))["w"].tolist() == [1, 1]


class Own:
    pass


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch /tmp/never",)


@pytest.mark.parametrize(("kind", "named"), [(Own, r"Own"), (Evil, r"system"), (lambda: print, r"print")])
def test_what_may_be_code_is_refused_by_its_name(kind: Callable[[], Any], named: str, tmp_path: Path) -> None:
    path = saved({"model": {"w": torch.ones(2)}, "args": kind()}, tmp_path)
    with pytest.raises(tiny.UserError, match=rf"w\.pt: refused, .*\(\S*{named}\)\. Ask its author for safetensors"):
        read_weights(Path(path))


def test_a_part_that_all_names_have_is_taken_off_only_if_none_is_known() -> None:
    w = torch.ones(1)
    assert unwrapped({"a.b.x": w, "a.b.y": w}, ["x", "y"]).keys() == {"x", "y"}
    assert unwrapped({"a.x": w, "a.y": w}, ["a.x"]).keys() == {"a.x", "a.y"}
    assert unwrapped({"a.x": w, "b.y": w}, ["x", "y"]).keys() == {"a.x", "b.y"}
    assert unwrapped({"p.q": w}, ["x"]).keys() == {"q"}
    assert unwrapped({}, ["x"]) == {}


@pytest.mark.parametrize("backbone", [DiT, SiT, MAR])
@pytest.mark.parametrize("labels", [3, 10, 17])
def test_labels_of_ones_own_begin_a_table_of_their_own(backbone: type[Any], labels: int, tmp_path: Path) -> None:
    sizes = {name: value for name, value in backbone.tiny().config().items() if value is not None}
    before = backbone.tiny().build().state_dict()
    table = backbone.labels[1]
    mine = backbone(checkpoint=saved(before, tmp_path), **sizes | {"num_classes": labels}, new_labels=True)
    with pytest.warns(
        UserWarning, match=f"new_labels: the {labels} labels of .*w.pt begin anew; the network knows none"
    ):
        found = mine.build().state_dict()
    with pytest.warns(UserWarning, match="begin anew"):
        again = mine.build().state_dict()  # on another process, say
    assert all(torch.equal(found[name], again[name]) for name in found)
    assert all(torch.equal(found[name], before[name]) for name in found if name != table)
    extra = len(before[table]) - sizes["num_classes"]
    assert found[table].shape == (labels + extra, before[table].shape[1])
    assert torch.equal(found[table][labels:], before[table][sizes["num_classes"] :])  # what stands for no label
    assert extra == (backbone is not MAR)
    assert not torch.isin(found[table][:labels], before[table]).any()
    assert 0.6 < found[table][:labels].std() / before[table].std() < 1.6
    assert mine.source()["new_labels"] is True
    if labels != 10:
        with pytest.raises(
            tiny.UserError, match=rf"w.pt: has 10 labels, and num_classes is {labels}; .*new_labels: true"
        ):
            backbone(checkpoint=saved(before, tmp_path), **sizes | {"num_classes": labels}).build()


def test_labels_of_a_folder_of_ours_and_what_has_no_labels(tmp_path: Path) -> None:
    with pytest.raises(tiny.UserError, match=r"num_classes is 3 in the recipe .*, but 10 in .*set new_labels: true"):
        DiT(checkpoint="digits", num_classes=3).build()
    mine = DiT(checkpoint="digits", num_classes=3, new_labels=True)
    with pytest.warns(UserWarning, match="the 3 labels of .* begin anew"):
        model = mine.build()
    assert mine.config()["num_classes"] == mine.config(model)["num_classes"] == 3
    with pytest.raises(tiny.UserError, match="depth is 5 in the recipe .*; leave it out, or choose another checkpoint"):
        DiT(checkpoint="digits", depth=5, new_labels=True).config()
    other = saved(weights() | {"x_embedder.proj.bias": torch.zeros(3)}, tmp_path)
    with pytest.raises(tiny.UserError, match="a checkpoint of another architecture"):
        DiT(checkpoint=other, **CONFIG | {"num_classes": 3}, new_labels=True).build()


@pytest.mark.parametrize("name", ["folder/model.safetensors", "w.safetensors"])
def test_a_file_that_is_cut_short_is_named_without_being_read(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    save_file(weights(), path)
    given = path.parent if path.parent != tmp_path else path
    DiT(checkpoint=str(given), **CONFIG).check_weights()
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(tiny.UserError, match=rf"{path.name}: damaged or cut short \(.*not fully covered"):
        DiT(checkpoint=str(given), **CONFIG).check_weights()
