"""What is measured is what it says."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import tinyfusion_core as tiny
from small_run import digits_task
from tinyfusion_core.evaluation.generation import sample_rows, training_conditions
from tinyfusion_core.evaluation.metrics import count_flops
from tinyfusion_dit import DiT, GaussianDiffusion
from tinyfusion_images import Digits
from toys import Match, Planted, planted_data

TRAINER = tiny.Trainer(batch_size=8, precision="fp32", seed=0)


def test_held_out_loss_is_the_mean_of_fixed_draws_at_any_batch_size() -> None:
    task = tiny.Task(backbone=Planted(), loss=Match(), train=planted_data(), held_out=planted_data(20))
    models = {"teacher": task.teacher, "pruned": tiny.prune(task, tiny.Keep([1, 3])(task, TRAINER))}
    found = [
        {m.name: m.values for m in tiny.evaluate(task, models, [tiny.HeldOutLoss(draws=2, batch_size=size)], trainer)}
        for size, trainer in ((20, TRAINER), (7, tiny.Trainer(batch_size=3, precision="fp32", seed=5)))
    ]
    assert found[0]["held-out loss"] == pytest.approx(found[1]["held-out loss"], rel=1e-6)
    assert found[0]["held-out loss"]["teacher"] == pytest.approx(0, abs=1e-9)
    assert found[0]["held-out loss"]["pruned"] > 0.01


def test_flops_of_a_linear_layer_are_two_for_a_multiply_add() -> None:
    backbone = Planted(scales=(1, 1, 1))
    assert count_flops(backbone, Match(), backbone.config()) == 3 * 2 * 8 * 8


def test_flops_of_attention_are_counted() -> None:
    # 4 T^2 D for a block's attention products, besides its linear layers.
    sizes = {"input_size": 8, "patch_size": 2, "in_channels": 1, "hidden_size": 32, "depth": 3, "num_heads": 4}
    backbone = DiT(**sizes, num_classes=10, learn_sigma=False)
    tokens, width, depth = 16, 32, 3
    per_token = 2 * (3 * width * width + width * width + 2 * 4 * width * width)
    blocks = depth * (tokens * per_token + 4 * tokens**2 * width + 2 * 6 * width * width)
    patches = 2 * tokens * width * 4
    head = tokens * 2 * width * 4 + 2 * 2 * width * width
    time_embedding = 2 * (256 * width + width * width)
    counted = count_flops(backbone, GaussianDiffusion(learn_sigma=False), backbone.config())
    assert counted == blocks + patches + head + time_embedding


def test_a_network_that_cannot_run_on_the_meta_device_says_so() -> None:
    @dataclass(frozen=True)
    class Reads(Match):
        def predict(self, model, inputs):
            return super().predict(model, inputs) * inputs["x"].sum().item()

    why = count_flops(Planted(), Reads(), Planted().config())
    assert isinstance(why, str)
    assert "cannot be counted on the meta device" in why


class Copy(GaussianDiffusion):
    """Hands out real training images, or nonsense."""

    def sample(self, model, like, labels, rng):
        images = Digits().train().columns
        model.asked.extend(labels.tolist())
        picked = [next(i for i in range(37 * n, 1500) if images["y"][i] == y) for n, y in enumerate(labels % 10)]
        x = images["x"][picked]
        return x if model.good else torch.full_like(x, float("nan"))


def test_frechet_distance_and_accuracy_know_real_images_from_none() -> None:
    task = digits_task(sampling_steps=4)
    task.loss = Copy(learn_sigma=False)
    real, broken = nn.Linear(1, 1), nn.Linear(1, 1)
    real.good, broken.good = True, False
    real.asked, broken.asked = [], []
    metric = tiny.Frechet(num_samples=40, batch_size=30)
    distance, accuracy = metric(task, {"real": real, "broken": broken}, TRAINER)
    assert accuracy.values["real"] > 0.95
    assert real.asked == broken.asked == task.train.__getitems__(list(range(40)))["y"].tolist()
    assert 0 <= distance.values["real"] < 60  # 40 samples are few for 32 features
    assert (distance.values["broken"], accuracy.values["broken"]) == (None, None)
    noise = digits_task(sampling_steps=4)
    noise.loss = GaussianDiffusion(learn_sigma=False, sampler="ddim", sampling_steps=2, guided_channels=None)
    far, _ = metric(noise, {"untrained": noise.backbone.construct(noise.backbone.config()).eval()}, TRAINER)
    assert far.values["untrained"] > 2 * distance.values["real"]


def test_generated_examples_do_not_depend_on_the_batch() -> None:
    task = digits_task(sampling_steps=4)
    labels = training_conditions(task, range(6))
    assert labels.tolist() == task.train.__getitems__(list(range(6)))["y"].tolist()

    def made(rows: range, trainer: tiny.Trainer = TRAINER) -> Tensor:
        return sample_rows(task, task.teacher, trainer, rows, labels[rows.start : rows.stop])

    whole = made(range(6))
    assert torch.allclose(whole, torch.cat([made(range(4)), made(range(4, 6))]), atol=1e-5)
    other = tiny.Trainer(batch_size=8, precision="fp32", seed=1)
    assert not torch.allclose(whole, made(range(6), other), atol=1e-2)


def test_latency_is_measured_for_every_model() -> None:
    task = digits_task(sampling_steps=4)
    models = {"teacher": task.teacher, "pruned": tiny.prune(task, tiny.Keep([0])(task, TRAINER))}
    latency, throughput = tiny.Latency(batch_size=16, rounds=3)(task, models, TRAINER)
    assert latency.unit == "ms"
    for name in models:
        assert latency.values[name] > 0
        assert throughput.values[name] == pytest.approx(16e3 / latency.values[name])
    assert f"batch 16, cpu, {torch.get_num_threads()} threads" in latency.note


def test_a_figure_that_is_not_finite_is_left_out_and_said() -> None:
    @dataclass(frozen=True)
    class Explodes(Match):
        def loss(self, prediction, inputs):
            return super().loss(prediction, inputs) * math.inf

    task = tiny.Task(backbone=Planted(), loss=Explodes(noise=1.0), train=planted_data(), held_out=planted_data(8))
    student = tiny.prune(task, tiny.Keep([0])(task, TRAINER))
    row = tiny.evaluate(task, {"pruned": student}, [tiny.HeldOutLoss(draws=1)], TRAINER)[-1]
    assert row.values == {"pruned": None}
    assert "not finite: pruned" in row.note
