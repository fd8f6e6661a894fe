"""Objectives on the processes of diffusers' schedulers, and the latents and prompts that they learn from."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import tinyfusion_core as tiny
from tinyfusion_core.runtime.seeding import Rng
from tinyfusion_diffusers import EncodedPrompts, RectifiedFlow, ScheduledDiffusion

pytestmark = [pytest.mark.numerics, pytest.mark.filterwarnings("ignore")]  # of other libraries

ROWS = 6


def batch() -> dict[str, Tensor]:
    return {"x": torch.randn(ROWS, 4, 8, 8), "y": torch.arange(ROWS), "text": torch.randn(ROWS, 5, 12)}


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", ["DDPMScheduler", "CogVideoXDDIMScheduler"])
def test_noise_and_v_are_the_schedulers(name: str, prediction: str) -> None:
    settings = {"beta_schedule": "scaled_linear", "prediction_type": prediction}
    loss = ScheduledDiffusion(scheduler=name, settings=settings)
    clean = batch()
    inputs = loss.prepare(clean, Rng(0, "test"))
    noise = Rng(0, "test").normal("noise", clean["x"])
    scheduler = getattr(diffusers, name)(**settings)
    assert torch.allclose(inputs["x_t"], scheduler.add_noise(clean["x"], noise, inputs["t"]), atol=1e-6)
    target = noise if prediction == "epsilon" else scheduler.get_velocity(clean["x"], noise, inputs["t"])
    assert torch.allclose(inputs["target"], target, atol=1e-6)
    assert ScheduledDiffusion(
        scheduler=name, settings={**settings, "prediction_type": "epsilon"}, prediction=prediction
    )
    assert len(set(inputs["t"].tolist())) > 1


def test_the_flow_is_the_schedulers() -> None:
    loss = RectifiedFlow(time="uniform", shift=3.0)
    clean = batch()
    inputs = loss.prepare(clean, Rng(0, "test"))
    noise = Rng(0, "test").normal("noise", clean["x"])
    t = inputs["t"].view(-1, 1, 1, 1)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    # The scheduler shifts the sigmas of evenly spaced times just so.
    even = torch.linspace(1, 1000, 1000).flip(0) / 1000
    assert torch.allclose(scheduler.sigmas, 3 * even / (1 + 2 * even), atol=1e-6)
    u = Rng(0, "test").uniform("time", ROWS).float()
    assert torch.allclose(inputs["t"], 3 * u / (1 + 2 * u), atol=1e-6)
    assert torch.allclose(inputs["x_t"], (1 - t) * clean["x"] + t * noise, atol=1e-6)
    assert torch.allclose(inputs["target"], noise - clean["x"], atol=1e-6)
    # One step along the target, from anywhere to the data.
    assert torch.allclose(inputs["x_t"] - t * inputs["target"], clean["x"], atol=1e-5)


def test_times_are_logit_normal() -> None:
    loss = RectifiedFlow(mean=0.5, std=0.8)
    t = loss.prepare({"x": torch.zeros(4000, 1)}, Rng(0, "test"))["t"].double()
    logits = torch.logit(t)
    assert abs(float(logits.mean()) - 0.5) < 4 * 0.8 / math.sqrt(4000)
    assert abs(float(logits.std()) - 0.8) < 0.04
    even = loss.prepare({"x": torch.zeros(4000, 1)}, Rng(0, "test", strata=4000))["t"].double()
    expected = 0.5 + 0.8 * torch.distributions.Normal(0, 1).icdf((torch.arange(4000, dtype=torch.float64) + 0.5) / 4000)
    assert float((torch.logit(even).sort().values - expected)[5:-5].abs().max()) < 0.1


@pytest.mark.parametrize("loss", [RectifiedFlow(label_drop=0.5), ScheduledDiffusion(label_drop=0.5)])
def test_losses_are_per_sample_and_prepare_is_silent(loss: Any) -> None:
    clean = batch()
    state = torch.random.get_rng_state()
    inputs = loss.prepare(clean, Rng(3, "test", step=2))
    again = loss.prepare(clean, Rng(3, "test", step=2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert inputs.keys() == again.keys() == {"x_t", "target", "t", "y", "text", "drop"}
    assert all(torch.equal(inputs[name], again[name]) for name in inputs)
    part = loss.prepare({name: v[2:] for name, v in clean.items()}, Rng(3, "test", step=2, first=2))
    assert all(torch.equal(part[name], inputs[name][2:]) for name in inputs)
    right = inputs["target"]
    assert torch.equal(loss.loss(right, inputs), torch.zeros(ROWS))
    wrong = right + torch.arange(ROWS).view(-1, 1, 1, 1)
    assert torch.allclose(loss.loss(wrong, inputs), torch.arange(ROWS).float().square(), atol=1e-4)
    # A variance beside the noise: not trained by the data, compared with the teacher's.
    with_variance = torch.cat([right, torch.ones_like(right)], 1)
    assert torch.equal(loss.loss(with_variance, inputs), torch.zeros(ROWS))
    other = torch.cat([right, 3 * torch.ones_like(right)], 1)
    assert torch.allclose(loss.distance(with_variance, other, inputs), torch.full((ROWS,), 2.0))
    assert loss.loss(right.bfloat16(), inputs).dtype == torch.float32


def test_latents_are_drawn_from_their_moments() -> None:
    clean = {"x": torch.randn(ROWS, 4, 8, 8), "x_std": torch.full((ROWS, 4, 8, 8), 0.1)}
    inputs = RectifiedFlow().prepare(clean, Rng(0, "test"))
    drawn = clean["x"] + 0.1 * Rng(0, "test").normal("latent", clean["x"])
    assert torch.allclose(inputs["target"], Rng(0, "test").normal("noise", drawn) - drawn, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ScheduledDiffusion(scheduler="DDMPScheduler"), "has no 'DDMPScheduler'; did you mean 'DDPMScheduler'"),
        (lambda: ScheduledDiffusion(scheduler="AutoencoderKL"), "has no 'AutoencoderKL'"),
        (lambda: ScheduledDiffusion(scheduler="FlowMatchEulerDiscreteScheduler"), "for a flow use RectifiedFlow"),
        (lambda: ScheduledDiffusion(settings={"beta_scedule": "linear"}), "DDPMScheduler refuses them"),
        (
            lambda: ScheduledDiffusion(settings={"prediction_type": "sample"}),
            "prediction is 'sample'; expected",
        ),
        (lambda: ScheduledDiffusion(label_drop=2.0), "label_drop is 2.0; expected a probability"),
        (lambda: RectifiedFlow(shift=0.0), "shift is 0.0"),
        (lambda: RectifiedFlow(std=0.0), "std is 0.0"),
        (lambda: RectifiedFlow(guidance=-1.0), "guidance is -1.0"),
    ],
)
def test_wrong_options(make: Any, message: str) -> None:
    with pytest.raises(tiny.UserError) as e:
        make()
    assert message in str(e.value)


COLUMNS = {
    "x": torch.randn(10, 4, 2, 2),
    "text": torch.randn(10, 3, 5).half(),
    "mask": torch.rand(10, 3) < 0.5,
    "y": torch.arange(10, dtype=torch.int32),
}


def write(folder: Path, numpy: set[str]) -> EncodedPrompts:
    for name in numpy:
        np.save(folder / f"{name}.npy", COLUMNS[name].numpy())
    save_file({name: v for name, v in COLUMNS.items() if name not in numpy}, folder / "rest.safetensors")
    return EncodedPrompts(folder=str(folder), num_held_out=3)


@pytest.mark.parametrize("numpy", [{"x", "text", "mask"}, {"text"}])
def test_encoded_prompts(tmp_path: Path, numpy: set[str]) -> None:
    data = write(tmp_path, numpy)
    train, held_out = data.train(), data.held_out()
    assert (len(train), len(held_out)) == (7, 3)
    rows = torch.cat([part.__getitems__(list(range(len(part))))["y"] for part in (train, held_out)])
    assert sorted(rows.tolist()) == list(range(10))
    some = train.__getitems__([5, 0, 5])
    assert {name: v.dtype for name, v in some.items()} == {
        "x": torch.float32,
        "text": torch.float32,
        "mask": torch.bool,
        "y": torch.int64,
    }
    for name, column in COLUMNS.items():
        assert torch.equal(some[name], column[some["y"]].to(some[name].dtype))
    assert [int(v) for v in some["y"]] == [int(rows[i]) for i in (5, 0, 5)]


def test_only_the_rows_of_a_batch_are_read(tmp_path: Path) -> None:
    import resource

    rows = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, (4000, 64, 32, 32))  # 1 GB, sparse on disk
    rows[7] = 3.0
    del rows
    data = EncodedPrompts(folder=str(tmp_path), num_held_out=1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    samples = data.train()
    positions = [samples.rows.tolist().index(7), 0, 100]
    assert samples.__getitems__(positions)["x"][0].eq(3).all()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def test_wrong_data(tmp_path: Path) -> None:
    def wrong(message: str, read: bool = False, **options: Any) -> None:
        with pytest.raises(tiny.UserError) as e:
            samples = EncodedPrompts(folder=str(tmp_path), **options).train()
            if read:
                samples.__getitems__([0, 1])
        assert message in str(e.value)

    wrong("no x.npy, and no .safetensors file with an 'x'")
    write(tmp_path, {"x"})
    wrong("num_held_out is 10; expected 1 to 9", num_held_out=10)
    np.save(tmp_path / "pooled.npy", np.zeros((9, 2)))
    wrong("'pooled' has shape [9, 2], 'x' has 10 rows", num_held_out=1)
    (tmp_path / "pooled.npy").unlink()
    np.save(tmp_path / "prompt.npy", np.zeros((10, 2)))
    wrong("holds 'prompt'; expected x, x_std, condition, control, y, text, mask", num_held_out=1)
    (tmp_path / "prompt.npy").unlink()
    np.save(tmp_path / "text.npy", np.zeros((10, 2)))
    wrong("'text' is in rest.safetensors too", num_held_out=1)
    np.save(tmp_path / "text.npy", np.array([{}] * 10, dtype=object), allow_pickle=True)
    wrong("text.npy: cut short, or not a .npy file of numbers", num_held_out=1)
    (tmp_path / "text.npy").unlink()
    samples = EncodedPrompts(folder=str(tmp_path), num_held_out=1).train()
    np.save(tmp_path / "x.npy", np.zeros((9, 4, 2, 2), dtype=np.float32))
    with pytest.raises(tiny.UserError, match="has changed to shape"):
        samples.__getitems__([0])
    (tmp_path / "x.npy").unlink()
    with pytest.raises(tiny.UserError, match="no such file"):
        samples.__getitems__([0])
    content = (tmp_path / "rest.safetensors").read_bytes()
    (tmp_path / "rest.safetensors").write_bytes(content[:50])
    wrong("damaged or cut short")
