"""The samplers of the diffusion process: the reference's numbers, live diffusers', and closed forms."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import golden_data
from diffusion_reference import BASE, EXACT, SAMPLE, load_dit
from golden_data import assert_close_rel, weights
from tinyfusion_core.runtime.seeding import Rng
from tinyfusion_dit import DiT, GaussianDiffusion
from tinyfusion_dit.model import DiT as Network
from tinyfusion_dit.process import (
    Process,
    at,
    linear_betas,
    strided_steps,
)


def run(
    objective: GaussianDiffusion, model: Network, tensors: dict[str, Tensor], dtype: torch.dtype, **kwargs: Any
) -> list[Tensor]:
    y = tensors["in.y"]
    null = torch.full_like(y, model.null_class)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        if objective.cfg_scale == 1:
            return model(x, t, y)  # type: ignore[no-any-return]
        doubled = torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null])
        return model.forward_with_cfg(*doubled, objective.cfg_scale)[: len(x)]

    with torch.no_grad():
        noise = tensors["in.step_noise"].to(dtype)
        return list(objective.trajectory(denoise, tensors["in.x_T"].to(dtype), lambda i: noise[i]))


SAMPLERS = {
    "ddpm": GaussianDiffusion(sampling_steps=10),
    "ddpm_clip": GaussianDiffusion(sampling_steps=10, clip_denoised=True),
    "ddim": GaussianDiffusion(sampling_steps=10, sampler="ddim"),
    "ddim_ddimspacing": GaussianDiffusion(sampling_steps=10, sampler="ddim", spacing="stride"),
}


@pytest.mark.parametrize("guidance", ["plain", "cfg"])
@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.usefixtures("reference_sinusoid")
def test_samples(name: str, guidance: str) -> None:
    tensors, config = golden_data.load("sampling_dit_small")
    dit, _ = golden_data.load(config["weights_from"])
    objective = replace(SAMPLERS[name], cfg_scale=config["cfg_scale"] if guidance == "cfg" else 1.0)
    states = run(objective, load_dit(config["model"], weights(dit), torch.float32), tensors, torch.float32)
    expected = {k: v for k, v in tensors.items() if k.startswith(f"{name}.{guidance}.")}
    assert len(states) == 10
    assert len(expected) == (3 if name == "ddpm" else 1)
    for key, value in expected.items():
        step = {"after_1": 0, "after_5": 4, "final": -1}[key.rpartition(".")[2]]
        assert_close_rel(states[step], value, SAMPLE)
    if (key := f"f64.{name}.{guidance}.final") in tensors:
        exact = run(objective, load_dit(config["model"], weights(dit), torch.float64), tensors, torch.float64)
        assert_close_rel(exact[-1], tensors[key], EXACT)


@pytest.mark.parametrize("spacing", ["10", "ddim10"])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_samples_of_a_closed_form_network(sampler: Any, spacing: str) -> None:
    tensors, _ = golden_data.load("sampling_dit_small")
    objective = GaussianDiffusion(
        sampler=sampler, sampling_steps=10, spacing="stride" if spacing.startswith("ddim") else "even"
    )

    def network(x: Tensor, t: Tensor) -> Tensor:
        e = at(np.sqrt(1 - BASE.a), t, x) * x + 0.05 * (tensors["in.y"] + 1).view(-1, 1, 1, 1) * x.sin()
        return torch.cat([e, x.cos() / 2], dim=1)

    states = list(objective.trajectory(network, tensors["in.x_T"], lambda i: tensors["in.step_noise"][i]))
    assert_close_rel(states[0], tensors[f"toy.{spacing}.{sampler}.after_1"], SAMPLE)
    assert_close_rel(states[-1], tensors[f"toy.{spacing}.{sampler}.final"], SAMPLE)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("clip", [False, True])
def test_live_diffusers_agree(sampler: Any, clip: bool) -> None:
    from diffusers import DDIMScheduler, DDPMScheduler

    objective = GaussianDiffusion(sampler=sampler, sampling_steps=50, spacing="stride", clip_denoised=clip)

    def network(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([0.9 * x + 0.1 * (x + t.view(-1, 1, 1, 1) / 100).sin(), x.cos()], dim=1)

    # The same respaced process, presented to diffusers as one that is run in full.
    betas = Process.respaced(linear_betas(1000), strided_steps(1000, 50)).betas.tolist()
    settings = {"num_train_timesteps": 50, "trained_betas": betas, "clip_sample": clip}
    scheduler = (
        DDIMScheduler(**settings) if sampler == "ddim" else DDPMScheduler(variance_type="learned_range", **settings)
    )
    scheduler.set_timesteps(50)
    noise = torch.randn(50, 2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    stream = torch.Generator().manual_seed(1)
    torch.randn(1, 2, 3, 4, 4, generator=stream)
    x = noise[0]
    for k in scheduler.timesteps:
        out = network(x, torch.full((2,), 20 * int(k)))
        if sampler == "ddim":
            x = scheduler.step(out[:, :3], k, x, use_clipped_model_output=True).prev_sample
        else:
            x = scheduler.step(out, k, x, generator=stream).prev_sample
    *_, ours = objective.trajectory(network, noise[0], lambda i: noise[i + 1])
    assert_close_rel(ours, x, 1e-4)


class Exact(nn.Module):
    """The best possible noise prediction for data ~ N(0.7, 0.3^2)."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        a = at(BASE.a, t, x)
        return (1 - a).sqrt() * (x - a.sqrt() * 0.7) / (a * 0.3**2 + 1 - a)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_samples_a_normal_distribution(sampler: Any) -> None:
    objective = GaussianDiffusion(learn_sigma=False, sampler=sampler, sampling_steps=200)
    samples = objective.sample(Exact(), torch.empty(20, 100), torch.zeros(20), Rng(0, "test"))
    assert abs(samples.mean() - 0.7) < 0.03
    assert abs(samples.std() - 0.3) < 0.02


class Guided(nn.Module):
    """A network whose guidance can be read off: noise 0 for the null class, 1e-3 * (label + 1) otherwise."""

    null_class = 99

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        e = torch.where(y == self.null_class, 0, 1e-3 * (y + 1)).view(-1, 1, 1, 1).expand_as(x).to(x.dtype)
        return torch.cat([e, torch.zeros_like(x)], dim=1)

    forward_with_cfg = Network.forward_with_cfg
    in_channels = 4


@pytest.mark.parametrize(("guided", "channels"), [(3, 3), (None, 4), (2, 2), (99, 4)])
def test_how_many_channels_are_guided(guided: int | None, channels: int) -> None:
    objective = GaussianDiffusion(sampler="ddim", sampling_steps=2, guided_channels=guided)
    like, labels, rng = torch.zeros(2, 4, 2, 2, dtype=torch.float64), torch.tensor([0, 4]), Rng(0, "sample")
    plain = objective.sample(Guided(), like, labels, rng)
    strong = replace(objective, cfg_scale=3.0).sample(Guided(), like, labels, rng)
    unlabelled = objective.sample(Guided(), like, torch.full_like(labels, 99), rng)
    expected = unlabelled + 3 * (plain - unlabelled)
    expected[:, channels:] = plain[:, channels:]
    assert_close_rel(strong, expected, 1e-9)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("cfg_scale", [1.0, 1.5])
def test_a_sample_does_not_depend_on_its_neighbours(sampler: Any, cfg_scale: float) -> None:
    model = DiT.tiny().build().double()
    objective = GaussianDiffusion(sampler=sampler, sampling_steps=4, cfg_scale=cfg_scale)
    like, labels, before = torch.zeros(3, 4, 8, 8, dtype=torch.float64), torch.tensor([1, 2, 3]), torch.get_rng_state()
    together = objective.sample(model, like, labels, Rng(0, "sample"))
    assert torch.equal(torch.get_rng_state(), before)
    assert not together.requires_grad
    for i in range(3):
        alone = objective.sample(model, like[:1], labels[i : i + 1], Rng(0, "sample", first=i))
        assert_close_rel(alone, together[i : i + 1], 1e-9)
    other = objective.sample(model, like, labels, Rng(0, "sample", step=1))
    assert (other - together).abs().max() > 1e-3 * together.abs().max()
