"""Distillation: the reference's losses and gradients, where the taps are, and that the teacher only teaches."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import golden_data
import tinyfusion_core as tiny
from golden_data import assert_close_rel, weights
from marks import slow_but
from tinyfusion_core.protocols.blocks.outputs import captured
from tinyfusion_core.pruning.removal import remove_blocks
from tinyfusion_core.runtime.seeding import Rng
from tinyfusion_core.samplers.grouped import GroupedSampler
from tinyfusion_core.samplers.patterns import split_groups
from tinyfusion_core.training.distilling.distilled import Distilled
from tinyfusion_core.training.distilling.losses import feature_loss
from tinyfusion_core.training.distilling.quantised import quantised
from tinyfusion_dit import DiT, GaussianDiffusion
from tinyfusion_dit.model import DiT as Network
from tinyfusion_dit.process import Process, linear_betas
from toys import DoubleNet, Match, Net, Planted, planted_data

pytestmark = pytest.mark.numerics

TRAINER = tiny.Trainer(batch_size=16, precision="fp32", seed=0, log_every=1)


def decided(kept, depth: int = 8, groups=(), lists: str = "blocks") -> tiny.Decision:
    return tiny.Decision(
        blocks=tuple(f"{lists}.{i}" for i in range(depth)), kept=tuple(kept), method="Keep", choices=tuple(groups)
    )


def task(**options) -> tiny.Task:
    return tiny.Task(backbone=Planted(), loss=Match(), train=planted_data(), held_out=planted_data(16), **options)


# Parity


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_losses_and_gradients_are_the_references(mode: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinyfusion_dit.model.sinusoid", golden_data.sinusoid)
    dtype, prefix = getattr(torch, precision), "f64." if precision == "float64" else ""
    tensors, config = golden_data.load("kd_small")
    networks = {}
    for name in ("student", "teacher"):
        networks[name] = Network(**config[name])
        networks[name].load_state_dict(weights(tensors, f"w.{name}."))
    student, teacher = (networks[name].to(dtype).eval() for name in ("student", "teacher"))
    sizes = {k: v for k, v in config["teacher"].items() if k != "mlp_ratio"}
    whole = tiny.Task(
        backbone=DiT(**sizes), loss=GaussianDiffusion(), train=planted_data(), held_out=planted_data(), model=teacher
    )
    decision = decided([0, 2, 4], 6, [(0, 1), (2, 3), (4, 5)])
    alpha = config["alpha_kd"]
    kd = tiny.MaskedKD(alpha_kd=alpha, alpha_gt=1 - alpha, beta=(config["beta_feat"], 0.0), sigma=2.0, mask="separate")
    objective = Distilled(student, whole, decision, kd)
    assert objective.taps == [tuple(pair) for pair in config["layer_map"]]
    objective.before_step(0.0)
    x_start, noise, t = tensors["in.x_start"].to(dtype), tensors["in.noise"].to(dtype), tensors["in.t"]
    x_t = Process.respaced(linear_betas(1000), range(1000)).diffuse(x_start, t, noise)
    drop = tensors["in.drop_rand"] < (0.1 if mode == "train" else 0)
    inputs = {"x_start": x_start, "noise": noise, "x_t": x_t, "t": t, "y": tensors["in.y"], "drop": drop}
    loss, losses = objective(inputs, Rng(0, "recover"))

    def expected(name: str) -> Tensor:
        return tensors[f"{prefix}{mode}.{name}"]

    tol = 1e-8 if prefix else 2e-5
    assert_close_rel(losses, expected("loss"), tol)
    for ours, theirs in (("kd", "kd_loss"), ("gt", "gt"), ("feature", "feat_loss")):
        assert_close_rel(objective.terms[ours], expected(theirs), tol)
    sides = [(side, i) for tap in objective.taps for side, i in zip("st", tap, strict=True)]
    kept = torch.stack([tensors[f"{mode}.keep_frac.{side}.{i}"] for side, i in sides])
    assert torch.allclose(objective.terms["masked"].float(), 1 - kept.mean(0), atol=1e-6)
    loss.backward()
    gradients = dict(student.named_parameters())
    norms = torch.stack([gradients[name].grad.double().norm() for name in config["grad_names"]])
    assert_close_rel(norms, expected("grad.norms"), tol)
    assert_close_rel(norms.norm(), expected("grad.total_norm"), tol)
    for name in config["grad_keep"]:
        assert_close_rel(gradients[name].grad, tensors[f"{mode}.grad.full.{name}"], 2e-5)
    assert all(p.grad is None for p in teacher.parameters())


# Taps


def test_the_published_layouts_have_the_published_taps() -> None:
    def taps(pattern, depth: int) -> list[tuple[int, int]]:
        search = tiny.Search(pattern=pattern, steps=1)
        return tiny.derive_taps(search.preview([f"blocks.{i}" for i in range(depth)]))

    assert taps((1, 2), 28) == [(i, 2 * i + 1) for i in range(14)]
    assert taps((1, 2), 14) == [(i, 2 * i + 1) for i in range(7)]  # D7, with D14 as its teacher
    groups = [(3, 4), (3, 4), (2, 4), (3, 4), (2, 4), (3, 4), (3, 4)]
    assert taps(groups, 28) == list(zip([2, 5, 7, 10, 12, 15, 18], [3, 7, 11, 15, 19, 23, 27], strict=True))


def test_without_groups_a_segment_ends_with_every_removed_run() -> None:
    assert tiny.derive_taps(decided([2, 5, 7])) == [(0, 4), (1, 6), (2, 7)]
    assert tiny.derive_taps(decided([0, 1, 3, 6])) == [(1, 2), (2, 5), (3, 7)]
    assert tiny.derive_taps(decided([0, 1, 2])) == [(2, 7)]
    assert tiny.derive_taps(decided(range(8))) == [(7, 7)]


def test_groups_that_keep_nothing_belong_to_their_neighbours() -> None:
    groups = [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert tiny.derive_taps(decided([2, 6], groups=groups)) == [(0, 5), (1, 7)]
    assert tiny.derive_taps(decided([0, 2], groups=groups)) == [(0, 1), (1, 7)]


def test_segments_never_reach_over_two_lists() -> None:
    blocks = tuple([f"encoder.{i}" for i in range(4)] + [f"decoder.{i}" for i in range(4)])
    decision = tiny.Decision(blocks=blocks, kept=(0, 2, 5, 6), method="Keep")
    assert tiny.derive_taps(decision) == [(0, 1), (1, 3), (3, 7)]
    empty = tiny.Decision(blocks=blocks, kept=(1, 2), method="Keep")
    assert tiny.derive_taps(empty) == [(1, 3)]


@settings(max_examples=60)
@given(st.data())
def test_any_pattern_has_taps_that_ascend_and_end_at_the_end(data) -> None:
    pairs = data.draw(
        st.lists(st.integers(1, 4).flatmap(lambda m: st.tuples(st.integers(0, m), st.just(m))), min_size=1, max_size=5)
    )
    if not sum(n for n, _ in pairs):
        return
    depth = sum(m for _, m in pairs)
    lists = {"blocks": depth}
    assert split_groups(pairs, lists) == pairs
    sampler = GroupedSampler(lists, pairs)
    kept = sampler.sample(1, Rng(data.draw(st.integers(0, 9)), "test")).mask[0].nonzero().flatten().tolist()
    for groups in (sampler.choices(), ()):
        taps = tiny.derive_taps(decided(kept, depth, map(tuple, groups)))
        assert taps == sorted(taps)
        assert len({s for s, _ in taps}) == len({t for _, t in taps}) == len(taps)
        assert taps[-1] == (len(kept) - 1, depth - 1)
        assert all(kept[s] <= t for s, t in taps)  # a teacher's output is never before the student's block


def test_given_taps_win_and_out_of_range_ones_are_named() -> None:
    decision = decided([1, 3, 4, 7])
    assert tiny.MaskedKD(taps=[(0, 3), (3, 7)]).taps_for(decision) == [(0, 3), (3, 7)]
    with pytest.raises(
        tiny.UserError, match=r"\[4, 7\] is out of range; the student has blocks 0 to 3, the teacher 0 to 7"
    ):
        tiny.MaskedKD(taps=[(0, 1), (4, 7)]).taps_for(decision)


# The feature loss


def test_the_two_masks_differ_where_one_side_alone_is_extreme() -> None:
    student, teacher = torch.zeros(1, 10), torch.zeros(1, 10)
    student[0] = torch.tensor([1, -1, 1, -1, 1, -1, 1, -1, 1, -1.0])
    teacher[0] = torch.tensor([2, -2, 2, -2, 2, -2, 2, -2, 2, 50.0])
    # 50 is beyond two standard deviations of the teacher: zero there (separate), or not counted (joint).
    separate, left_out = feature_loss(student, teacher, 2.0, "separate")
    assert separate.item() == pytest.approx((9 * 1 + (-1 - 0) ** 2) / 10)
    assert left_out.item() == pytest.approx(0.05)
    joint, left_out = feature_loss(student, teacher, 2.0, "joint")
    assert joint.item() == pytest.approx(1.0)
    assert left_out.item() == pytest.approx(0.1)
    plain, left_out = feature_loss(student, teacher, None, "joint")
    assert plain.item() == pytest.approx((9 * 1 + 51**2) / 10)
    # What is extreme in a sample does not depend on the others of its batch.
    scale = torch.tensor([[1.0], [100.0], [0.01]])
    alike, _ = feature_loss(scale * student, scale * teacher, 2.0, "joint")
    assert alike.tolist() == pytest.approx([1.0, 1e4, 1e-4])
    assert left_out.item() == 0


def test_half_precision_features_do_not_overflow() -> None:
    student = torch.full((2, 3, 4), 300.0, dtype=torch.float16)
    value, _ = feature_loss(student, -student, None, "separate")
    assert value.tolist() == [600.0**2] * 2


def test_every_stream_of_a_block_is_captured() -> None:
    class Net2(DoubleNet):
        pass

    net, x = Net2(), torch.randn(2, 3, 8)
    streams = (tiny.Stream("hidden", 1), tiny.Stream("encoder", 0))
    with captured(net, ["blocks.0", "blocks.2"], streams) as values:
        out = net(x, torch.randn(2, 5, 8))
    assert [[tuple(t.shape) for t in pair] for pair in values] == [[(2, 3, 8), (2, 5, 8)]] * 2
    assert torch.equal(torch.cat(values[1], 1), out)
    assert not net.blocks[0]._forward_hooks
    with captured(Net(), ["second.1"], (tiny.Stream("x"),)) as values:
        assert values == [[]]


def test_a_network_that_goes_on_in_place_is_noticed() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(4, 4)])

        def forward(self, x: Tensor) -> Tensor:
            x = self.blocks[0](x)
            x += 100
            return x

    net = InPlace()
    with (
        pytest.raises(tiny.UserError, match=r"changes the output of 'blocks\.0' in place"),
        torch.no_grad(),
        captured(net, ["blocks.0"], (tiny.Stream(),)),
    ):
        net(torch.ones(2, 4))


def test_a_tap_between_blocks_of_different_width_is_named() -> None:
    decision = decided([0, 1, 2])
    objective = Distilled(tiny.prune(task(), decision), task(), decision, tiny.MaskedKD(taps=[(1, 2)]))
    objective.unregistered[1].blocks[2].register_forward_hook(lambda m, args, out: out[:, :6])
    objective.unregistered[1].blocks[3].forward = lambda x: torch.zeros(len(x), 8)
    with pytest.raises(tiny.UserError, match=r"block 1 of the student gives \[\(4, 8\)\], block 2 of the teacher"):
        objective({"x": torch.ones(4, 8), "target": torch.ones(4, 8)}, Rng(0, "test"))


def test_teacher_and_data_have_each_a_weight() -> None:
    whole, decision, x = task(), decided([1, 3, 4]), torch.randn(4, 8)
    student = tiny.prune(whole, decision)
    objective = Distilled(student, whole, decision, tiny.OutputKD(alpha_kd=0.75, alpha_gt=0.5))
    loss, losses = objective({"x": x, "target": torch.zeros(4, 8)}, Rng(0, "test"))
    ours, theirs = student(x), whole.teacher(x)
    expected = 0.75 * (ours - theirs).square().mean(1) + 0.5 * ours.square().mean(1)
    assert torch.allclose(losses, expected, rtol=1e-5)
    assert loss.item() == pytest.approx(expected.mean().item(), rel=1e-5)


# Recovery


def test_the_teacher_runs_once_a_step_without_graph_in_eval_mode_on_the_same_inputs() -> None:
    teacher, decision = Planted().build(), decided([1, 3, 4])
    whole = task(model=teacher)
    student = tiny.prune(whole, decision)
    seen: list[tuple[Tensor, bool, bool, bool]] = []
    for who, network in (("teacher", teacher), ("student", student)):
        network.register_forward_hook(
            lambda m, args, out, who=who: seen.append((who, args[0], m.training, out.requires_grad))
        )
    before = [p.clone() for p in teacher.parameters()]
    tiny.Recover(steps=3, kd=tiny.MaskedKD(), ema=0)(whole, student, decision, TRAINER)
    assert [who for who, *_ in seen] == ["teacher", "student"] * 3
    for (_, x, training, graph), (_, y, student_training, student_graph) in zip(seen[::2], seen[1::2], strict=True):
        assert torch.equal(x, y)
        assert (training, graph, student_training, student_graph) == (False, False, True, True)
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, teacher.parameters(), strict=True))


def test_beta_falls_with_the_steps_and_the_terms_are_logged(tmp_path: Path) -> None:
    decision = decided([1, 3, 4])
    whole, run = task(), tiny.RunFolder(tmp_path)
    recover = tiny.Recover(steps=5, lr=1e-4, kd=tiny.MaskedKD(beta=(0.4, 0.0), sigma=2.0))
    recover(whole, tiny.prune(whole, decision), decision, TRAINER, run)
    lines = run.metrics("recover")
    assert [line["beta"] for line in lines] == pytest.approx([0.4, 0.3, 0.2, 0.1, 0.0])
    for line in lines:
        total = 0.9 * line["kd"] + 0.1 * line["gt"] + line["beta"] * line["feature"]
        assert line["loss"] == pytest.approx(total, abs=1e-5)
        assert 0 < line["masked"] < 0.2
    one = tiny.Recover(steps=1, kd=tiny.MaskedKD())  # the reference divides by zero here
    one(whole, tiny.prune(whole, decision), decision, TRAINER)


NO_MASK = tiny.MaskedKD(sigma=None, beta=(0.1, 0.1))


@pytest.mark.parametrize("kd", slow_but([tiny.OutputKD(), tiny.MaskedKD(), NO_MASK], NO_MASK))
def test_distillation_recovers(kd: tiny.OutputKD) -> None:
    decision = decided([1, 3, 4])
    whole = task()
    student = tiny.prune(whole, decision)
    check = tiny.HeldOutLoss(draws=1)
    trained = tiny.Recover(steps=200, lr=1e-2, lr_final=1e-4, kd=kd)(
        whole, tiny.prune(whole, decision), decision, TRAINER
    )
    (m,) = check(whole, {"pruned": student, "recovered": trained}, TRAINER)
    assert m.values["recovered"] < 0.5 * m.values["pruned"]


def test_a_teacher_of_another_shape_is_one_clear_error() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = Planted().build().blocks

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return torch.cat([x, x], 1)

    decision = decided([1, 3, 4])
    student = tiny.prune(task(), decision)
    with pytest.raises(tiny.UserError, match=r"the student predicts \[\(16, 8\)\], the teacher \[\(16, 16\)\]"):
        tiny.Recover(steps=1, kd=tiny.OutputKD())(task(model=Wide()), student, decision, TRAINER)


def test_a_fresh_network_has_no_teacher() -> None:
    with pytest.raises(tiny.UserError, match="no teacher to learn from"):
        tiny.Recover(steps=1, kd=tiny.OutputKD())(task(), Planted().build(), None, TRAINER)


def test_a_teacher_that_knows_nothing_stops_the_run() -> None:
    tiny.check_teacher(task(), TRAINER)
    wrong = Planted().build()
    for p in wrong.parameters():
        p.data.mul_(-3)
    with pytest.raises(tiny.UserError, match="is it the right checkpoint"):
        tiny.check_teacher(task(model=wrong), TRAINER)

    class Unchecked(Match):
        def trivial(self, prediction, inputs):
            return None

    tiny.check_teacher(replace(task(model=wrong), loss=Unchecked()), TRAINER)


def test_a_chain_of_prunings_has_taps_at_every_link() -> None:
    first = decided([0, 2, 4, 6], groups=[(0, 1), (2, 3), (4, 5), (6, 7)])
    teacher = Planted().build()
    middle = tiny.prune(task(model=teacher), first)
    second = decided([1, 2], 4, [(0, 1), (2, 3)])
    below = task(model=middle)
    student = tiny.prune(below, second)
    objective = Distilled(student, below, second, tiny.MaskedKD())
    assert objective.taps == [(0, 1), (1, 3)]
    assert objective.paths == (["blocks.0", "blocks.1"], ["blocks.1", "blocks.3"])
    remove_blocks(Planted(), student, ["blocks.1"])
    assert len(student.blocks) == 1


def test_a_quantised_teacher_needs_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(tiny.UserError, match=r"kd\.quantise needs torchao \(.*\): pip install 'tinyfusion\["):
        quantised(nn.Linear(2, 2), "Int8WeightOnlyConfig")
    with pytest.raises(tiny.UserError, match=r"kd\.quantise: with .*kd\.cache no teacher is run"):
        tiny.OutputKD(quantise="Int8WeightOnlyConfig", cache=tiny.TeacherCache(folder="cache"))
