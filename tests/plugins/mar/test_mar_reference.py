"""MAR gives the numbers of its reference implementation."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import golden_data
from golden_data import GOLDEN, assert_close_rel, weights
from tinyfusion_dit.diffusion import GaussianDiffusion
from tinyfusion_dit.process import Process, cosine_betas, even_steps, strided_steps
from tinyfusion_mar import MAR, MaskedTokenDiffusion
from tinyfusion_mar import model as networks
from tinyfusion_mar.tokens import patchify, take, unpatchify

ONE_PASS, MULTI_STEP = 1e-5, 2e-5
OFFICIAL_NAMES = {
    "vae_embed_dim": "in_channels",
    "class_num": "num_classes",
    "diffloss_w": "head_width",
    "diffloss_d": "head_depth",
    "encoder_embed_dim": "encoder_width",
    "decoder_embed_dim": "decoder_width",
    "encoder_num_heads": "encoder_heads",
    "decoder_num_heads": "decoder_heads",
}


def ours(config: dict[str, Any]) -> dict[str, Any]:
    """Our constructor's keywords in the reference's settings."""
    named = {OFFICIAL_NAMES.get(key, key): value for key, value in config.items()}
    if "embed_dim" in named:
        for part in ("encoder", "decoder"):
            named |= {f"{part}_width": named["embed_dim"], f"{part}_heads": named["num_heads"]}
    return {key: value for key, value in named.items() if key in MAR._defaults()}


def load_mar(dtype: torch.dtype = torch.float32) -> tuple[networks.MAR, dict[str, Tensor], dict[str, Any]]:
    tensors, config = golden_data.load("mar_small")
    model = networks.MAR(**ours(config["model"]))
    model.load_state_dict(weights(tensors))
    return model.to(dtype).eval(), tensors, config


def masks(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    order = tensors["in.orders"]
    num_masked = math.ceil(order.shape[1] * config["mask_rate"])
    masked, visible = (part.sort(1).values for part in order.tensor_split([num_masked], dim=1))
    return {"masked": masked, "visible": visible}


@torch.no_grad()
def test_every_hidden_state_is_the_references() -> None:
    model, tensors, config = load_mar()
    seen: dict[str, Tensor] = {}
    for stack in ("encoder", "decoder"):
        for i, block in enumerate(model.get_submodule(f"{stack}_blocks")):
            name = f"{stack}_block.{i}"
            block.register_forward_hook(lambda _module, _args, out, name=name: seen.update({name: out}))
    tokens = patchify(tensors["in.latents"], 1)
    assert_close_rel(tokens, tensors["out.tokens"], 0)
    assert torch.equal(unpatchify(tokens, tensors["in.latents"], 1), tensors["in.latents"])
    visible, labels = masks(tensors, config)["visible"], tensors["in.labels"]
    assert torch.equal(torch.ones_like(tensors["out.mask"]).scatter(1, visible, 0.0), tensors["out.mask"])
    none = torch.zeros_like(labels, dtype=torch.bool)
    encoded = model.encode(tokens, visible, labels, none)
    assert_close_rel(encoded, tensors["out.encoder"], ONE_PASS)
    assert_close_rel(model.decode(encoded, visible), tensors["out.z"], ONE_PASS)
    assert len(seen) == 4
    for name, value in seen.items():
        assert_close_rel(value, tensors[f"out.{name}"], ONE_PASS)
    dropped = model.encode(tokens, visible, labels, tensors["in.label_drop_rand"] < 0.1)
    assert_close_rel(dropped, tensors["drop.encoder"], ONE_PASS)

    # What the first encoder block takes, when no token is masked.
    entering: list[Tensor] = []
    model.encoder_blocks[0].register_forward_pre_hook(lambda _module, args: entering.append(args[0]))
    model.encode(tokens, torch.arange(tokens.shape[1]).expand(len(tokens), -1), labels, none)
    assert_close_rel(entering[0], tensors["out.encoder_in_all"], ONE_PASS)


def test_tokens_of_several_positions_are_channel_row_column() -> None:
    x = torch.arange(2 * 3 * 4 * 4).float().view(2, 3, 4, 4)
    tokens = patchify(x, 2)
    assert tokens.shape == (2, 4, 12)
    assert torch.equal(tokens[1, 1], x[1, :, :2, 2:].flatten())
    assert torch.equal(unpatchify(tokens, x, 2), x)


def prepared(tensors: dict[str, Tensor], config: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """The stored draws as `prepare` would give them; the reference noises the masked and the visible tokens alike."""
    chosen = masks(tensors, config)
    repeats, (num_rows, num_tokens) = config["model"]["diffusion_batch_mul"], tensors["in.orders"].shape
    tokens = patchify(tensors["in.latents"].to(dtype), 1)

    def rows(x: Tensor) -> Tensor:
        """(R * B * L, ...) -> (B, R, M, ...)."""
        x = x.view(repeats, num_rows, num_tokens, *x.shape[1:]).transpose(0, 1)
        return torch.stack([x[i][:, chosen["masked"][i]] for i in range(num_rows)])

    t, noise = rows(tensors["in.diff_t"]), rows(tensors["in.diff_noise"]).to(dtype)
    start = take(tokens, chosen["masked"])[:, None].expand_as(noise)
    noised = GaussianDiffusion(schedule="cosine").place(start.flatten(0, 2), noise.flatten(0, 2), t.flatten())
    inputs = {name: x.view(*t.shape, *x.shape[1:]) for name, x in noised.items()}
    drop = torch.zeros(num_rows, dtype=torch.bool)
    assert_close_rel(inputs["x_t"], rows(tensors["diff.x_t"]), ONE_PASS)
    return {**inputs, **chosen, "tokens": tokens, "y": tensors["in.labels"], "drop": drop}


def test_loss_and_gradients_are_the_references(monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype, tol in ((torch.float32, MULTI_STEP), (torch.float64, 1e-9)):
        prefix = "" if dtype == torch.float32 else "f64."
        if dtype == torch.float64:
            monkeypatch.setattr("tinyfusion_dit.model.sinusoid", golden_data.sinusoid)
        model, tensors, config = load_mar(dtype)
        inputs = prepared(tensors, config, dtype)
        adapter = MaskedTokenDiffusion(diffusion_batch_mul=config["model"]["diffusion_batch_mul"])
        prediction = adapter.predict(model, inputs)
        loss = adapter.loss(prediction, inputs)
        mask = tensors["out.mask"].repeat(4, 1).view(4, 3, 16).bool()
        expected = tensors[f"{prefix}diff.loss"].view(4, 3, 16).masked_fill(~mask, 0).sum((0, 2)) / mask.sum((0, 2))
        assert_close_rel(loss, expected, tol)
        assert_close_rel(loss.mean(), tensors[f"{prefix}loss.total"], tol)
        if dtype == torch.float32:
            out = tensors["diff.net_out"].view(4, 3, 16, -1).transpose(0, 1)
            stored = torch.stack([out[i][:, inputs["masked"][i]] for i in range(3)])
            assert_close_rel(prediction, stored, ONE_PASS)
        loss.mean().backward()
        gradients = dict(model.named_parameters())
        norms = torch.stack([gradients[name].grad.double().norm() for name in config["grad_names"]])
        assert_close_rel(norms, tensors[f"{prefix}grad.norms"], tol)
        assert_close_rel(norms.norm(), tensors[f"{prefix}grad.total_norm"], tol)
        if dtype == torch.float32:
            for name in config["grad_keep"]:
                assert_close_rel(gradients[name].grad, tensors[f"grad.full.{name}"], tol)


@pytest.mark.parametrize("case", ["nocfg", "cfg_linear", "cfg_constant", "official_spacing"])
def test_generation_is_the_references(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype, tol in ((torch.float32, MULTI_STEP), (torch.float64, 1e-9)):
        prefix = "" if dtype == torch.float32 else "f64."
        if dtype == torch.float64:
            monkeypatch.setattr("tinyfusion_dit.model.sinusoid", golden_data.sinusoid)
        model, tensors, config = load_mar(dtype)
        options = config["gen"][case]
        adapter = MaskedTokenDiffusion(
            num_iter=config["num_iter"],
            sampling_steps=config["gen_steps"],
            spacing="stride" if options["spacing"].startswith("ddim") else "even",
            temperature=options["temperature"],
            cfg_scale=options["cfg"],
            cfg_schedule=options["schedule"],
        )
        first = [3 * sum(config["gen_counts"][:i]) for i in range(config["num_iter"])]

        def normal(purpose: str, like: Tensor, tensors=tensors, first=first, dtype=dtype) -> Tensor:
            words = purpose.split()
            start = first[int(words[-1])]
            rows = slice(start, start + like.shape[0] * like.shape[1])
            stored = tensors["in.gen_init_noise"] if words[0] == "x_T" else tensors["in.gen_step_noise"][int(words[1])]
            return stored[rows].to(dtype).view_as(like)

        zeros = torch.zeros_like(tensors["out.tokens"], dtype=dtype)
        with torch.no_grad():
            states = list(adapter.rounds(model, zeros, tensors["in.labels"], tensors["in.orders"], normal))
        found = unpatchify(states[-1], tensors["in.latents"], 1)
        counts = [int((state != 0).any(-1).sum(1)[0]) for state in states]
        assert counts == [sum(config["gen_counts"][: i + 1]) for i in range(config["num_iter"])]
        assert_close_rel(found, tensors[f"{prefix}gen.{case}.latents"], tol)


def test_cosine_schedule_is_the_references() -> None:
    tensors, _ = golden_data.load("diffusion_math")
    betas = cosine_betas(1000)
    assert_close_rel(torch.from_numpy(betas), tensors["cosine1000.betas"], 1e-12)
    for name, steps in {
        "10": even_steps(1000, 10), "25": even_steps(1000, 25), "ddim10": strided_steps(1000, 10)
    }.items():  # fmt: skip
        process = Process.respaced(betas, steps)
        expected = {
            "alphas_cumprod": process.a,
            "betas": process.betas,
            "posterior_log_variance_clipped": process.log_variance,
            "posterior_mean_coef1": process.c1,
            "posterior_mean_coef2": process.c2,
        }
        for key, table in expected.items():
            assert_close_rel(torch.from_numpy(table), tensors[f"cosine1000.respaced_{name}.{key}"], 1e-10)


def test_mask_rates_are_the_references() -> None:
    tensors, _ = golden_data.load("diffusion_math")
    adapter = MaskedTokenDiffusion()
    found = torch.tensor([adapter.mask_rate(u) for u in tensors["in.mask_rate_u"]], dtype=torch.float64)
    assert_close_rel(found, tensors["mask_rate.ppf"], 1e-12)


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("manifests/mar_*.json")), ids=lambda path: path.stem)
def test_full_size_names_and_shapes(path: Path) -> None:
    manifest = json.loads(path.read_text())
    backbone = MAR(variant=manifest["model"].removeprefix("mar_"))
    assert backbone.config() == MAR._defaults() | ours(manifest["config"])
    with torch.device("meta"):
        model = MAR.construct(backbone.config())
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == manifest["state_dict"]
    assert sum(p.numel() for p in model.parameters()) == manifest["num_parameters"]
