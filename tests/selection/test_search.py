"""The search finds what does the work, and leaves the network as it was."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import tinyfusion_core as tiny
from marks import slow_but
from tinyfusion_core.errors import UserError
from tinyfusion_core.pruning.weight_update import WeightUpdate
from tinyfusion_core.samplers.base import BlockSampler, Draw
from tinyfusion_core.samplers.grouped import GroupedSampler
from toys import Match, Planted, StopAt, planted_data

UPDATES = [tiny.Frozen(), tiny.LoRA(rank=2, alpha=4), tiny.Full()]
WORKING = [1, 3, 4, 7]


def task(**options) -> tiny.Task:
    return tiny.Task(backbone=Planted(), loss=Match(**options), train=planted_data(), held_out=planted_data(16))


def search(**options) -> tiny.Search:
    return tiny.Search(**{"pattern": (4, 8), "steps": 120, "lr_gates": 1e-2, **options})


TRAINER = tiny.Trainer(batch_size=16, precision="fp32", seed=0)


@pytest.mark.parametrize("update", slow_but(UPDATES, UPDATES[1]))
def test_finds_the_planted_blocks(update: WeightUpdate) -> None:
    decision = search(update=update)(task(), TRAINER)
    assert list(decision.kept) == WORKING
    assert decision.confidence is not None
    assert decision.confidence > 0.9
    assert decision.marginals == pytest.approx([float(i in WORKING) for i in range(8)], abs=0.1)


class Flipped(GroupedSampler):
    """The same sampler with the sign of the gate gradient turned."""

    def sample(self, num_rows: int, rng: tiny.Rng) -> Draw:
        draw = super().sample(num_rows, rng)
        draw.mask.register_hook(torch.neg)
        return draw


def test_fails_when_the_gate_gradient_points_the_other_way() -> None:
    def flipped(lists: dict[str, int]) -> BlockSampler:
        return Flipped(lists, (4, 8))

    decision = search(pattern=None, sampler=flipped, update=tiny.Frozen())(task(), TRAINER)
    assert len(set(decision.kept) & set(WORKING)) <= 1


class LeaveOneOut(GroupedSampler):
    """A score-function estimator: no gradient through the mask, the log-probability times an advantage instead."""

    def sample(self, num_rows: int, rng: tiny.Rng) -> Draw:
        draw = super().sample(num_rows, rng)
        return Draw(draw.mask.detach(), draw.log_prob)

    def surrogate(self, draw: Draw, loss: Tensor) -> Tensor:
        advantage = (loss - loss.mean()).detach() * len(loss) / (len(loss) - 1)
        return (advantage * draw.log_prob).mean() + loss.mean()


@pytest.mark.slow
def test_a_score_function_sampler_needs_no_change_to_the_search() -> None:
    def leave_one_out(lists: dict[str, int]) -> BlockSampler:
        return LeaveOneOut(lists, (4, 8), scaling=(1.0, 1.0))

    how = search(
        pattern=None, sampler=leave_one_out, update=tiny.LoRA(rank=2), lr_gates=0.1, steps=200, warmup=0.0, lr=1e-4
    )
    assert list(how(task(), TRAINER).kept) == WORKING


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("fail", [False, True])
def test_the_network_comes_back_bit_for_bit(update: WeightUpdate, fail: bool) -> None:
    model = Planted().build()
    model.blocks[2].requires_grad_(False)
    model.register_buffer("statistics", torch.zeros(3))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    types = {name: type(m) for name, m in model.named_modules()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    attributes = {name: set(m.__dict__) for name, m in model.named_modules()}
    out = model(torch.ones(2, 8))
    blocks = [f"blocks.{i}" for i in range(8)]

    class Stop(Exception):
        pass

    try:
        with update.applied(model, blocks) as parameters:
            with torch.no_grad():
                for p in parameters:
                    p.add_(torch.randn_like(p))
                model.statistics += 1 if isinstance(update, tiny.Full) else 0
            assert torch.equal(model(torch.ones(2, 8)), out) == (not parameters)
            if fail:
                raise Stop
    except Stop:
        pass
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert {name: type(m) for name, m in model.named_modules()} == types
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert {name: set(m.__dict__) for name, m in model.named_modules()} == attributes
    assert torch.equal(model(torch.ones(2, 8)), out)


def test_lora_targets_are_configurable() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})])
            self.head = nn.Linear(4, 4)

    model = Pair()
    with tiny.LoRA(rank=2).applied(model, ["blocks.0"]) as parameters:
        assert len(parameters) == 4
        assert not hasattr(model.head, "lora_A")
    with tiny.LoRA(rank=2, targets=r"head|.*\.a").applied(model, ["blocks.0"]) as parameters:
        assert hasattr(model.head, "lora_A")
        assert not hasattr(model.blocks[0]["b"], "lora_A")
    with (
        pytest.raises(UserError, match="targets: 'nothing' matches the whole path of no layer"),
        tiny.LoRA(targets="nothing").applied(model, []),
    ):
        pass


def test_every_logged_step_tells_the_state_of_the_search(tmp_path) -> None:
    run = tiny.RunFolder(tmp_path)
    decision = search(steps=40, tau=(4.0, 0.1))(task(), TRAINER, run)
    lines = run.metrics("search")
    assert [e["step"] for e in lines] == [10, 20, 30, 40]
    last = lines[-1]
    assert last["decision"] == list(decision.kept)
    assert last["marginals"] == pytest.approx(list(decision.marginals), abs=1e-4)
    assert last["confidence"] == pytest.approx(decision.confidence, abs=1e-4)
    assert last["tau"] == pytest.approx(0.1)
    assert all(math.isfinite(e["loss"]) for e in lines)
    assert lines[0]["lr"] == [1e-2, 1e-3]


@pytest.mark.parametrize(("given", "steps", "expected"), [(None, 2, 1e-3), (None, 2000, 5e-4), (1e-4, 2, 1e-4)])
def test_a_short_search_moves_the_weights_faster(tmp_path, given: float | None, steps: int, expected: float) -> None:
    class FirstStep(Match):
        def prepare(self, batch, rng):
            if rng.step > 1:
                raise KeyboardInterrupt
            return super().prepare(batch, rng)

    run, trainer = tiny.RunFolder(tmp_path), replace(TRAINER, log_every=1)
    with suppress(KeyboardInterrupt):
        search(steps=steps, lr=given)(replace(task(), loss=FirstStep()), trainer, run)
    assert run.metrics("search")[0]["lr"] == [1e-2, expected]


@pytest.mark.slow
def test_the_gates_wait_for_the_warmup(tmp_path) -> None:
    run = tiny.RunFolder(tmp_path)
    decision = search(warmup=0.5, steps=240, update=tiny.LoRA(rank=2))(task(), TRAINER, run)
    assert list(decision.kept) == WORKING
    entropies = [e["entropy"] for e in run.metrics("search")]
    assert entropies[:12] == [entropies[0]] * 12  # uniform over the 70 options up to step 120
    assert entropies[0] == pytest.approx(math.log(70), abs=1e-4)
    assert entropies[-1] < 0.5 * entropies[0]
    assert [e["tau"] for e in run.metrics("search")][:12] == [4.0] * 12


@pytest.mark.parametrize("warmup", [0.0, 0.5])
def test_the_first_step_of_the_gates_is_as_long_after_a_warmup_as_without(tmp_path, warmup: float) -> None:
    """Adam's first step is the learning rate, whatever the gradient; not after steps with gradients of zero."""
    rate, seen = 1e-2, []

    class Watched(GroupedSampler):
        def sample(self, num_rows, rng):
            seen.append(torch.cat([logits.detach().clone() for logits in self.logits]))
            return super().sample(num_rows, rng)

    how = tiny.Search(sampler=partial(Watched, pattern=(4, 8)), steps=40, warmup=warmup, lr_gates=rate, clip=1e3)
    how(task(), TRAINER)
    first = round(warmup * 40)
    assert torch.equal(seen[first], seen[0])
    assert (seen[first + 1] - seen[first]).abs().max() == pytest.approx(rate, rel=0.01)


def test_a_step_that_is_not_finite_is_skipped_and_counted(tmp_path) -> None:
    run = tiny.RunFolder(tmp_path)
    decision = search(steps=120)(task(explode_at=(3, 4, 50)), TRAINER, run)
    assert list(decision.kept) == WORKING
    assert run.metrics("search")[-1]["skipped"] == 3
    assert all(math.isfinite(e["loss"]) for e in run.metrics("search"))


def test_too_many_steps_that_are_not_finite_stop_the_run_with_advice() -> None:
    model_task = task(explode_at=tuple(range(5, 100)))
    before = {k: v.clone() for k, v in model_task.teacher.state_dict().items()}
    with pytest.raises(UserError, match=r"not finite in 4 steps in a row \(up to step 9\).*learning rate"):
        search()(model_task, tiny.Trainer(batch_size=16, max_skipped=4, precision="fp32"))
    assert all(torch.equal(v, before[k]) for k, v in model_task.teacher.state_dict().items())


def test_the_search_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    search(steps=5)(task(), TRAINER)
    assert torch.equal(torch.rand(3), expected)


def test_a_search_that_was_stopped_in_its_last_step_decides_like_any_other(tmp_path) -> None:
    how = search(steps=12, scaling=(1.0, 100.0))
    whole = how(task(), TRAINER)
    run = tiny.RunFolder(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        how(tiny.Task(backbone=Planted(), loss=StopAt(), train=planted_data(), held_out=planted_data(16)), TRAINER, run)
    resumed = how(task(), TRAINER, run)
    assert resumed.confidences == whole.confidences
    assert resumed.kept == whole.kept


def test_pattern_and_sampler_exclude_each_other() -> None:
    with pytest.raises(UserError, match="pattern or keep or budget or sampler, one of the four"):
        tiny.Search()
    with pytest.raises(UserError, match="pattern or keep or budget or sampler, one of the four"):
        tiny.Search(pattern=(1, 2), sampler=lambda lists: GroupedSampler(lists))


def test_keep_takes_indices_or_a_decision_for_the_same_blocks(tmp_path) -> None:
    assert tiny.Keep([4, 1])(task(), TRAINER).kept == (1, 4)
    made = search(steps=5)(task(), TRAINER)
    made.save(tmp_path / "decision.json")
    taken = tiny.Keep(decision=str(tmp_path / "decision.json"))(task(), TRAINER)
    assert taken.kept == made.kept
    assert taken.provenance["taken_from"].endswith("decision.json")
    other = tiny.Task(backbone=Planted(scales=(1, 1)), loss=Match(), train=planted_data(), held_out=planted_data())
    with pytest.raises(UserError, match="about 8 blocks .* has 2"):
        tiny.Keep(decision=str(tmp_path / "decision.json"))(other, TRAINER)
    with pytest.raises(UserError, match=r"keeps \[9\]"):
        tiny.Keep([9])(task(), TRAINER)


def test_a_search_that_has_learned_nothing_says_so() -> None:
    with pytest.raises(tiny.UserError, match="after 1 step every block is as likely .* set more steps"):
        search(steps=1, lr_gates=1e-7)(task(), TRAINER)
    with pytest.warns(UserWarning, match=r"after 100 steps no block .* \d.\de-0\d: .* higher lr_gates"):
        search(steps=100, lr_gates=1e-7, update=tiny.Frozen())(task(), TRAINER)
    # Warnings are errors in tests: neither a short search nor one whose gates move by noise alone gives any.
    search(steps=2, lr_gates=1e-7)(task(), TRAINER)
    search(steps=100, lr_gates=1e-3, update=tiny.Frozen())(task(noise=100.0), TRAINER)
