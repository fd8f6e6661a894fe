"""SiT against the reference's numbers: network, paths, losses, samplers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import golden_data
from golden_data import GOLDEN, assert_close_rel, record, weights
from marks import slow_but
from tinyfusion_core.errors import UserError
from tinyfusion_core.runtime.seeding import Rng
from tinyfusion_dit.conditional import guided_network, sample_mean
from tinyfusion_dit.model import sinusoid
from tinyfusion_sit import FlowMatching, SiT
from tinyfusion_sit.model import SiT as Network
from tinyfusion_sit.path import coefficients

pytestmark = pytest.mark.numerics

ONE_PASS, MULTI_STEP = 1e-5, 2e-5
PATHS = ["linear", "gvp", "vp"]


def load_sit(dtype: torch.dtype = torch.float32) -> tuple[Network, dict[str, Tensor], dict[str, Any]]:
    tensors, config = golden_data.load("sit_small")
    model = Network(**config["model"])
    model.load_state_dict(weights(tensors))
    return model.to(dtype).eval(), tensors, config


@torch.no_grad()
def test_every_hidden_state_is_the_references() -> None:
    model, tensors, config = load_sit()
    seen = record(model)
    seen["forward"] = model(tensors["in.x"], tensors["in.t"], tensors["in.y"])
    seen["t_freq"] = sinusoid(tensors["in.t"])
    expected = {k.removeprefix("out."): v for k, v in tensors.items() if k.startswith("out.") and k != "out.cfg"}
    assert set(seen) == set(expected)
    for name, value in seen.items():
        assert_close_rel(value, expected[name], ONE_PASS)
    guided = model.forward_with_cfg(tensors["in.cfg_x"], tensors["in.cfg_t"], tensors["in.cfg_y"], config["cfg_scale"])
    assert_close_rel(guided, tensors["out.cfg"], ONE_PASS)


@torch.no_grad()
def test_float64_agrees_to_ten_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinyfusion_dit.model.sinusoid", golden_data.sinusoid)
    model, tensors, _ = load_sit(torch.float64)
    out = model(tensors["in.x"].double(), tensors["in.t"], tensors["in.y"])
    assert_close_rel(out, tensors["f64.out.forward"], 1e-10)


@pytest.mark.parametrize("path", PATHS)
def test_paths_are_the_references(path: str) -> None:
    tensors, _ = golden_data.load("sit_small")
    golden = {k.removeprefix(f"path.{path}."): v for k, v in tensors.items() if k.startswith(f"path.{path}.")}
    t = tensors["in.loss_t"]
    along = coefficients(path, t)
    found = torch.stack([along.alpha, along.sigma, along.d_alpha, along.d_sigma])
    assert_close_rel(found, golden["coef"], ONE_PASS)
    assert_close_rel(along.diffusion, golden["drift_var"], ONE_PASS)
    wide = coefficients(path, t.view(-1, 1, 1, 1))
    x_t = golden["xt"]
    assert_close_rel(-wide.growth * x_t, golden["drift_mean"], ONE_PASS)
    placed = FlowMatching(path=path).place(tensors["in.x1"], tensors["in.x0"], t)
    assert_close_rel(placed["x_t"], x_t, ONE_PASS)
    assert_close_rel(placed["target"], golden["ut"], ONE_PASS)
    prediction = golden.get("pred", tensors["path.linear.pred"])
    if path == "linear":
        assert_close_rel(wide.score("velocity", prediction, x_t), golden["score_from_velocity"], ONE_PASS)
    # The other paths' outputs are not stored; they are those of the network at their own x_t.
    model, _, _ = load_sit()
    with torch.no_grad():
        prediction = model(x_t, t, tensors["in.loss_y"])
    assert_close_rel(wide.score("velocity", prediction, x_t), golden["score_from_velocity"], ONE_PASS)


@pytest.mark.parametrize("path", PATHS)
def test_losses_are_the_references(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype, tol in ((torch.float32, ONE_PASS), (torch.float64, 1e-10)):
        if dtype == torch.float64:
            monkeypatch.setattr("tinyfusion_dit.model.sinusoid", golden_data.sinusoid)
        model, tensors, _ = load_sit(dtype)
        data, noise, t = (tensors[f"in.{name}"].to(dtype) for name in ("x1", "x0", "loss_t"))
        batch = {"t": t, "y": tensors["in.loss_y"], "drop": torch.zeros(len(t), dtype=torch.bool)}

        def loss(dtype: torch.dtype = dtype, batch=batch, data=data, noise=noise, t=t, model=model, **options):
            adapter = FlowMatching(path=path, **options)
            inputs = batch | adapter.place(data, noise, t)
            with torch.no_grad():
                return adapter.loss(adapter.predict(model, inputs), inputs)

        key = f"path.{path}.loss"
        assert_close_rel(loss(), tensors[key if dtype == torch.float32 else f"f64.{key}"], tol)
        if dtype == torch.float32:
            for prediction in ("noise", "score"):
                for weighting in ("none", "velocity", "likelihood"):
                    found = loss(prediction=prediction, weighting=weighting)
                    assert_close_rel(found, tensors[f"{key}_{prediction}_{weighting}"], ONE_PASS)


def test_gradients_are_the_references(monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype, tol in ((torch.float32, MULTI_STEP), (torch.float64, 1e-10)):
        if dtype == torch.float64:
            monkeypatch.setattr("tinyfusion_dit.model.sinusoid", golden_data.sinusoid)
        model, tensors, config = load_sit(dtype)
        adapter = FlowMatching()
        data, noise, t = (tensors[f"in.{name}"].to(dtype) for name in ("x1", "x0", "loss_t"))
        inputs = {"t": t, "y": tensors["in.loss_y"], "drop": torch.zeros(len(t), dtype=torch.bool)}
        inputs |= adapter.place(data, noise, t)
        adapter.loss(adapter.predict(model, inputs), inputs).mean().backward()
        gradients = dict(model.named_parameters())
        norms = torch.stack([gradients[name].grad.double().norm() for name in config["grad_names"]])
        prefix = "" if dtype == torch.float32 else "f64."
        assert_close_rel(norms, tensors[f"{prefix}grad.norms"], tol)
        assert_close_rel(norms.norm(), tensors[f"{prefix}grad.total_norm"], tol)
        if dtype == torch.float32:
            for name in config["grad_keep"]:
                assert_close_rel(gradients[name].grad, tensors[f"grad.full.{name}"], tol)


def samples(sampler: str, steps: int, guided: bool, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    model, tensors, config = load_sit(dtype)
    adapter = FlowMatching(sampler=sampler, sampling_steps=steps, cfg_scale=config["cfg_scale"] if guided else 1.0)
    network = guided_network(model, tensors["in.z_y"], adapter.cfg_scale, adapter.guided_channels)
    noise = tensors["in.sde_noise"].to(dtype)
    with torch.no_grad():
        return list(adapter.trajectory(network, tensors["in.z"].to(dtype), lambda i: noise[i]))


@pytest.mark.parametrize("kind", slow_but(["plain", "cfg"], "cfg"))
def test_samplers_are_the_references(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, tensors, _ = load_sit()
    euler = samples("euler", 10, kind == "cfg")
    assert_close_rel(euler[0], tensors[f"ode.{kind}.after_1"], ONE_PASS)
    assert_close_rel(euler[-1], tensors[f"ode.{kind}.euler_final"], MULTI_STEP)
    assert_close_rel(euler[-1], tensors[f"ode.{kind}.ref_euler_numsteps11"], MULTI_STEP)
    assert_close_rel(samples("euler", 9, kind == "cfg")[-1], tensors[f"ode.{kind}.ref_euler_numsteps10"], MULTI_STEP)
    assert_close_rel(samples("heun", 9, kind == "cfg")[-1], tensors[f"ode.{kind}.ref_heun2_numsteps10"], MULTI_STEP)
    sde = samples("sde", 10, kind == "cfg")
    assert_close_rel(sde[0], tensors[f"sde.{kind}.after_1"], ONE_PASS)
    assert_close_rel(sde[-2], tensors[f"sde.{kind}.before_last"], MULTI_STEP)
    assert_close_rel(sde[-1], tensors[f"sde.{kind}.final"], MULTI_STEP)
    monkeypatch.setattr("tinyfusion_dit.model.sinusoid", golden_data.sinusoid)
    double = samples("euler", 10, kind == "cfg", torch.float64)[-1]
    assert_close_rel(double, tensors[f"f64.ode.{kind}.euler_final"], 1e-6)
    fine = samples("heun", 200, kind == "cfg", torch.float64)[-1]
    assert_close_rel(fine, tensors[f"f64.ode.{kind}.ref_dopri5_tight"], 1e-3)


@pytest.mark.parametrize("size", ["S", "B", "L", "XL"])
def test_full_size_names_and_shapes(size: str) -> None:
    manifest = json.loads((GOLDEN / f"manifests/SiT-{size}-2_256.json").read_text())
    backbone = SiT(variant=f"{size}/2")
    assert backbone.config().items() >= manifest["config"].items()
    with torch.device("meta"):
        model = SiT.construct(backbone.config())
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == manifest["state_dict"]
    assert sum(p.numel() for p in model.parameters()) == manifest["num_parameters"]


@pytest.mark.parametrize("guided", [False, True])
def test_heun_converges_faster_than_euler(guided: bool) -> None:
    _, tensors, _ = load_sit()
    exact = tensors[f"f64.ode.{'cfg' if guided else 'plain'}.ref_dopri5_tight"]
    error = {s: (samples(s, 16, guided, torch.float64)[-1] - exact).abs().max() for s in ("euler", "heun")}
    assert error["heun"] < error["euler"] / 5


GAUSS_STD = 0.5


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction", ["velocity", "noise", "score"])
@pytest.mark.parametrize("sampler", slow_but(["heun", "sde"], "sde"))
def test_the_exact_network_of_gaussian_data_is_sampled_exactly(path: str, prediction: str, sampler: str) -> None:
    """Data N(1, 1/4): the best prediction is known, and so is what every sampler must arrive at."""

    def network(x: Tensor, t: Tensor) -> Tensor:
        along = coefficients(path, t.double().view(-1, 1, 1, 1))
        variance = (along.alpha * GAUSS_STD).square() + along.sigma.square()
        residual = (x - along.alpha) / variance
        if prediction == "score":
            return -residual
        if prediction == "noise":
            return along.sigma * residual
        data = 1 + along.alpha * GAUSS_STD**2 * residual
        return along.d_alpha * data + along.d_sigma * along.sigma * residual

    adapter = FlowMatching(path=path, prediction=prediction, sampler=sampler, sampling_steps=250)
    rng = Rng(0, "test")
    start = rng.normal("x_0", torch.empty(64, 1, 8, 8, dtype=torch.float64))
    with torch.no_grad():
        *_, last = adapter.trajectory(network, start, lambda i: rng.normal(f"{i}", start))
    assert abs(last.mean() - 1) < 0.03
    # The SDE's last step, a mean, makes the samples a little too alike.
    assert abs(last.std() - GAUSS_STD) < (0.06 if sampler == "sde" else 0.02)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("prediction", "weighting"), [("velocity", "none"), ("noise", "velocity"), ("score", "velocity")]
)
def test_a_velocity_weighted_error_is_the_error_of_the_velocity(path: str, prediction: str, weighting: str) -> None:
    torch.manual_seed(0)
    data, noise, output, t = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.rand(3)
    t = 0.1 + 0.8 * t
    adapter = FlowMatching(path=path, prediction=prediction, weighting=weighting)
    inputs = adapter.place(data, noise, t)
    along = coefficients(path, t.view(-1, 1, 1, 1))
    velocity = along.velocity(prediction, output, inputs["x_t"])
    target = along.d_alpha * data + along.d_sigma * noise
    assert_close_rel(adapter.loss(output, inputs), sample_mean((velocity - target).square()), 1e-4)


def test_times_stay_inside_of_the_published_intervals() -> None:
    batch = {"x": torch.zeros(4000, 1, 1, 1), "y": torch.zeros(4000, dtype=torch.long)}
    for path, prediction, low, high in (
        ("linear", "velocity", 0, 1), ("vp", "velocity", 0, 1 - 1e-5), ("gvp", "noise", 1e-3, 1 - 1e-3)
    ):  # fmt: skip
        adapter = FlowMatching(path=path, prediction=prediction)
        inputs = adapter.prepare(batch, Rng(0, "times"))
        assert low <= inputs["t"].min() < low + 2e-3
        assert high - 2e-3 < inputs["t"].max() <= high
        assert all(torch.isfinite(value).all() for value in inputs.values())
        assert abs(inputs["drop"].float().mean() - 0.1) < 0.03


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weighting": "velocity"}, r"^weighting is 'velocity'; expected none with prediction: velocity"),
        ({"sampling_steps": 1}, r"^sampling_steps is 1; expected at least 2"),
        ({"sampling_steps": 0, "sampler": "euler"}, r"^sampling_steps is 0; expected at least 1"),
        ({"last_step": 1.0}, r"^last_step is 1\.0"),
        ({"label_drop": -1.0}, r"^label_drop is -1\.0"),
        ({"guided_channels": -1}, r"^guided_channels is -1"),
    ],
)
def test_impossible_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        FlowMatching(**options)


def test_a_sit_is_no_dit_of_diffusers(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--to diffusers: SiT has no form in diffusers"):
        SiT.tiny().export(SiT.tiny().build(), "diffusers", tmp_path)


def test_euler_is_that_of_diffusers() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    model, tensors, _ = load_sit()
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=torch.linspace(1, 0.1, 10).tolist())
    x = tensors["in.z"]
    with torch.no_grad():
        for time in scheduler.timesteps:  # noise is at 1,000 there, and velocity points to it
            velocity = model(x, 1 - time.expand(len(x)) / 1000, tensors["in.z_y"])
            x = scheduler.step(-velocity, time, x).prev_sample
    assert_close_rel(samples("euler", 10, guided=False)[-1], x, MULTI_STEP)
