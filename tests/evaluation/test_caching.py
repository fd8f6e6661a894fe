"""What blocks change is reused where a schedule says so, and nowhere else."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tinyfusion_core as tiny
from small_run import digits_task
from tinyfusion_core.evaluation.caching import Profile, Reusing, check_repeats, computed_share, profiled
from tinyfusion_core.evaluation.generation import sample_rows, training_conditions
from tinyfusion_core.protocols.task import Task
from tinyfusion_dit import GaussianDiffusion
from tinyfusion_mar import MAR, MaskedTokenDiffusion
from tinyfusion_sit import FlowMatching, SiT
from toys import Chain, DoubleNet

TRAINER = tiny.Trainer(batch_size=8, precision="fp32", seed=3)


@dataclass(frozen=True)
class Walk(tiny.LossAdapter):
    """Runs the network on what it has returned, at ever larger scales, as a sampler would."""

    steps: int = 3

    def predict(self, model, inputs):
        return model(inputs["x"])

    def loss(self, prediction, inputs):
        return prediction.flatten(1).square().mean(1)

    def sample(self, model, like, conditions, rng):
        x = rng.normal("x", like)
        for i in range(self.steps):
            x = model((1 + i) * x)
        return x


def walk(model: nn.Module, steps: int = 3, **options: Any) -> tiny.Task:
    x = torch.zeros(9, 8)
    task = tiny.wrap(model.eval(), blocks="blocks.*", loss_fn=lambda m, b: b["x"].sum(1), data={"x": x}, **options)
    return replace(task, loss=Walk(steps), train=tiny.Tensors({"x": x, "y": torch.arange(9)}))


def chain(*scales: float) -> Chain:
    torch.manual_seed(0)
    return Chain(8, scales)


def sampled(task: Task, model: nn.Module, rows: range, plan: dict[str, list[bool]] | None = None) -> Tensor:
    if plan is not None:
        task = replace(task, loss=Reusing(task.loss, task.backbone, {model: plan}))
    return sample_rows(task, model, TRAINER, rows, training_conditions(task, rows))


def test_a_schedule_reuses_what_differs_by_less_than_the_threshold() -> None:
    inf = math.inf
    # Of two lists with two blocks; errors to one call before, and to two calls before.
    a = torch.tensor([[inf, inf], [0.1, inf], [0.1, 0.3], [0.1, 0.1], [0.1, 0.1], [0.1, 0.1]])
    b = torch.tensor([[inf, inf], [inf, inf], [0.5, 0.1], [0.1, 0.1], [inf, 0.1], [0.1, 0.1]])
    profile = Profile(["a.0", "a.1", "b.0", "b.1"], torch.stack([a, 3 * a, b, b]))
    plan = profile.schedule(0.25)
    # Means of the first list: 0.2 to one call before; of two calls before 0.6, then 0.2.
    assert plan["a.0"] == plan["a.1"] == [True, False, True, False, False, True]  # two in a row are the most
    assert plan["b.0"] == plan["b.1"] == [True, True, True, False, False, True]
    assert computed_share(plan) == pytest.approx(14 / 24)
    assert all(all(computed) for computed in profile.schedule(0).values())
    exact = Profile(["a.0"], torch.zeros(1, 4, 2))
    assert exact.schedule(0)["a.0"] == [True] * 4  # 0 reuses not even what does not change
    assert exact.schedule(1e-9)["a.0"] == [True, False, False, True]
    assert Profile(["a.0"], torch.full((1, 3, 2), math.nan)).schedule(9)["a.0"] == [True] * 3


def test_a_reused_change_is_added_to_the_stream_of_now() -> None:
    model = chain(0.5, 2.0)
    task, (first, second) = walk(model), model.blocks
    plan = {"blocks.0": [True, True, False], "blocks.1": [True, False, True]}
    with torch.no_grad():
        x = tiny.Rng(3, "generate").normal("x", torch.zeros(9, 8))
        h = first(x)
        y = second(h)
        change = y - h  # of the second block in the first call
        h = first(2 * y)
        kept = h - 2 * y
        y = h + change
        expected = second(3 * y + kept)
    assert torch.equal(sampled(task, model, range(9), plan), expected)
    assert torch.equal(sampled(task, model, range(9)), sampled(task, model, range(9), dict.fromkeys(plan, [True] * 3)))
    assert "forward" not in vars(first)
    # Calls that no schedule knows of are computed.
    longer = replace(task, loss=Walk(4))
    some = {path: [True, True, True] for path in plan}
    assert torch.equal(sampled(longer, model, range(9)), sampled(longer, model, range(9), some))


def test_streams_beside_each_other_are_reused_each() -> None:
    streams = [tiny.Stream("hidden", 1), tiny.Stream("encoder", 0)]
    torch.manual_seed(0)
    net = DoubleNet(depth=2).eval()

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks, self.net = net.blocks, net

        def forward(self, x: Tensor) -> Tensor:
            return net(x[:, None], 2 * x[:, None]).mean(1)

    model = Both()
    task = walk(model, 2, streams=streams)
    with torch.no_grad():
        x = tiny.Rng(3, "generate").normal("x", torch.zeros(9, 8))
        hidden, encoder, changes = x[:, None], 2 * x[:, None], []
        for block in net.blocks:
            e, h = block(hidden, encoder)
            changes.append((h - hidden, e - encoder))
            hidden, encoder = h, e
        x = 2 * torch.cat([hidden, encoder], dim=1).mean(1)
        hidden, encoder = x[:, None], 2 * x[:, None]
        for h, e in changes:
            hidden, encoder = hidden + h, encoder + e
        expected = torch.cat([hidden, encoder], dim=1).mean(1)
    plan = {f"blocks.{i}": [True, False] for i in range(2)}
    assert torch.equal(sampled(task, model, range(9), plan), expected)


def test_samples_may_be_in_any_dimension_of_a_stream() -> None:
    class Turned(nn.Module):
        def __init__(self, blocks: nn.ModuleList, dim: int) -> None:
            super().__init__()
            self.blocks, self.dim = blocks, dim

        def forward(self, x: Tensor) -> Tensor:
            h = torch.stack([x, x.flip(1), 2 * x], dim=1 - self.dim)
            for block in self.blocks:
                h = block(h)
            return h.mean(1 - self.dim)

    blocks, found = chain(0.5, 2.0).blocks, []
    for dim in (0, 1):
        model = Turned(blocks, dim).eval()
        task = walk(model, streams=[tiny.Stream(batch_dim=dim)])
        profile = profiled(task, model, TRAINER, 4, 2)
        found.append((profile.errors, sampled(task, model, range(5), profile.schedule(9.0))))
    (errors, made), (errors_turned, made_turned) = found
    assert torch.allclose(errors, errors_turned, rtol=1e-5)
    assert torch.allclose(made, made_turned, rtol=1e-5)


def test_errors_are_relative_differences_of_changes() -> None:
    model = chain(0.5, 2.0)
    with torch.no_grad():
        x = tiny.Rng(3, "cache calibration").normal("x", torch.zeros(5, 8))
        changes: list[list[Tensor]] = [[], []]
        for i in range(3):
            x = (1 + i) * x
            for block, found in zip(model.blocks, changes, strict=True):
                y = block(x)
                found.append(y - x)
                x = y
    profile = profiled(walk(model), model, TRAINER, 5, 2)
    assert profile.blocks == ["blocks.0", "blocks.1"]
    for errors, found in zip(profile.errors, changes, strict=True):
        for call, lag in ((1, 1), (2, 1), (2, 2)):
            off = (found[call] - found[call - lag]).abs().sum(1) / found[call].abs().sum(1)
            assert float(errors[call, lag - 1]) == pytest.approx(float(off.mean()), rel=1e-5)
        assert errors.isinf().tolist() == [[True, True], [False, True], [False, False]]
    nothing = chain(0.0, 0.0)
    still = profiled(walk(nothing), nothing, TRAINER, 2, 1)
    assert still.errors[:, 1:].tolist() == [[[0], [0]]] * 2  # a block that does nothing does the same again


SAMPLERS = {
    "DDPM, guided": lambda: guided_digits(),
    "DDIM": lambda: digits_task(6),
    "ODE": lambda: of(SiT.tiny(), FlowMatching(sampler="heun", sampling_steps=3, cfg_scale=1.5)),
    "SDE": lambda: of(SiT.tiny(), FlowMatching(sampler="sde", sampling_steps=6)),
    "MAR": lambda: of(MAR.tiny(), MaskedTokenDiffusion(num_iter=5, sampling_steps=4)),
    "MAR, guided": lambda: of(MAR.tiny(), MaskedTokenDiffusion(num_iter=5, sampling_steps=4, cfg_scale=2.0)),
}


def guided_digits() -> tiny.Task:
    return replace(digits_task(), loss=GaussianDiffusion(learn_sigma=False, sampling_steps=6, cfg_scale=2.0))


def of(backbone: tiny.Backbone, loss: tiny.LossAdapter) -> tiny.Task:
    examples = tiny.Tensors(backbone.example(8))
    return tiny.Task(backbone=backbone, loss=loss, train=examples, held_out=examples)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_takes_caches_and_without_them_is_what_it_was(name: str) -> None:
    task = SAMPLERS[name]()
    model = task.teacher.eval()
    profile = profiled(task, model, TRAINER, 4, 3)
    plain = sampled(task, model, range(6))
    assert torch.equal(plain, sampled(task, model, range(6), profile.schedule(0)))
    plan = profile.schedule(5.0)
    assert computed_share(plan) < 0.9
    cached = sampled(task, model, range(6), plan)
    assert not torch.allclose(cached, plain, rtol=0, atol=1e-4)
    # A row does not depend on its neighbours, nor on how many there are.
    parts = [sampled(task, model, rows, plan) for rows in (range(4), range(4, 6))]
    assert torch.allclose(cached, torch.cat(parts), rtol=1e-4, atol=1e-4)
    again = profiled(task, model, TRAINER, 4, 3)
    assert torch.equal(again.errors, profile.errors)


def test_what_mar_sees_changes_and_is_never_reused() -> None:
    task = SAMPLERS["MAR, guided"]()
    profile = profiled(task, task.teacher.eval(), TRAINER, 4, 3)
    encoder = [path.startswith("encoder") for path in profile.blocks]
    assert profile.errors.shape == (7, 5, 3)  # a call in each of 5 rounds, with guidance as without
    assert profile.errors[encoder].isinf().all()
    assert profile.errors[[not part for part in encoder], 1:, 0].isfinite().all()
    plan = profile.schedule(1e9)
    assert plan["encoder_blocks.0"] == [True] * 5
    assert plan["decoder_blocks.0"] == [True, False, False, False, True]


def test_a_student_has_a_schedule_of_its_own() -> None:
    task = digits_task(4)
    student = tiny.prune(task, tiny.Keep([0, 6])(task, TRAINER))
    profile = profiled(task, student, TRAINER, 4, 2)
    assert profile.blocks == ["blocks.0", "blocks.1"]
    assert torch.isfinite(sampled(task, student, range(3), profile.schedule(0.5))).all()


def test_what_cannot_be_reused_is_refused() -> None:
    model = chain(0.5, 2.0)
    with pytest.raises(tiny.UserError, match=r"^loss: Walk .*runs each block once for a sample.*in more steps"):
        profiled(walk(model, 1), model, TRAINER, 2, 3)
    with pytest.raises(tiny.UserError, match="cannot generate"):
        profiled(replace(walk(model), loss=NoSampling()), model, TRAINER, 2, 3)

    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.add_(1)

    model.blocks[0] = InPlace()
    with pytest.raises(tiny.UserError, match=r"block 'blocks.0' changes its input in place"):
        profiled(walk(model), model, TRAINER, 2, 3)


class NoSampling(Walk):
    sample = tiny.LossAdapter.sample


@pytest.mark.parametrize(
    ("backbone", "loss", "fine"),
    [
        (SiT, FlowMatching(sampler="euler", sampling_steps=1), False),
        (SiT, FlowMatching(sampler="euler", sampling_steps=1, cfg_scale=2.0), False),
        (SiT, FlowMatching(sampler="heun", sampling_steps=1), True),  # two calls
        (MAR, MaskedTokenDiffusion(num_iter=1, cfg_scale=2.0), False),
        (MAR, MaskedTokenDiffusion(num_iter=2), True),
    ],
)
def test_a_plan_knows_samplers_of_one_step(backbone: Any, loss: tiny.LossAdapter, fine: bool) -> None:
    tiny_one = backbone.tiny()
    with torch.device("meta"):
        model = tiny_one.construct(tiny_one.config())
    task = tiny.Task.without_data(tiny_one, loss, model)
    if fine:
        check_repeats(task)
    else:
        with pytest.raises(tiny.UserError, match="runs each block once for a sample"):
            check_repeats(task)
