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

import tinyfusion_core as tiny
from golden_data import assert_close_rel
from tinyfusion_core.errors import UserError
from tinyfusion_core.pruning.gating import Gates
from tinyfusion_core.runtime.seeding import Rng
from tinyfusion_core.selection.criteria.calibration import Calibration
from tinyfusion_dit import DiT
from tinyfusion_mar import MAR, MaskedTokenDiffusion
from tinyfusion_mar.tokens import take


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
    with pytest.raises(UserError, match=r"^variant: no 'larg'; did you mean 'large'"):
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

    torch.save({"ema": state, "epoch": 400, "args": arguments}, path)
    with pytest.raises(UserError, match=r"-last\.pth: holds no state dict .*looked for model_ema, model or tensors"):
        MAR(checkpoint=str(path), **sizes).build()

    torch.save({"model_ema": DiT.tiny().build().state_dict()}, path)
    with pytest.raises(UserError, match=r"names is one of MAR: they begin with blocks, final_layer"):
        MAR(checkpoint=str(path), **sizes).build()

    torch.save(state, path)
    with pytest.raises(UserError, match=r"names is one of DiT: they begin with class_emb"):
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
        ({"patch_size": 0}, r"^patch_size is 0"),
        ({"mask_rate_min": 0.0}, r"^mask_rate_min is 0\.0"),
        ({"diffusion_batch_mul": 0}, r"^diffusion_batch_mul is 0"),
        ({"num_iter": 0}, r"^num_iter is 0"),
        ({"temperature": -1.0}, r"^temperature is -1\.0"),
        ({"label_drop": 2.0}, r"^label_drop is 2\.0"),
        ({"sampling_steps": 1}, r"^sampling_steps is 1"),
    ],
)
def test_impossible_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        MaskedTokenDiffusion(**options)


def test_latents_that_the_patch_does_not_divide() -> None:
    with pytest.raises(UserError, match=r"^patch_size is 3, and the latents have a side of 4"):
        MaskedTokenDiffusion(patch_size=3).prepare({"x": torch.zeros(2, 1, 4, 4)}, Rng(0, "test"))


def test_a_pattern_that_fits_one_stack_only() -> None:
    with pytest.raises(UserError, match=r"^pattern: \[2, 4\] does not fit 'decoder_blocks' with 3 blocks"):
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
