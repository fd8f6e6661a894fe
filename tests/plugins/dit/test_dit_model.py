"""The DiT network against the reference's numbers, and the backbone's ways to get one."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import golden_data
from golden_data import GOLDEN, assert_close_rel, record, weights
from tinyfusion_core.errors import UserError
from tinyfusion_dit import DiT
from tinyfusion_dit.model import DiT as Network
from tinyfusion_dit.model import position_table, sinusoid

pytestmark = pytest.mark.numerics

SMALL = {"input_size": 8, "hidden_size": 16, "depth": 3, "num_heads": 2, "patch_size": 2, "num_classes": 10}
FORWARD = 5e-6  # float32 rounding, relative to the largest entry
MANIFESTS = sorted(GOLDEN.glob("manifests/*DiT-*_*.json"))


def load_dit(dtype: torch.dtype = torch.float32) -> tuple[Network, dict[str, Tensor], dict[str, Any]]:
    tensors, config = golden_data.load("dit_small")
    model = Network(**config["model"])
    model.load_state_dict(weights(tensors))
    return model.to(dtype).eval(), tensors, config


@pytest.mark.usefixtures("reference_sinusoid")
@torch.no_grad()
def test_every_hidden_state_is_the_references() -> None:
    model, tensors, _ = load_dit()
    seen = record(model)
    seen["forward"] = model(tensors["in.x"], tensors["in.t"], tensors["in.y"])
    seen["t_freq"] = sinusoid(tensors["in.t"])
    expected = {k.removeprefix("out."): v for k, v in tensors.items() if k.startswith("out.") and k != "out.cfg"}
    assert set(seen) == set(expected)
    for name, value in seen.items():
        # A unit in the last place of a frequency, times t = 999, and one of the angle.
        assert_close_rel(value, expected[name], 1.2e-4 if name == "t_freq" else FORWARD)


@pytest.mark.usefixtures("reference_sinusoid")
@torch.no_grad()
def test_float64_agrees_to_ten_digits() -> None:
    model, tensors, _ = load_dit(torch.float64)
    seen = record(model)
    out = model(tensors["in.x"].double(), tensors["in.t"], tensors["in.y"])
    assert_close_rel(out, tensors["f64.out.forward"], 1e-10)
    assert_close_rel(seen["block.3"], tensors["f64.out.block.3"], 1e-10)


@pytest.mark.usefixtures("reference_sinusoid")
@torch.no_grad()
def test_guidance_is_the_references() -> None:
    model, tensors, config = load_dit()
    out = model.forward_with_cfg(tensors["in.cfg_x"], tensors["in.cfg_t"], tensors["in.cfg_y"], config["cfg_scale"])
    assert_close_rel(out, tensors["out.cfg"], FORWARD)


@torch.no_grad()
def test_guidance_never_touches_the_variance() -> None:
    model, tensors, _ = load_dit()
    inputs = tensors["in.cfg_x"], tensors["in.cfg_t"], tensors["in.cfg_y"]
    plain = model(inputs[0][:2].repeat(2, 1, 1, 1), *inputs[1:])
    guided = model.forward_with_cfg(*inputs, 4.0, guided_channels=99)
    assert torch.equal(guided[:, 4:], plain[:, 4:])
    assert torch.equal(guided[:2, :4], guided[2:, :4])
    assert_close_rel(guided[:2, :4], plain[2:, :4] + 4.0 * (plain[:2, :4] - plain[2:, :4]), FORWARD)
    assert_close_rel(model.forward_with_cfg(*inputs, 1.0)[:2], plain[:2], FORWARD)


@pytest.mark.usefixtures("reference_sinusoid")
@torch.no_grad()
def test_dropped_labels_are_the_null_class() -> None:
    model, tensors, _ = load_dit()
    dropped = tensors["in.y"].masked_fill(tensors["in.drop_rand"] < 0.1, model.null_class)
    assert_close_rel(model(tensors["in.x"], tensors["in.t"], dropped), tensors["drop.forward"], FORWARD)
    forced = tensors["in.y"].masked_fill(tensors["in.force_drop_ids"] == 1, model.null_class)
    assert_close_rel(model.y_embedder(forced), tensors["drop.y_emb"], FORWARD)


def test_tables_are_the_references() -> None:
    tensors, config = golden_data.load("diffusion_math")
    for dim, grid in config["pos"]:
        assert_close_rel(position_table(dim, grid), tensors[f"pos_embed.D{dim}.G{grid}"], 1e-14)
    t = tensors["in.t_embed_t"]
    error = (sinusoid(t) - tensors["t_embed"]).abs().amax(1)
    # A unit in the last place of a frequency grows with t, and so does one of the angle.
    assert (error < 2e-7 + 1.2e-7 * t).all()
    model, tensors, _ = load_dit()
    fresh = Network(**model.config)
    assert torch.equal(fresh.pos_embed, tensors["w.pos_embed"])


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_full_size_names_and_shapes(path: Path) -> None:
    manifest = json.loads(path.read_text())
    with torch.device("meta"):
        model = Network(**manifest["config"])
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert list(shapes.items()) == list(manifest["state_dict"].items())
    assert len(shapes) == manifest["num_tensors"]
    assert sum(p.numel() for p in model.parameters()) == manifest["num_parameters"]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == manifest["num_trainable_at_construction"]


def test_the_manifests_were_found() -> None:
    assert len(MANIFESTS) == 8


@pytest.mark.parametrize("size", ["S", "B", "L", "XL"])
def test_variants_are_the_published_sizes(size: str) -> None:
    config = json.loads((GOLDEN / f"manifests/DiT-{size}-2_256.json").read_text())["config"]
    assert DiT(variant=f"{size}/2").config().items() >= config.items()
    for patch in (4, 8):
        assert DiT.variants[f"{size}/{patch}"] == DiT.variants[f"{size}/2"] | {"patch_size": patch}


def test_starts_as_the_identity_with_output_zero() -> None:
    torch.manual_seed(0)
    model = Network(**SMALL | {"hidden_size": 64, "num_heads": 4})
    x, c = torch.randn(2, 16, 64), torch.randn(2, 64)
    assert all(torch.equal(block(x, c), x) for block in model.blocks)
    assert not model(torch.randn(2, 4, 8, 8), torch.tensor([1, 500]), torch.tensor([0, 9])).any()
    assert not model.pos_embed.requires_grad
    for weight in (model.blocks[0].attn.qkv.weight, model.x_embedder.proj.weight.flatten(1)):
        bound = (6 / sum(weight.shape)) ** 0.5
        assert 0.95 * bound < weight.abs().max() <= bound
    for weight in (model.y_embedder.embedding_table.weight, model.t_embedder.mlp[0].weight):
        assert 0.015 < weight.std() < 0.025


def test_activations_differ() -> None:
    torch.manual_seed(0)
    gelu, silu = (Network(**SMALL, mlp_act=act).blocks[0].mlp.act for act in ("gelu_tanh", "silu"))
    x = torch.linspace(-3, 3, 7)
    assert torch.equal(gelu(x), nn.functional.gelu(x, approximate="tanh"))
    assert torch.equal(silu(x), nn.functional.silu(x))


def test_without_label_drop_there_is_no_null_class() -> None:
    model = Network(**SMALL, class_dropout_prob=0.0)
    assert model.y_embedder.embedding_table.weight.shape == (10, 16)
    with pytest.raises(UserError, match=r"label_drop"):
        _ = model.null_class


def test_without_sigma_the_output_has_the_shape_of_the_input() -> None:
    model = Network(**SMALL, learn_sigma=False, in_channels=1)
    assert model(torch.zeros(2, 1, 8, 8), torch.zeros(2), torch.zeros(2, dtype=torch.long)).shape == (2, 1, 8, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_size": 9}, "input_size 9 is not divisible by patch_size 2"),
        ({"num_heads": 3}, "hidden_size 16 is not divisible by num_heads 3"),
        ({"hidden_size": 18}, "hidden_size 18 is not divisible by 4"),
        ({"mlp_act": "gelu"}, "did you mean 'gelu_tanh'"),
    ],
)
def test_impossible_networks(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Network(**SMALL | change)


# The backbone


def save_folder(folder: Path, model: nn.Module, network: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    config = {"network": network, "source": {"licence": "Apache-2.0"}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def assert_same_weights(actual: nn.Module, expected: nn.Module) -> None:
    ours, theirs = actual.state_dict(), expected.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("container", ["plain", "ema", "model", "both", "safetensors"])
def test_checkpoint_files(container: str, tmp_path: Path) -> None:
    model = DiT.tiny().build()
    state, other = model.state_dict(), {name: torch.zeros_like(p) for name, p in model.state_dict().items()}
    path = tmp_path / ("w.safetensors" if container == "safetensors" else "w.pt")
    if container == "safetensors":
        save_file(state, path)
    else:
        torch.save(
            {"plain": state, "ema": {"ema": state, "step": 3}, "model": {"model": state}}.get(
                container, {"model": other, "ema": state}
            ),
            path,
        )
    built = DiT(checkpoint=str(path), **DiT.tiny().config()).build()
    assert_same_weights(built, model)
    assert not built.training
    assert {name for name, p in built.named_parameters() if not p.requires_grad} == {"pos_embed"}


def test_checkpoint_folder(tmp_path: Path) -> None:
    tiny = DiT.tiny()
    model = tiny.build()
    folder = save_folder(tmp_path / "w", model, tiny.config())
    loaded = DiT(checkpoint=str(folder))
    assert loaded.config() == tiny.config()
    assert_same_weights(loaded.build(), model)
    source = loaded.source()
    assert source["checkpoint"] == str(folder)
    assert source["licence"] == "Apache-2.0"
    assert len(source["sha256"]) == 64
    shutil.copyfile(folder / "model.safetensors", tmp_path / "w.safetensors")
    file = DiT(checkpoint=str(tmp_path / "w.safetensors"), licence="MIT", **tiny.config())
    assert file.source() | {"checkpoint": "", "licence": ""} == source | {"checkpoint": "", "licence": ""}
    assert file.source()["licence"] == "MIT"


def test_shipped_checkpoints_go_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = DiT.tiny()
    save_folder(tmp_path / "shipped" / "toy", tiny.build(), tiny.config())
    monkeypatch.setattr(DiT, "shipped", tmp_path / "shipped")
    (tmp_path / "toy").mkdir()
    monkeypatch.chdir(tmp_path)
    assert_same_weights(DiT(checkpoint="toy").build(), tiny.build())
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        DiT(checkpoint="./toy").build()
    with pytest.raises(UserError, match=r"'nowhere' does not exist.*Included here: toy"):
        DiT(checkpoint="nowhere", variant="S/2").build()


def test_what_the_recipe_says_must_agree_with_the_folder(tmp_path: Path) -> None:
    tiny = DiT.tiny()
    folder = str(save_folder(tmp_path / "w", tiny.build(), tiny.config()))
    with pytest.raises(UserError, match=r"^depth is 5 in the recipe.*but 4 in .*config\.json"):
        DiT(checkpoint=folder, depth=5).build()
    with pytest.raises(UserError, match=r"^hidden_size is 1152 in the recipe.*but 16 in .*config\.json"):
        DiT(checkpoint=folder, variant="XL/2").build()
    with pytest.raises(UserError, match=r"^licence is 'MIT', but .* says 'Apache-2\.0'"):
        DiT(checkpoint=folder, licence="MIT").source()
    assert DiT(checkpoint=folder, depth=4, licence="Apache-2.0").config()["depth"] == 4


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    tiny = DiT.tiny()
    folder = save_folder(tmp_path / "w", tiny.build(), tiny.config() | {"hidden": 3})
    with pytest.raises(UserError, match=r"no network setting 'hidden'; did you mean 'hidden_size'"):
        DiT(checkpoint=str(folder)).build()
    (folder / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"config\.json: no mapping 'network'"):
        DiT(checkpoint=str(folder)).build()
    (folder / "config.json").write_text(json.dumps({"network": tiny.config()}))
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors: no such file"):
        DiT(checkpoint=str(folder)).build()


def test_no_checkpoint() -> None:
    with pytest.raises(
        UserError, match=r"^checkpoint: not set.*official weights .*https://dl\.fb.*DiT-XL-2-256x256\.pt"
    ):
        DiT(variant="XL/2").build()
    with pytest.raises(UserError, match=r"^checkpoint: 'a\.pt' does not exist.*DiT-XL-2-512x512\.pt"):
        DiT(variant="XL/2", input_size=64, checkpoint="a.pt").build()
    with pytest.raises(UserError, match=r"^checkpoint: not set.*official weights \(of XL/2 alone"):
        DiT().build()


def test_a_checkpoint_of_another_architecture(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save(DiT.tiny().build().state_dict(), path)
    config = DiT.tiny().config()
    with pytest.raises(UserError, match=r"w\.pt: a checkpoint of another architecture.*missing blocks\.4"):
        DiT(checkpoint=str(path), **config | {"depth": 5}).build()
    with pytest.raises(UserError, match=r"hidden_size, depth, num_heads, patch_size not known; set variant"):
        DiT(checkpoint=str(path)).build()
    path.write_bytes(b"PK damaged")
    with pytest.raises(UserError, match=r"w\.pt"):
        DiT(checkpoint=str(path), **config).build()


def test_unknown_variant() -> None:
    with pytest.raises(UserError, match=r"no 'XL/3'; did you mean 'XL/"):
        DiT(variant="XL/3").config()


def test_sizes_override_the_variant_without_weights() -> None:
    config = DiT(variant="XL/2", depth=14, learn_sigma=False).config()
    assert (config["hidden_size"], config["depth"], config["learn_sigma"]) == (1152, 14, False)
    with torch.device("meta"):
        model = DiT.construct(config)
    assert len(model.get_submodule("blocks").state_dict()) == 14 * 10


def test_tiny_is_random_everywhere_and_always_the_same() -> None:
    before = torch.random.get_rng_state()
    tiny = DiT.tiny()
    model = tiny.build()
    assert_same_weights(tiny.build(), model)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all((p != 0).all() and p.unique().numel() > p.numel() // 2 for p in model.parameters())
    assert tiny.config(model) == tiny.config()
    assert tiny.source() == {"licence": "unknown"}
    batch = tiny.example(5)
    assert batch["x"].shape == (5, 4, 8, 8)
    assert model(batch["x"], torch.zeros(5), batch["y"]).shape == (5, 8, 8, 8)


def test_pruned_networks_are_rebuilt_from_their_config() -> None:
    tiny = DiT.tiny()
    model = tiny.build()
    original = copy.deepcopy(model)
    del model.get_submodule("blocks")[2], model.get_submodule("blocks")[0]  # type: ignore[operator]
    tiny.after_prune(model, {"blocks": [1, 3]})
    assert tiny.config(model) == tiny.config() | {"depth": 2}
    assert tiny.config(original) == tiny.config()
    rebuilt = tiny.construct(tiny.config(model))
    rebuilt.load_state_dict(model.state_dict())
    batch = tiny.example(2)
    inputs = batch["x"], torch.tensor([3, 900]), batch["y"]
    assert torch.equal(rebuilt(*inputs), model(*inputs))
