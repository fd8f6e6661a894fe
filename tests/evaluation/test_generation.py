"""Samples of every objective: the same for a seed, whatever the batch; and checkpoints that are another model's."""

from __future__ import annotations

import pytest
import torch

import tinyfusion_core as tiny
from golden_data import assert_close_rel
from tinyfusion_core.evaluation.evaluate import check_teacher
from tinyfusion_core.runtime.seeding import Rng
from tinyfusion_dit import DiT, GaussianDiffusion
from tinyfusion_images import Digits
from tinyfusion_mar import MAR, MaskedTokenDiffusion
from tinyfusion_sit import FlowMatching, SiT

pytestmark = pytest.mark.numerics

CASES: dict[str, tuple[type[tiny.Backbone], tiny.LossAdapter]] = {
    "ddpm": (DiT, GaussianDiffusion(sampling_steps=4, cfg_scale=1.5)),
    "ddim": (DiT, GaussianDiffusion(sampling_steps=4, sampler="ddim")),
    "euler": (SiT, FlowMatching(sampler="euler", sampling_steps=4, cfg_scale=1.5)),
    "heun": (SiT, FlowMatching(sampler="heun", sampling_steps=4)),
    "sde": (SiT, FlowMatching(sampler="sde", sampling_steps=4, cfg_scale=1.5)),
    "sde, noise on the vp path": (SiT, FlowMatching(path="vp", prediction="noise", sampling_steps=4)),
    "rounds": (MAR, MaskedTokenDiffusion(num_iter=4, sampling_steps=4, cfg_scale=1.5)),
    "rounds, constant guidance": (
        MAR,
        MaskedTokenDiffusion(num_iter=3, sampling_steps=4, cfg_scale=2.0, cfg_schedule="constant", temperature=0.9),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_sample_depends_on_its_seed_and_row_alone(name: str) -> None:
    backbone_type, loss = CASES[name]
    backbone = backbone_type.tiny()
    model, batch = backbone.build(), backbone.example(5)

    def sample(rows: slice, seed: int = 0) -> torch.Tensor:
        state = torch.get_rng_state()
        out = loss.sample(model, batch["x"][rows], batch["y"][rows], Rng(seed, "generate", first=rows.start))
        assert torch.equal(torch.get_rng_state(), state)
        return out

    whole = sample(slice(0, 5))
    assert whole.shape == batch["x"].shape
    assert torch.isfinite(whole).all()
    assert torch.equal(sample(slice(0, 5)), whole)
    assert_close_rel(torch.cat([sample(slice(0, 2)), sample(slice(2, 5))]), whole, 1e-4)
    assert not torch.allclose(sample(slice(0, 5), seed=1), whole)


DIGITS: dict[type[DiT], tiny.LossAdapter] = {DiT: GaussianDiffusion(learn_sigma=False), SiT: FlowMatching()}


@pytest.mark.parametrize(("backbone", "other"), [(DiT, SiT), (SiT, DiT)])
def test_a_checkpoint_of_the_other_time_is_noticed(backbone: type[DiT], other: type[DiT]) -> None:
    """DiT's and SiT's have the same names and shapes; only what they predict tells them apart."""
    data, trainer = Digits(), tiny.Trainer(batch_size=8)

    def check(checkpoint: str) -> None:
        network = backbone(checkpoint=checkpoint)
        task = tiny.Task(backbone=network, loss=DIGITS[backbone], train=data.train(), held_out=data.held_out())
        check_teacher(task, trainer)

    with pytest.raises(tiny.UserError, match="is it the right checkpoint for this backbone, this loss"):
        check(str(other.shipped / "digits"))
    check("digits")
