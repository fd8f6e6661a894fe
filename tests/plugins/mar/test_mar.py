"""MAR against the reference's numbers: both stacks, the head, losses, generation; and its ways to fail."""

from __future__ import annotations

import argparse
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import golden_data
import tinyfusion_core as tiny
from golden_data import GOLDEN, assert_close_rel, weights
from tinyfusion_core.errors import UserError
from tinyfusion_core.pruning.gating import Gates
from tinyfusion_core.runtime.seeding import Rng
from tinyfusion_core.selection.calibration import Calibration
from tinyfusion_dit import DiT
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


def tiny_task() -> tiny.Task:
    backbone, rng = MAR.tiny(), torch.Generator().manual_seed(0)
    data = tiny.Tensors({"x": torch.randn(64, 3, 4, 4, generator=rng), "y": torch.arange(64) % 10})
    return tiny.Task(
        backbone=backbone, loss=MaskedTokenDiffusion(num_iter=4, sampling_steps=5), train=data, held_out=data
    )


@pytest.mark.parametrize("kept", [[0, 1, 2, 4, 5], [0, 3, 4, 5, 6], [2, 6]], ids=["encoder", "decoder", "both"])
def test_hard_gated_equals_pruned_in_both_stacks(kept: list[int]) -> None:
    task = tiny_task()
    model, loss = task.teacher, task.loss
    decision = tiny.Keep(kept)(task, tiny.Trainer(batch_size=8))
    student = tiny.prune(task, decision)
    assert student.config["encoder_depth"] == len(student.encoder_blocks) == sum(i < 4 for i in kept)
    assert student.config["decoder_depth"] == len(student.decoder_blocks) == sum(i >= 4 for i in kept)
    inputs = loss.prepare(task.train.__getitems__(list(range(6))), Rng(0, "test"))
    mask = torch.zeros(6, 7)
    mask[:, kept] = 1
    with torch.no_grad(), Gates(model, task.blocks, batch_dim=task.batch_dim(model)) as gates:
        gates.mask = mask
        gated = loss.predict(model, inputs)
    with torch.no_grad():
        assert torch.equal(gated, loss.predict(student, inputs))
        like, labels = inputs["tokens"].new_zeros(6, 3, 4, 4), inputs["y"]
        samples = loss.sample(student, like, labels, Rng(0, "generate"))
    assert samples.shape == like.shape
    assert torch.isfinite(samples).all()
    again = MAR.construct(student.config)
    again.load_state_dict(student.state_dict())


def test_what_is_prepared() -> None:
    task = tiny_task()
    batch = task.train.__getitems__(list(range(32)))
    loss = MaskedTokenDiffusion(diffusion_batch_mul=3)
    visible_counts = set()
    for step in range(40):
        inputs = loss.prepare(batch, Rng(0, "test", step))
        num_masked = inputs["masked"].shape[1]
        visible_counts.add(16 - num_masked)
        assert math.ceil(0.7 * 16) <= num_masked <= 16
        both = torch.cat([inputs["visible"], inputs["masked"]], 1)
        assert torch.equal(both.sort(1).values, torch.arange(16).expand(32, -1))
        for name in ("visible", "masked"):
            assert (inputs[name].diff(dim=1) > 0).all()
        assert inputs["x_t"].shape == (32, 3, num_masked, 3)
        assert torch.equal(inputs["x_start"][:, 1], take(inputs["tokens"], inputs["masked"]))
    assert visible_counts >= {0, 2, 4}  # also a step in which the encoder sees no token at all
    assert len({tuple(row.tolist()) for row in inputs["masked"]}) > 16  # every sample its own
    # Half a batch is the first half of the batch, whichever process draws it.
    half = {name: value[16:] for name, value in batch.items()}
    later = loss.prepare(half, Rng(0, "test", 39, first=16))
    assert all(torch.equal(value[16:], later[name]) for name, value in inputs.items())


def test_an_evaluation_sees_several_mask_rates() -> None:
    task = tiny_task()
    calibration = Calibration(task, tiny.Trainer(seed=0), 64, 4)
    counts = {calibration._inputs(rows)["visible"].shape[1] for rows in calibration._parts}
    assert len(counts) > 2
    assert max(counts) >= 3


def test_what_names_no_network(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"backbone\.variant: no 'larg'; did you mean 'large'"):
        MAR(variant="larg").config()
    with pytest.raises(UserError, match="'a.pth' does not exist"):
        MAR(variant="larg", checkpoint="a.pth").source()
    folder = tmp_path / "half"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"network": MAR.tiny().config(), "source": {}}))
    with pytest.raises(UserError, match=r"half/model\.safetensors: no such file"):
        MAR(checkpoint=str(folder)).build()


def test_the_loss_of_a_sample_is_its_own() -> None:
    task = tiny_task()
    inputs = task.loss.prepare(task.train.__getitems__(list(range(6))), Rng(0, "test", 3))
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    shuffled = {name: value[order] for name, value in inputs.items()}
    with torch.no_grad():
        losses = [task.loss.loss(task.loss.predict(task.teacher, i), i) for i in (inputs, shuffled)]
        assert losses[0].shape == (6,)
        assert_close_rel(losses[0][order], losses[1], 1e-5)
        prediction = task.loss.predict(task.teacher, inputs)
        assert task.loss.distance(prediction, prediction, inputs).shape == (6,)


def test_the_distance_is_zero_for_the_same_prediction_and_trains_both_halves() -> None:
    task = tiny_task()
    inputs = task.loss.prepare(task.train.__getitems__(list(range(6))), Rng(0, "test", 3))
    inputs["t"] = inputs["t"].clamp(min=1)  # at t = 0 the student's likelihood stands in
    teacher = task.loss.predict(task.teacher, inputs).detach()
    assert_close_rel(1 + task.loss.distance(teacher, teacher, inputs), torch.ones(6), 1e-5)
    student = (teacher + 0.1).requires_grad_()
    task.loss.distance(student, teacher, inputs).sum().backward()
    noise, variance = student.grad.chunk(2, dim=-1)
    assert noise.abs().min() > 0
    assert variance.abs().max() > 0


def test_the_official_container_is_read_and_no_other(tmp_path: Path) -> None:
    sizes = MAR.tiny().config()
    state = MAR.tiny().build().state_dict()
    other = {name: torch.zeros_like(value) for name, value in state.items()}
    path = tmp_path / "checkpoint-last.pth"
    arguments = argparse.Namespace(model="mar_large", epoch=400)
    torch.save({"model": other, "model_ema": state, "epoch": 400, "args": arguments}, path)
    built = MAR(checkpoint=str(path), **sizes).build().state_dict()
    assert all(torch.equal(built[name], state[name]) for name in state)

    torch.save({"model": state, "epoch": 400, "args": arguments}, path)
    with pytest.raises(UserError, match=r"checkpoint-last\.pth: holds no state dict .*looked for model_ema or tensors"):
        MAR(checkpoint=str(path), **sizes).build()

    torch.save({"model_ema": DiT.tiny().build().state_dict()}, path)
    with pytest.raises(UserError, match="another architecture than MAR as configured: missing fake_latent"):
        MAR(checkpoint=str(path), **sizes).build()

    torch.save(state, path)
    with pytest.raises(UserError, match=r"another architecture than DiT as configured"):
        DiT(checkpoint=str(path), **DiT.tiny().config()).build()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"img_size": 9}, "img_size 9 is not divisible by vae_stride 2"),
        ({"patch_size": 3}, "a latent of side 4 is not divisible by patch_size 3"),
        ({"encoder_heads": 3}, "encoder_width 16 is not divisible by encoder_heads 3"),
        ({"decoder_heads": 5}, "decoder_width 24 is not divisible by decoder_heads 5"),
        ({"buffer_size": 0}, "buffer_size is 0; the label needs at least one slot"),
    ],
)
def test_sizes_that_do_not_fit(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        MAR.construct(MAR.tiny().config() | sizes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 0}, r"loss\.patch_size is 0"),
        ({"mask_rate_min": 0.0}, r"loss\.mask_rate_min is 0\.0"),
        ({"diffusion_batch_mul": 0}, r"loss\.diffusion_batch_mul is 0"),
        ({"num_iter": 0}, r"loss\.num_iter is 0"),
        ({"temperature": -1.0}, r"loss\.temperature is -1\.0"),
        ({"label_drop": 2.0}, r"loss\.label_drop is 2\.0"),
        ({"sampling_steps": 1}, r"loss\.sampling_steps is 1"),
    ],
)
def test_impossible_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        MaskedTokenDiffusion(**options)


def test_latents_that_the_patch_does_not_divide() -> None:
    with pytest.raises(UserError, match=r"loss\.patch_size is 3, and the latents have a side of 4"):
        MaskedTokenDiffusion(patch_size=3).prepare({"x": torch.zeros(2, 1, 4, 4)}, Rng(0, "test"))


def test_a_pattern_that_fits_one_stack_only() -> None:
    with pytest.raises(UserError, match=r"search\.pattern: \[2, 4\] does not fit 'decoder_blocks' with 3 blocks"):
        tiny.Search(pattern=(2, 4), steps=2).preview(tiny_task().blocks)


def test_with_more_rounds_than_tokens_every_token_is_generated_once() -> None:
    task = tiny_task()
    loss = MaskedTokenDiffusion(num_iter=40, sampling_steps=2)
    order = torch.rand(2, 16, generator=torch.Generator().manual_seed(0)).argsort(1)
    rng = Rng(0, "generate")
    with torch.no_grad():
        states = list(loss.rounds(task.teacher, torch.zeros(2, 16, 3), torch.tensor([1, 2]), order, rng.normal))
    assert len(states) == 40
    assert (states[-1] != 0).all()
    for before, after in pairwise(states):
        written = (before != 0).any(-1)
        assert torch.equal(before[written], after[written])
