"""Times and weights of diffusion losses: parts of the process, and errors weighed by the signal-to-noise ratio."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import tinyfusion_core as tiny
from tinyfusion_core.protocols.losses.diffusion import DiffusionLoss
from tinyfusion_diffusers import RectifiedFlow, ScheduledDiffusion
from tinyfusion_dit import GaussianDiffusion
from tinyfusion_mar import MaskedTokenDiffusion
from tinyfusion_sit import FlowMatching

pytestmark = pytest.mark.numerics

ROWS = 512
LOSSES: dict[str, tuple[DiffusionLoss, float]] = {
    "gaussian": (GaussianDiffusion(learn_sigma=False), 1000),
    "scheduled": (ScheduledDiffusion(), 1000),
    "flow": (FlowMatching(), 1),
    "rectified": (RectifiedFlow(time="uniform"), 1),
    "shifted": (RectifiedFlow(shift=3.0), 1),
    "masked tokens": (MaskedTokenDiffusion(), 1000),
}
"""Objectives, and what they call the end of the process."""


def prepared(loss: DiffusionLoss, **options: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, 4, 2, 2, generator=generator)
    batch = {"x": x, "y": torch.zeros(ROWS, dtype=torch.long)}
    return replace(loss, **options).prepare(batch, tiny.Rng(0, "test", strata=ROWS))


@pytest.mark.parametrize("time", ["uniform", "logit_normal"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_part_of_the_process_is_drawn_as_the_whole_would_be_there(name: str, time: str) -> None:
    loss, most = LOSSES[name]
    whole, low, high = (
        prepared(loss, time=time, times=times)["t"].double().flatten() / most for times in ((0, 1), (0, 0.6), (0.6, 1))
    )
    assert low.min() < 0.15
    assert low.max() < 0.6 <= high.min() < 0.62
    assert high.max() > 0.9
    for part, expected in ((low, whole[whole < 0.6]), (high, whole[whole >= 0.6])):
        shares = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
        assert torch.allclose(part.quantile(shares), expected.quantile(shares), atol=0.03)


def test_logit_normal_times_are_the_sigmoid_of_a_normal_number() -> None:
    for name, (loss, most) in LOSSES.items():
        if name == "shifted":
            continue
        t = prepared(loss, time="logit_normal", mean=0.3, std=0.5)["t"].double().flatten() / most
        normal = t.clamp(1e-4, 1 - 1e-4).logit()
        assert (normal.mean().item(), normal.std().item()) == pytest.approx((0.3, 0.5), abs=0.02), name


def clean_error(x: Tensor, guess: Tensor) -> Tensor:
    return (x - guess).square().flatten(1).mean(1)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_errors_on_a_schedule_are_those_of_the_clean_sample(prediction: str) -> None:
    loss = ScheduledDiffusion(prediction=prediction, min_snr=5.0)
    inputs = prepared(loss)
    a = loss._process[0][inputs["t"]]
    signal, noise = (v.sqrt().float()[:, None, None, None] for v in (a, 1 - a))
    x = (inputs["x_t"] - noise * inputs["target"]) / signal
    if prediction == "v_prediction":
        x = signal * inputs["x_t"] - noise * inputs["target"]
    guess = x + 0.1 * torch.randn_like(x)
    told = (inputs["x_t"] - signal * guess) / noise
    if prediction == "v_prediction":
        told = (signal * inputs["x_t"] - guess) / noise
    expected = (a / (1 - a)).clamp(max=5) * clean_error(x, guess).double()
    assert torch.allclose(loss.loss(told, inputs).double(), expected, rtol=1e-3)
    assert torch.equal(loss.distance(told, inputs["target"], inputs), loss.loss(told, inputs))


@pytest.mark.parametrize("prediction", ["velocity", "noise", "score"])
@pytest.mark.parametrize("path", ["linear", "gvp", "vp"])
def test_errors_on_a_path_are_those_of_the_clean_sample(path: str, prediction: str) -> None:
    loss = FlowMatching(path=path, prediction=prediction, min_snr=5.0, times=(0.2, 0.8))
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(64, 4, 2, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    guess = x + 0.1 * torch.randn(64, 4, 2, 2, generator=generator, dtype=torch.float64)
    t = torch.linspace(0.2, 0.8, 64, dtype=torch.float64)
    at = {"t": t, **loss.place(x, noise, t)}
    # What a network would predict that sees the same noisy sample and takes it for another clean one.
    plain = FlowMatching(path=path, prediction="velocity").place(x, torch.zeros_like(x), t)["x_t"]
    alpha = (plain / x).flatten(1)[:, 0]
    sigma = ((at["x_t"] - plain) / noise).flatten(1)[:, 0]
    other = (at["x_t"] - alpha[:, None, None, None] * guess) / sigma[:, None, None, None]
    told = loss.place(guess, other, t)["target"]
    expected = (alpha / sigma).square().clamp(max=5) * clean_error(x, guess)
    assert torch.allclose(loss.loss(told, at), expected, rtol=1e-6)


def test_errors_of_a_rectified_flow_and_of_dits_noise_are_those_of_the_clean_sample() -> None:
    flow = RectifiedFlow(min_snr=5.0)
    inputs = prepared(flow)
    t = inputs["t"]
    wrong = inputs["target"] + 0.1
    ratio = ((1 - t) / t).square().clamp(max=5)
    assert torch.allclose(flow.loss(wrong, inputs), ratio * t.square() * 0.01, rtol=1e-3)
    noise = GaussianDiffusion(learn_sigma=False, min_snr=5.0)
    inputs = prepared(noise)
    a = torch.from_numpy(noise._process.a)[inputs["t"]]
    expected = (a / (1 - a)).clamp(max=5) * (1 - a) / a * 0.01
    assert torch.allclose(noise.loss(inputs["noise"] + 0.1, inputs).double(), expected, rtol=1e-3)
    assert torch.allclose(noise.distance(inputs["noise"] + 0.1, inputs["noise"], inputs).double(), expected, rtol=1e-3)


def test_an_expert_of_a_part_generates_nothing() -> None:
    assert FlowMatching().generates
    for loss, _ in LOSSES.values():
        expert = replace(loss, times=(0.0, 0.875))
        assert not expert.generates
        assert not expert.makes_data


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"times": (0.5, 0.5)}, r"times is \[0\.5, 0\.5\]; expected \[from, to\] between 0 and 1"),
        ({"times": (0.5,)}, r"times is \[0\.5\]"),
        ({"times": (-0.1, 1.0)}, "times is"),
        ({"min_snr": 0.0}, "min_snr is 0.0"),
        ({"time": "logit_normal", "std": 0.0}, "std is 0.0"),
    ],
)
def test_what_is_no_part_and_no_weight_is_refused(options: dict[str, Any], message: str) -> None:
    for loss, _ in LOSSES.values():
        with pytest.raises(tiny.UserError, match=message):
            replace(loss, **options)
    with pytest.raises(tiny.UserError, match="weighting is 'velocity'; expected none .* with min_snr"):
        FlowMatching(prediction="noise", weighting="velocity", min_snr=5.0)
