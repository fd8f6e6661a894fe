"""Samplers over all masks within the rules: planted truth, unbiased gradients, what a search does with them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

import tinyfusion_core as tiny
from tinyfusion_core.cli import main
from tinyfusion_core.comparison.study import _budget
from tinyfusion_core.pruning.gating import Gates
from tinyfusion_core.samplers.constraints import Rules
from tinyfusion_core.samplers.grouped import BlockSampler, GroupedSampler
from tinyfusion_core.samplers.subset import ExactK, GumbelTopK, ScoreFunction
from tinyfusion_core.selection.costs import block_costs, whole
from toys import Match, Planted, Residual, StopAt, planted_data

pytestmark = pytest.mark.numerics

WORKING = [1, 3, 4, 7]
TRAINER = tiny.Trainer(batch_size=16, seed=0, log_every=10)
LISTS = {"blocks": 8}
SAMPLERS = {
    "exact": partial(ExactK, rules=Rules(keep=4)),
    "score": partial(ScoreFunction, rules=Rules(keep=4), masks=2),
    "score, four masks and entropy": partial(ScoreFunction, rules=Rules(keep=4), masks=4, entropy=(0.3, 0.0)),
    "top-k": partial(GumbelTopK, keep=4),
    "reinmax": partial(GroupedSampler, pattern=(4, 8), scaling=(1.0, 1.0), estimator="reinmax"),
    "straight-through": partial(GroupedSampler, pattern=(4, 8)),
}


def task(scales: tuple[float, ...] = Planted.scales) -> tiny.Task:
    data = planted_data()
    return tiny.Task(backbone=Planted(scales=scales), loss=Match(), train=data, held_out=data)


def search(sampler, **options) -> tiny.Search:
    how = {"steps": 160, "update": tiny.Frozen(), **options}
    return tiny.Search(sampler=sampler, **how)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_finds_the_blocks_that_work(name: str) -> None:
    rate = {"reinmax": 0.1}.get(name)
    decision = search(SAMPLERS[name], lr_gates=rate)(task(), TRAINER)
    assert list(decision.kept) == WORKING
    assert decision.confidence > 0.3
    assert len(decision.marginals) == 8


@pytest.mark.parametrize("name", SAMPLERS)
def test_no_sampler_finds_them_when_the_gradient_points_the_other_way(name: str) -> None:
    def flipped(lists: dict[str, int]) -> BlockSampler:
        sampler = SAMPLERS[name](lists)
        for logits in sampler.parameters():
            logits.register_hook(torch.neg)
        return sampler

    decision = search(flipped, lr_gates={"reinmax": 0.1}.get(name))(task(), TRAINER)
    assert len(set(decision.kept) & set(WORKING)) <= 1


@pytest.mark.parametrize("name", ["exact", "score", "top-k"])
def test_where_all_blocks_do_nothing_none_is_preferred(name: str) -> None:
    decision = search(SAMPLERS[name])(task((0.0,) * 8), TRAINER)
    assert decision.confidence < 0.1
    assert all(0.3 < p < 0.7 for p in decision.marginals)


def a_loss(masks: Tensor) -> Tensor:
    """Of masks, with interactions: what no estimator can take for linear."""
    weights = torch.linspace(-1, 1, masks.shape[1])
    return masks @ weights + 6 * masks[:, 0] * masks[:, 3] - 4 * masks[:, 1] * masks[:, 2] + 0.5


@pytest.mark.parametrize("masks", [2, 4])
def test_the_score_function_is_unbiased(masks: int) -> None:
    sampler = ScoreFunction({"blocks": 5}, Rules(keep=2), masks=masks, entropy=(0.0, 0.0))
    with torch.no_grad():
        sampler.logits.copy_(torch.tensor([0.5, -0.3, 0.2, 0.0, -1.0]))
    every = torch.tensor([m for m in itertools.product((0.0, 1.0), repeat=5) if sum(m) == 2])
    expected = ((every @ sampler.logits).softmax(0) * a_loss(every)).sum()
    (exact,) = torch.autograd.grad(expected, sampler.logits)
    rows = 40_000 * masks
    draw = sampler.sample(rows, tiny.Rng(0, "test"))
    losses = a_loss(draw.mask).requires_grad_()
    (estimate,) = torch.autograd.grad(sampler.surrogate(draw, losses), sampler.logits)
    assert torch.allclose(estimate, exact, atol=0.02)
    # The straight-through estimate on the exact marginals is not, where the loss is not linear in the gates.
    biased = ExactK({"blocks": 5}, Rules(keep=2))
    biased.load_state_dict(sampler.state_dict())
    draw = biased.sample(40_000, tiny.Rng(0, "test"))
    (simple,) = torch.autograd.grad(biased.surrogate(draw, a_loss(draw.mask)), biased.logits)
    assert (simple - exact).abs().max() > 0.05


def test_the_straight_through_marginals_are_exact_for_a_linear_loss() -> None:
    sampler = ExactK({"blocks": 5}, Rules(keep=2))
    with torch.no_grad():
        sampler.logits.copy_(torch.tensor([0.5, -0.3, 0.2, 0.0, -1.0]))
    weights = torch.linspace(-1, 1, 5)
    every = torch.tensor([m for m in itertools.product((0.0, 1.0), repeat=5) if sum(m) == 2])
    (exact,) = torch.autograd.grad(((every @ sampler.logits).softmax(0) * (every @ weights)).sum(), sampler.logits)
    draw = sampler.sample(16, tiny.Rng(0, "test"))
    assert ((draw.mask == 0) | (draw.mask == 1)).all()
    (estimate,) = torch.autograd.grad((draw.mask @ weights).mean(), sampler.logits)
    assert torch.allclose(estimate, exact, atol=1e-6)


def test_the_log_probability_of_an_order_is_that_of_drawing_block_after_block() -> None:
    sampler = GumbelTopK({"blocks": 4}, keep=2)
    with torch.no_grad():
        sampler.logits.copy_(torch.tensor([0.5, -0.3, 0.2, -1.0]))
    weights = sampler.logits.detach().exp()
    orders = torch.tensor(list(itertools.permutations(range(4), 2)))
    expected = [weights[a] / weights.sum() * weights[b] / (weights.sum() - weights[a]) for a, b in orders]
    assert torch.allclose(sampler._log_prob(orders).exp(), torch.stack(expected))
    assert sum(float(p) for p in expected) == pytest.approx(1)


def test_reinmax_is_exact_for_a_quadratic_loss_of_two_options() -> None:
    """A second-order rule integrates a quadratic without error; the straight-through rule does not."""
    logits = torch.tensor([0.7, -0.2])
    every = torch.eye(2)

    def loss(x: Tensor) -> Tensor:
        return 3 * x[:, 0].square() - x[:, 0] * x[:, 1] + x[:, 1]

    def gradient(estimator: str) -> Tensor:
        sampler = GroupedSampler({"blocks": 2}, (1, 2), tau=(1, 1), scaling=(1, 1), estimator=estimator)
        with torch.no_grad():
            sampler.logits[0].copy_(logits)
        draw = sampler.sample(100_000, tiny.Rng(0, "test"))
        # Options of 1:2 in lexicographic order keep the first or the second block.
        (out,) = torch.autograd.grad(loss(draw.mask).mean(), sampler.logits[0])
        return out

    theta = logits.clone().requires_grad_()
    (exact,) = torch.autograd.grad((theta.softmax(0) * loss(every)).sum(), theta)
    assert torch.allclose(gradient("reinmax"), exact, atol=0.02)
    assert (gradient("straight-through") - exact).abs().max() > 0.05


@pytest.mark.parametrize("name", SAMPLERS)
def test_rows_are_drawn_from_their_own_streams_and_the_best_begin_with_the_mode(name: str) -> None:
    sampler = SAMPLERS[name](LISTS)
    sampler.prefer([0, 2, 4, 6], (1.5, 1.5))
    assert sampler.mode() == [0, 2, 4, 6]
    whole, half = (sampler.sample(n, tiny.Rng(0, "test", first=f)) for n, f in ((12, 0), (4, 8)))
    assert torch.equal(whole.mask[8:], half.mask)
    assert torch.allclose(whole.log_prob[8:], half.log_prob)
    best = sampler.best(6)
    assert list(best[0]) == [0, 2, 4, 6]
    assert len(set(best)) == 6
    assert all(len(kept) == 4 and sampler.allows(kept) for kept in best)
    assert not sampler.allows((0, 2, 4))
    strong, weak = sampler.marginals()[[0, 2, 4, 6]], sampler.marginals()[[1, 3, 5, 7]]
    assert strong.min() > weak.max()


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_prior_fades_along_its_schedule(name: str) -> None:
    sampler = SAMPLERS[name](LISTS)
    sampler.prefer([0, 2, 4, 6], (1.5, 0.0))
    sure, half = (sampler.anneal(at) and float(sampler.marginals()[0]) for at in (0.0, 0.5))
    assert sampler.anneal(1.0)["prior"] == 0
    assert sure > half + 0.05 > 0.6
    assert sampler.marginals().numpy() == pytest.approx(0.5, abs=0.05)


def test_gates_that_leave_out_values_keep_their_mean_gradient() -> None:
    planted = task((1.0, 0.8, 0.6, 1.0))
    model = planted.teacher.requires_grad_(False)
    x = planted.train.__getitems__(list(range(8)))["x"]
    mask = (torch.rand(8, 4, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    mask[:, 2] = 0  # nobody keeps it

    def gradient(weights: Tensor | None) -> Tensor:
        leaf = mask.clone().requires_grad_()
        with Gates(model, planted.blocks, planted.batch_dim(model)) as gates:
            gates.set(leaf, weights)
            model(x).square().sum().backward()
        return leaf.grad

    whole = gradient(None)
    assert torch.equal(gradient(torch.ones(8, 4)), whole)
    rng = torch.Generator().manual_seed(1)
    estimates = torch.stack([gradient((torch.rand(8, 4, generator=rng) < 0.3).float() / 0.3) for _ in range(300)])
    assert torch.equal(estimates[0][mask == 1], whole[mask == 1])
    error = (estimates.mean(0) - whole).abs() / (estimates.std(0) / 300**0.5 + 1e-6)
    assert error[mask == 0].max() < 5
    assert (estimates[0][mask == 0] == 0).any()


def test_a_search_with_few_values_still_finds_the_blocks() -> None:
    decision = search(SAMPLERS["straight-through"], dropped_values=0.3)(task(), TRAINER)
    assert list(decision.kept) == WORKING


def test_keep_is_short_for_the_score_function() -> None:
    short = tiny.Search(keep=4, steps=80, update=tiny.Frozen())
    sampler = short.make_sampler(LISTS)
    assert isinstance(sampler, ScoreFunction)
    assert list(short(task(), TRAINER).kept) == WORKING
    by_list = tiny.Search(keep={"a": 1, "b": 2}, steps=1).preview([f"a.{i}" for i in range(3)] + ["b.0", "b.1", "b.2"])
    assert [sum(i < 3 for i in by_list.kept), sum(i >= 3 for i in by_list.kept)] == [1, 2]
    with pytest.raises(tiny.UserError, match=r"search\.tau goes with pattern"):
        tiny.Search(keep=4, tau=(1.0, 1.0))


def test_a_start_is_where_the_gates_begin_and_no_more(tmp_path) -> None:
    run = tiny.RunFolder(tmp_path)
    how = tiny.Search(keep=4, steps=200, update=tiny.Frozen(), start=tiny.LastN(keep=4), prior=(0.5, 0.5))
    decision = how(task(), TRAINER, run)
    assert run.metrics("search")[0]["marginals"][0] < 0.45 < 0.55 < run.metrics("search")[0]["marginals"][7]
    assert list(decision.kept) == WORKING


def test_a_prior_that_has_faded_decides_nothing() -> None:
    """Strong enough to be the mode for as long as it lasts."""
    how = {"keep": 4, "steps": 1, "update": tiny.Frozen(), "start": tiny.LastN(keep=4)}
    assert list(tiny.Search(**how, prior=(3.0, 3.0))(task(), TRAINER).kept) == [4, 5, 6, 7]
    assert list(tiny.Search(**{**how, "steps": 200}, prior=(3.0, 0.0))(task(), TRAINER).kept) == WORKING


def test_a_prior_that_fades_makes_no_search_confident(tmp_path) -> None:
    run = tiny.RunFolder(tmp_path)
    how = tiny.Search(
        keep=4, steps=400, update=tiny.Frozen(), start=tiny.LastN(keep=4), prior=(3.0, 0.0), confident=0.9, ema=0.5
    )
    decision = how(task(), TRAINER, run)
    assert list(decision.kept) == WORKING
    assert decision.confidence >= 0.9
    assert run.metrics("search")[0]["confidence"] < 0.1  # what is logged is what would be decided
    assert run.metrics("search")[-1]["step"] < 400
    with pytest.raises(tiny.UserError, match=r"search\.prior says how much a start counts"):
        tiny.Search(keep=4, prior=(2.0, 0.0))


def test_a_confident_search_stops_early(tmp_path) -> None:
    run = tiny.RunFolder(tmp_path)
    decision = tiny.Search(keep=4, steps=1000, update=tiny.Frozen(), confident=0.9, ema=0.5)(task(), TRAINER, run)
    steps = run.metrics("search")[-1]["step"]
    assert steps < 500
    assert decision.confidence >= 0.9
    assert list(decision.kept) == WORKING


def test_dropped_blocks_are_not_run_by_the_score_function() -> None:
    planted = task()
    rows: list[int] = []
    model = planted.teacher
    for block in model.blocks:
        block.linear.register_forward_hook(lambda _module, args, _out: rows.append(len(args[0])))
    planted.batch_dim(model)
    rows.clear()
    search(SAMPLERS["score"], steps=5)(planted, TRAINER)
    probe = sum(rows[:16])  # all 8 blocks with 2 and with 3 rows
    assert probe == 8 * (2 + 3)
    assert sum(rows) <= probe + 5 * (16 * 2 * 4 + 8)  # 4 of 8 blocks, 2 masks each; a block nobody keeps runs one row


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ScoreFunction(LISTS, Rules(keep=4), masks=1), r"search\.sampler\.masks is 1; expected at least 2"),
        (lambda: ScoreFunction(LISTS, Rules(keep=4), entropy=(-1.0, 0.0)), r"search\.sampler\.entropy"),
        (lambda: GumbelTopK(LISTS, keep=9), r"search\.sampler\.keep is 9"),
        (lambda: GumbelTopK(LISTS, keep=4, tau=(0.0, 1.0)), r"search\.sampler\.tau"),
        (lambda: tiny.Search(keep=4, dropped_values=0.0), r"search\.dropped_values is 0\.0"),
        (lambda: tiny.Search(keep=4, confident=1.5), r"search\.confident is 1\.5"),
        (lambda: tiny.Search(keep=4, prior=(1.0, -1.0)), r"search\.prior is \(1\.0, -1\.0\)"),
        (lambda: tiny.Search(keep=4, pattern=(2, 4)), "one of the three"),
    ],
)
def test_options_without_a_meaning(make, message: str) -> None:
    with pytest.raises(tiny.UserError, match=message):
        make()


def test_the_final_heals_the_best_masks_and_keeps_the_winner() -> None:
    """A search that has learned nothing, and a final that has."""
    planted = task()
    blind = tiny.Search(keep=4, steps=1, update=tiny.Frozen(), start=tiny.Keep([0, 1, 3, 4]))
    assert list(blind(planted, TRAINER).kept) == [0, 1, 3, 4]
    before = {name: value.clone() for name, value in planted.teacher.state_dict().items()}
    final = tiny.Finals(search=blind, masks=12, steps=2, samples=64)
    decision = final(planted, TRAINER)
    assert list(decision.kept) == WORKING
    assert decision.method == "Finals"
    assert decision.confidences == ()  # those of another mask
    rounds = decision.provenance["finals"]
    assert [len(seen) for seen in rounds] == [12, 6, 3, 2]
    assert min(rounds[-1], key=lambda seen: seen["loss"])["kept"] == WORKING
    assert decision.provenance["evaluations"] == 1 * 16 * 4 + 23 * (2 * 16 + 64)
    assert all(torch.equal(value, before[name]) for name, value in planted.teacher.state_dict().items())
    assert final.preview(planted.blocks).kept == blind.preview(planted.blocks).kept
    few = replace(planted, train=planted_data(32))  # fewer than `samples`
    seen = replace(final, masks=2)(few, TRAINER).provenance["evaluations"]
    assert seen == 1 * 16 * 4 + 2 * (2 * 16 + 32)
    for wrong in ("masks", "steps", "lr", "samples", "batch_size"):
        with pytest.raises(tiny.UserError, match=rf"search\.{wrong} is 0"):
            tiny.Finals(search=blind, **{wrong: 0})


@dataclass(frozen=True)
class Fragile(Match):
    """A shallow network that begins with a block that does nothing cannot be trained."""

    def predict(self, model: torch.nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        out = super().predict(model, inputs)
        lost = model.training and len(model.blocks) < 8 and model.config["scales"][0] == 0
        return out * float("nan") if lost else out


def test_a_finalist_that_diverges_is_out(tmp_path: Path) -> None:
    fragile = replace(task(), loss=Fragile())
    blind = tiny.Search(keep=4, steps=1, update=tiny.Frozen(), start=tiny.Keep([0, 1, 2, 3]))
    others = (tiny.Keep([0, 1, 6, 7]), tiny.Keep([2, 3, 4, 5]), tiny.Keep([1, 2, 3, 4]))
    final = tiny.Finals(search=blind, masks=1, others=others, steps=12, samples=16)
    decision = final(fragile, TRAINER, tiny.RunFolder(tmp_path))
    assert decision.kept == (1, 2, 3, 4)
    (found,) = decision.provenance["finals"]
    assert [seen["loss"] for seen in found if seen["kept"][0] != 1] == [None] * 3
    decision.save(tmp_path / "decision.json")  # JSON has no infinity
    few = replace(final, others=others[:2])
    with pytest.raises(tiny.UserError, match=r"search\.lr is 0\.001: after 12 steps no finalist has a finite loss"):
        few(fragile, TRAINER)


def test_what_criteria_choose_meets_the_masks_of_the_search() -> None:
    """A search that has learned nothing finds none of the right ones; the final takes them from another."""
    blind = tiny.Search(keep=4, steps=1, update=tiny.Frozen(), start=tiny.Keep([0, 1, 3, 4]))
    others = (tiny.FirstN(keep=4), tiny.LeaveOneOut(keep=4, samples=32), tiny.Keep([0, 1, 3, 4]))
    final = tiny.Finals(search=blind, masks=1, others=others, steps=2, samples=64)
    decision = final(task(), TRAINER)
    assert list(decision.kept) == WORKING
    first = {tuple(seen["kept"]): seen["of"] for seen in decision.provenance["finals"][0]}
    assert first == {(0, 1, 2, 3): ["FirstN"], tuple(WORKING): ["LeaveOneOut"], (0, 1, 3, 4): ["Keep", "Search"]}
    looked_at = others[1](task(), TRAINER).provenance["evaluations"]
    assert looked_at > 0
    assert decision.provenance["evaluations"] == 1 * 16 * 4 + looked_at + (3 + 2) * (2 * 16 + 64)


@pytest.mark.parametrize("name", ["exact", "score", "top-k"])
def test_samplers_are_stable_where_gates_are_all_but_certain(name: str) -> None:
    make = {"exact": ExactK, "score": ScoreFunction}.get(name)
    sampler = GumbelTopK({"blocks": 128}, keep=64) if make is None else make({"blocks": 128}, Rules(keep=64))
    with torch.no_grad():
        sampler.logits.copy_(50 * torch.where(torch.arange(128) % 3 == 0, 1.0, -1.0))
    draw = sampler.sample(16, tiny.Rng(0, "test"))
    assert sampler.logits.dtype == draw.mask.dtype == torch.float32
    assert (draw.mask.sum(1) == 64).all()
    assert torch.isfinite(draw.log_prob).all()
    loss = (draw.mask * torch.linspace(-1, 1, 128)).sum(1)
    (grad,) = torch.autograd.grad(sampler.surrogate(draw, loss), sampler.logits)
    assert torch.isfinite(grad).all()
    assert grad.abs().max() > 0
    assert sum(sampler.marginals().tolist()) == pytest.approx(64)


def test_the_best_masks_of_a_sampler_that_is_all_but_certain() -> None:
    sampler = GumbelTopK(LISTS, keep=4)
    with torch.no_grad():
        sampler.logits.copy_(torch.tensor([9.0, 9, 9, 8, -8, -9, -9, -9]))
    assert sampler.best(2) == [(0, 1, 2, 3), (0, 1, 2, 4)]
    assert len(set(sampler.best(100))) == len(sampler.best(100)) == 70


@pytest.mark.parametrize(("sampler", "agree"), [("score", True), ("exact", False)])
def test_masks_are_compared_without_dropout(sampler: str, agree: bool) -> None:
    """With one possible mask a sample's masks are all the same, and so are their losses."""
    seen: list[Tensor] = []
    noisy = torch.nn.Sequential(torch.nn.Dropout(0.5), Residual(8, 1.0))
    backbone = torch.nn.Sequential(torch.nn.Sequential(Residual(8, 1.0), noisy))

    def loss(model: torch.nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        found = model(batch["x"]).square().mean(1)
        if model.training:
            seen.append(found.detach())
        return found

    def make(lists: dict[str, int]) -> BlockSampler:
        return {"score": ScoreFunction, "exact": ExactK}[sampler](lists, Rules(keep=2))

    data = {"x": torch.ones(64, 8)}
    tiny.Search(sampler=make, steps=2, update=tiny.Frozen())(
        tiny.wrap(backbone, blocks="0.*", loss_fn=loss, data=data), TRAINER
    )
    assert len(seen) == 2
    assert all((losses == losses[0]).all() == agree for losses in seen)
    assert not any(module.training for module in backbone.modules())


def test_finalists_of_others_must_be_within_the_budget() -> None:
    blocks = [f"blocks.{i}" for i in range(8)]
    search = tiny.Search(pattern=(2, 4), steps=1)
    with pytest.raises(tiny.UserError, match=r"search\.others\[1\]: keeps 3 blocks, the search 4"):
        tiny.Finals(search=search, others=[tiny.FirstN(pattern=(2, 4)), tiny.FirstN(keep=3)]).preview(blocks)
    outside = tiny.Finals(search=search, others=[tiny.FirstN(keep=4)])
    with pytest.raises(tiny.UserError, match=r"search\.others\[0\]: FirstN keeps 0 1 2 3, which is outside"):
        outside(task(), TRAINER)


def test_a_search_records_what_it_cost_and_where_it_stopped() -> None:
    decision = tiny.Search(keep=4, steps=20, update=tiny.Frozen())(task(), TRAINER)
    assert decision.provenance["steps"] == 20
    assert decision.provenance["evaluations"] == 20 * 16 * 4
    start = tiny.LeaveOneOut(keep=4, samples=32)
    looked_at = start(task(), TRAINER).provenance["evaluations"]
    begun = tiny.Search(keep=4, steps=20, update=tiny.Frozen(), start=start)(task(), TRAINER)
    assert begun.provenance["evaluations"] == looked_at + 20 * 16 * 4
    early = tiny.Search(pattern=(4, 8), steps=400, update=tiny.Frozen(), lr_gates=1e-2, confident=0.6, ema=0.0)
    decision = early(task(), TRAINER)
    assert 0 < decision.provenance["steps"] < 400
    assert 0.6 <= decision.confidence < 0.95  # as sure as it was there, not as at the last step's scaling


def test_a_search_that_stops_early_resumes_to_the_same_stop(tmp_path) -> None:
    how = tiny.Search(keep=4, steps=400, confident=0.8, ema=0.5, update=tiny.LoRA(rank=2), warmup=0.02)
    trainer = replace(TRAINER, checkpoint_every=8)
    whole = how(task(), trainer, tiny.RunFolder(tmp_path / "whole"))
    assert whole.provenance["steps"] < 400

    stopped = tiny.RunFolder(tmp_path / "stopped")
    data = planted_data()
    with pytest.raises(KeyboardInterrupt):
        how(tiny.Task(backbone=Planted(), loss=StopAt(), train=data, held_out=data), trainer, stopped)
    again = how(task(), trainer, stopped)
    assert again.kept == whole.kept
    assert again.marginals == whole.marginals
    assert again.provenance["steps"] == whole.provenance["steps"]
    assert how(task(), trainer, stopped) == again  # killed after its last step, before anybody took the decision


def test_a_start_must_keep_as_many_blocks() -> None:
    blocks = [f"blocks.{i}" for i in range(8)]
    with pytest.raises(tiny.UserError, match=r"search\.start: keeps 3 blocks, the search 4"):
        tiny.Search(keep=4, start=tiny.FirstN(keep=3)).preview(blocks)
    with pytest.raises(tiny.UserError, match="nowhere"):
        tiny.Search(keep=4, start=tiny.Keep(decision="nowhere.json")).preview(blocks)
    with pytest.raises(tiny.UserError, match=r"^search\.keep is 20; expected 1 to 8 blocks"):
        tiny.Search(keep=20).preview(blocks)


def test_files_of_inner_selectors_count(tmp_path) -> None:
    planted = task()
    tiny.Keep([0, 1, 2, 3])(planted, TRAINER).save(tmp_path / "d.json")
    start = tiny.Keep(decision=str(tmp_path / "d.json"))
    search = tiny.Search(keep=4, start=start)
    (hashed,) = start.inputs().values()
    assert list(search.inputs().values()) == list(tiny.Finals(search=search).inputs().values()) == [hashed]
    final = tiny.Finals(search=tiny.Search(keep=4), others=[search])
    assert final.inputs() == {"others[0].start.search.decision": hashed}


def test_candidates_without_groups_are_compared_by_what_they_keep() -> None:
    blocks = [f"encoder_blocks.{i}" for i in range(6)] + [f"decoder_blocks.{i}" for i in range(6)]
    by_list = {"encoder_blocks": 2, "decoder_blocks": 4}
    assert _budget(tiny.Search(keep=6), blocks) == 6
    assert _budget(tiny.Finals(search=tiny.Search(keep=6)), blocks) == 6
    assert _budget(tiny.Search(keep=by_list), blocks) == by_list
    assert _budget(tiny.Search(sampler=partial(GumbelTopK, keep=6)), blocks) == 6
    costs = partial(ScoreFunction, rules=Rules(costs=[1] * 12, budget=5))
    with pytest.raises(tiny.UserError, match="has a budget of costs"):
        _budget(tiny.Search(sampler=costs), blocks)


def test_keys_inside_of_a_final_are_checked(recipe, capsys) -> None:
    final = "{class_path: Finals, init_args: {search: {keep: 4, stepz: 6}}}"
    assert main(["validate", str(recipe), f"--search={final}"]) == 2
    assert "search.search.stepz: unknown key; did you mean 'steps'?" in capsys.readouterr().err
    assert main(["validate", str(recipe), f"--search={final.replace('stepz', 'steps')}"]) == 0
    assert "under 4 masks" in " ".join(capsys.readouterr().out.split())
    others = (
        "{class_path: Finals, init_args: {search: {keep: 4}, others: [{class_path: Taylor, init_args: {keeep: 4}}]}}"
    )
    assert main(["validate", str(recipe), f"--search={others}"]) == 2
    assert "search.others[0].keeep: unknown key; did you mean 'keep'?" in capsys.readouterr().err
    assert main(["validate", str(recipe), f"--search={others.replace('keeep: 4', 'keep: 5')}"]) == 2
    assert "search.others[0]: keeps 5 blocks, the search 4" in capsys.readouterr().err


def test_the_batch_of_a_final_is_checked_before_the_search(recipe, capsys) -> None:
    final = "{class_path: Finals, init_args: {search: {keep: 4, steps: 6}, batch_size: 10}}"
    flags = [f"--search={final}", "--trainer.micro_batch_size", "4"]
    assert main(["run", str(recipe), "--run-dir", str(recipe.parent / "run"), *flags]) == 2
    assert "10 over 1 process(es) is 10 samples for each, which cannot be split" in capsys.readouterr().err
    assert not (recipe.parent / "run").exists()


def test_costs_of_blocks() -> None:
    planted = task()
    costs = block_costs(planted, TRAINER, batch_size=4, rounds=5)
    assert costs["parameters"] == [72.0] * 8
    assert costs["FLOPs"] == [2.0 * 8 * 8] * 8
    assert len(costs["latency"]) == 8
    assert len(set(costs["latency"])) == 1, "what differs between blocks that are alike is noise"
    assert min(costs["latency"]) > 0
    assert whole([1.0, 2.0, 0.001]) == [50, 100, 1]
    assert whole([0.0, 0.0]) == [1, 1]


def test_blocks_without_an_operation_that_counts_have_costs_too() -> None:
    class Scale(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = torch.nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.factor * x

    class Stack(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(Scale() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    wrapped = tiny.wrap(
        Stack(),
        blocks="layers.*",
        loss_fn=lambda model, batch: model(batch["x"]).square().mean(1),
        data={"x": torch.randn(32, 4)},
    )
    costs = block_costs(wrapped, TRAINER, batch_size=4, rounds=2)
    assert costs["parameters"] == [4.0] * 3
    assert costs["FLOPs"] == [0.0] * 3
    assert min(costs["latency"]) > 0


def test_rules_and_samplers_in_a_recipe(recipe, capsys) -> None:
    rules = "{costs: [2, 2, 2, 2, 2, 2, 2, 4], budget: 8, protect: [0], max_run: 3}"
    sampler = f"{{class_path: ScoreFunction, init_args: {{rules: {rules}, masks: 2}}}}"
    flags = ["--search.pattern=null", "--search.lr_gates=null", f"--search.sampler={sampler}", "--search.steps=6"]
    assert main(["validate", str(recipe), *flags]) == 0
    assert "any within the budget" in capsys.readouterr().out
    assert main(["run", str(recipe), "--run-dir", str(recipe.parent / "run"), *flags]) == 0
    kept = tiny.Decision.load(recipe.parent / "run" / "decision.json").kept
    assert 0 in kept
    assert sum(4 if i == 7 else 2 for i in kept) in (7, 8)
    sizes = "{input_size: 8, in_channels: 1, patch_size: 2, hidden_size: 16, num_heads: 2, depth: 8, checkpoint: no.pt}"
    absent = "{class_path: Latents, init_args: {folder: nowhere}}"  # neither weights nor data are needed
    missing = [f"--backbone={{class_path: DiT, init_args: {sizes}}}", f"--data={absent}"]
    assert main(["costs", str(recipe), *missing]) == 0
    assert "half of the latency: rules: {costs: [" in capsys.readouterr().out
    others = "[{class_path: Uniform, init_args: {keep: 4}}, {class_path: FirstN, init_args: {keep: 4}}]"
    short = "{keep: 4, steps: 6}"
    final = f"{{class_path: Finals, init_args: {{search: {short}, masks: 2, steps: 2, others: {others}}}}}"
    assert main(["run", str(recipe), "--run-dir", str(recipe.parent / "final"), f"--search={final}"]) == 0
    impossible = sampler.replace("max_run: 3", "max_run: 0")
    assert main(["validate", str(recipe), *flags[:2], "--search.sampler", impossible]) == 2
    assert "no mask of 8 blocks obeys costs" in capsys.readouterr().err
