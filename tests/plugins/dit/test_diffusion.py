"""Gaussian diffusion against the reference's numbers, live diffusers, and cases with known answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import golden_data
from diffusion_reference import BASE, EXACT, FORWARD, GRADIENT, kept_steps, load_dit
from golden_data import assert_close_rel, weights
from tinyfusion_core.errors import UserError
from tinyfusion_core.runtime.seeding import Rng
from tinyfusion_dit import DiT, GaussianDiffusion
from tinyfusion_dit.process import (
    Process,
    approximate_cdf,
    discretized_log_likelihood,
    even_steps,
    linear_betas,
    normal_kl,
    strided_steps,
)

pytestmark = pytest.mark.numerics

# Tables and formulas


def cosine_betas() -> np.ndarray[Any, np.dtype[np.float64]]:
    """The other common schedule (arXiv 2102.09672): respacing must hold for any."""
    a = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - a[1:] / a[:-1], 0.999)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_tables(schedule: str) -> None:
    tensors, _ = golden_data.load("diffusion_math")
    betas = linear_betas(1000) if schedule == "linear" else cosine_betas()
    for tag, steps in {
        "": list(range(1000)),
        **{f".respaced_{s}": kept_steps(s) for s in ("10", "25", "ddim10")},
    }.items():
        process = Process.respaced(betas, steps)
        assert process.steps.tolist() == steps
        tables = {
            "betas": process.betas,
            "alphas_cumprod": process.a,
            "posterior_log_variance_clipped": process.log_variance,
            "posterior_mean_coef1": process.c1,
            "posterior_mean_coef2": process.c2,
        }
        stored = {k: v for k, v in tables.items() if f"{schedule}1000{tag}.{k}" in tensors}
        assert len(stored) == (5 if tag else 3)
        for name, table in stored.items():
            expected = tensors[f"{schedule}1000{tag}.{name}"]
            # Entry by entry: the small ones are the ones that cancellation would spoil.
            np.testing.assert_allclose(table, expected.numpy(), rtol=2e-11)


def test_kept_steps() -> None:
    tensors, config = golden_data.load("diffusion_math")
    for spec in config["respacings"]:
        assert kept_steps(spec) == tensors[f"timestep_map.{spec}"].tolist()
    sampling, _ = golden_data.load("sampling_dit_small")
    assert kept_steps("10") == sampling["timestep_map"].tolist() == list(range(0, 1000, 111))
    assert kept_steps("ddim10") == sampling["timestep_map_ddimspacing"].tolist()
    with pytest.raises(UserError, match=r"no integer stride keeps exactly 300 of 1000"):
        strided_steps(1000, 300)
    with pytest.raises(UserError, match=r"cannot keep 501 of 500"):
        even_steps(1000, 501, 1)


@pytest.mark.parametrize(("dtype", "prefix", "tol"), [(torch.float32, "", FORWARD), (torch.float64, "f64.", 1e-10)])
def test_densities(dtype: torch.dtype, prefix: str, tol: float) -> None:
    stored, _ = golden_data.load("diffusion_math")
    tensors = {k: v.to(dtype) for k, v in stored.items() if k.startswith("in.")}
    kl = normal_kl(*(tensors[f"in.kl_{name}"] for name in ("mean1", "logvar1", "mean2", "logvar2")))
    assert_close_rel(kl, stored[f"{prefix}kl"], tol)
    assert_close_rel(approximate_cdf(tensors["in.nll_z"]), stored[f"{prefix}nll.cdf"], tol)
    log_prob = discretized_log_likelihood(tensors["in.nll_x"], tensors["in.nll_mean"], tensors["in.nll_log_scale"])
    # In float32 the difference of two distribution functions has no digits left where it is tiny: log(1e-12) or
    # log(6e-8) is a matter of luck there.
    reliable = stored["f64.nll.log_prob"] > (-6 if dtype == torch.float32 else -torch.inf)
    assert reliable.sum() > 20
    assert_close_rel(log_prob[reliable], stored[f"{prefix}nll.log_prob"][reliable], tol)


# The losses of the reference


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.usefixtures("reference_sinusoid")
def test_loss_and_gradients(precision: str) -> None:
    dtype, prefix = getattr(torch, precision), "f64." if precision == "float64" else ""
    tensors, config = golden_data.load("dit_small")
    model = load_dit(config["model"], weights(tensors), dtype)
    x_start, noise = tensors["in.loss_x_start"].to(dtype), tensors["in.loss_noise"].to(dtype)
    t = tensors["in.loss_t"]
    inputs = {"x_start": x_start, "noise": noise, "t": t, "y": tensors["in.loss_y"], "drop": torch.zeros_like(t) > 0}
    inputs["x_t"] = BASE.diffuse(x_start, t, noise)
    assert_close_rel(inputs["x_t"], tensors["loss.x_t"], FORWARD)

    objective = GaussianDiffusion()
    prediction = objective.predict(model, inputs)
    e, v = prediction.chunk(2, dim=1)
    mean, log_variance, pred_xstart = BASE.reverse(e, v, inputs["x_t"], t)
    true_mean, true_log_variance = BASE.posterior(x_start, inputs["x_t"], t)
    for name, value in {
        "mean": mean,
        "log_variance": log_variance,
        "pred_xstart": pred_xstart,
        "true_mean": true_mean,
        "true_log_variance": true_log_variance.flatten(),
    }.items():
        assert_close_rel(value, tensors[f"pmv.{name}"], FORWARD)

    loss = objective.loss(prediction, inputs)
    mse = GaussianDiffusion(learn_sigma=False).loss(prediction, inputs)
    tol = EXACT if prefix else FORWARD
    for name, value in {"loss": loss, "mse": mse, "vb": loss - mse}.items():
        assert_close_rel(value, tensors[f"{prefix}loss.{name}"], tol)

    loss.mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert list(gradients) == config["grad_names"]
    norms = torch.stack([g.double().norm() for g in gradients.values() if g is not None])
    tol = EXACT if prefix else GRADIENT
    assert_close_rel(norms, tensors[f"{prefix}grad.norms"], tol)
    assert_close_rel(norms.norm(), tensors[f"{prefix}grad.total_norm"], tol)
    full = [key for key in tensors if key.startswith("grad.full.")]
    assert len(full) == 7
    for key in full:
        gradient = gradients[key.removeprefix("grad.full.")]
        assert gradient is not None
        assert_close_rel(gradient, tensors[key], GRADIENT)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.usefixtures("reference_sinusoid")
def test_distillation_distance(mode: str, precision: str) -> None:
    dtype, prefix = getattr(torch, precision), "f64." if precision == "float64" else ""
    tensors, config = golden_data.load("kd_small")
    student, teacher = (load_dit(config[k], weights(tensors, f"w.{k}."), dtype) for k in ("student", "teacher"))
    x_start, noise, t = tensors["in.x_start"].to(dtype), tensors["in.noise"].to(dtype), tensors["in.t"]
    drop = tensors["in.drop_rand"] < (0.1 if mode == "train" else 0)
    inputs = {"x_start": x_start, "noise": noise, "x_t": BASE.diffuse(x_start, t, noise), "t": t, "y": tensors["in.y"]}
    objective, plain = GaussianDiffusion(), GaussianDiffusion(learn_sigma=False)
    with torch.no_grad():
        ours, theirs = (objective.predict(model, inputs | {"drop": drop}) for model in (student, teacher))
        distance, loss = objective.distance(ours, theirs, inputs), objective.loss(ours, inputs)
        mse = plain.loss(ours, inputs)
        results = {
            "kd_loss": distance,
            "vb_kd": distance - plain.distance(ours, theirs, inputs),
            "gt": loss,
            "mse": mse,
            "vb": loss - mse,
        }
    for name, value in results.items():
        assert_close_rel(value, tensors[f"{prefix}{mode}.{name}"], EXACT if prefix else FORWARD)


def test_distance_to_itself_is_nothing_and_trains_only_v_through_the_bound() -> None:
    objective, batch = GaussianDiffusion(label_drop=0.0), DiT.tiny().example(4)
    inputs = objective.prepare(batch, Rng(0, "test")) | {"t": torch.tensor([1, 10, 500, 999])}
    prediction = torch.randn(4, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    assert objective.distance(prediction, prediction, inputs).abs().max() < 1e-6
    student = (prediction + 0.5).requires_grad_()
    (objective.distance(student, prediction, inputs) - (0.5 * torch.ones(4))).mean().backward()
    assert student.grad is not None
    # The noise half feels the squared error alone: 2 * 0.5, over 4 rows of 256 entries.
    assert_close_rel(student.grad[:, :4], torch.full((4, 4, 8, 8), 1.0 / (4 * 256)), 1e-5)
    assert (student.grad[:, 4:] != 0).any()


# The samplers of the reference


# The adapter


def batch_of(num_rows: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(8, 4, 8, 8, generator=generator)[:num_rows]
    return {"x": x, "y": torch.arange(8)[:num_rows], "x_std": torch.rand(8, 4, 8, 8, generator=generator)[:num_rows]}


def test_prepare_is_a_function_of_the_row() -> None:
    objective, before = GaussianDiffusion(label_drop=0.5), torch.random.get_rng_state()
    whole = objective.prepare(batch_of(8), Rng(1, "train", step=3))
    assert torch.equal(torch.random.get_rng_state(), before)
    rest = objective.prepare({k: v[3:] for k, v in batch_of(8).items()}, Rng(1, "train", step=3, first=3))
    other = objective.prepare(batch_of(8), Rng(1, "train", step=4))
    assert set(whole) == {"x_start", "noise", "x_t", "t", "y", "drop"}
    for name, value in whole.items():
        assert torch.equal(rest[name], value[3:])
        assert name == "y" or not torch.equal(other[name], value)


def test_prepare_noises_what_it_drew() -> None:
    batch = batch_of(8)
    inputs = GaussianDiffusion().prepare(batch, Rng(1, "train"))
    a = torch.from_numpy(BASE.a)[inputs["t"]].view(-1, 1, 1, 1)
    assert_close_rel(inputs["x_t"], a.sqrt() * inputs["x_start"] + (1 - a).sqrt() * inputs["noise"], 1e-6)
    standard = (inputs["x_start"] - batch["x"]) / batch["x_std"]
    assert abs(standard.std() - 1) < 0.1
    del batch["x_std"]
    assert torch.equal(GaussianDiffusion().prepare(batch, Rng(1, "train"))["x_start"], batch["x"])


def test_frequencies_of_times_and_drops() -> None:
    batch = {"x": torch.zeros(4000, 1, 1, 1), "y": torch.zeros(4000, dtype=torch.long)}
    inputs = GaussianDiffusion(num_timesteps=50, sampling_steps=50, label_drop=0.25).prepare(batch, Rng(0, "train"))
    assert inputs["t"].unique().tolist() == list(range(50))
    assert abs(inputs["t"].float().mean() - 24.5) < 1
    assert abs(inputs["drop"].float().mean() - 0.25) < 0.03
    assert not GaussianDiffusion(label_drop=0.0).prepare(batch, Rng(0, "train"))["drop"].any()


def test_dropped_labels_reach_the_network_as_the_null_class() -> None:
    model, objective = DiT.tiny().build(), GaussianDiffusion(label_drop=0.5)
    inputs = objective.prepare(batch_of(8), Rng(1, "train"))
    assert 0 < inputs["drop"].sum() < 8
    expected = model(inputs["x_t"], inputs["t"], torch.where(inputs["drop"], 10, inputs["y"]))
    assert torch.equal(objective.predict(model, inputs), expected)


def test_networks_without_a_null_class_or_variance() -> None:
    config = DiT.tiny().config() | {"class_dropout_prob": 0.0, "learn_sigma": False}
    model, rng = DiT.construct(config), Rng(1, "train")
    inputs = GaussianDiffusion().prepare(batch_of(2), rng)
    with pytest.raises(UserError, match=r"no class for dropped labels"):
        GaussianDiffusion().predict(model, inputs)
    with pytest.raises(UserError, match=r"no class for dropped labels"):
        GaussianDiffusion(cfg_scale=2.0, sampling_steps=2).sample(model, inputs["x_t"], inputs["y"], rng)
    objective = GaussianDiffusion(label_drop=0.0, learn_sigma=False, sampling_steps=2)
    prediction = objective.predict(model, inputs)
    assert torch.equal(objective.loss(prediction, inputs), (inputs["noise"] - prediction).square().flatten(1).mean(1))
    assert objective.sample(model, inputs["x_t"], inputs["y"], rng).shape == (2, 4, 8, 8)
    with pytest.raises(UserError, match=r"^learn_sigma is true, but the network has 4 output channels"):
        GaussianDiffusion().loss(prediction, inputs)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_timesteps", 20, r"^num_timesteps is 20; the linear schedule needs at least 21"),
        ("sampling_steps", 1, r"^sampling_steps is 1; expected 2 to 1000"),
        ("sampling_steps", 1001, r"^sampling_steps is 1001; expected 2 to 1000"),
        ("label_drop", 1.5, r"^label_drop is 1\.5; expected a probability"),
    ],
)
def test_impossible_settings(field: str, value: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        GaussianDiffusion(**{field: value})
