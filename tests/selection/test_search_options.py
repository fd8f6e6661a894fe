"""Where a search begins, when it ends, and what it records."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel, OPTConfig, OPTForCausalLM

import tinyfusion_core as tiny
from planted_search import LISTS, SAMPLERS, TRAINER, WORKING, search, task
from tinyfusion_core.pruning.gating import Gates
from tinyfusion_core.pruning.removal import check_removal
from tinyfusion_core.samplers.constraints import Rules
from tinyfusion_core.samplers.subset import GumbelTopK, ScoreFunction
from toys import Match, Planted, StopAt, planted_data


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_search_with_few_values_still_finds_the_blocks() -> None:
    decision = search(SAMPLERS["straight-through"], dropped_values=0.3)(task(), TRAINER)
    assert list(decision.kept) == WORKING


@pytest.mark.slow
def test_keep_is_short_for_the_score_function() -> None:
    short = tiny.Search(keep=4, steps=80, update=tiny.Frozen())
    sampler = short.make_sampler(LISTS)
    assert isinstance(sampler, ScoreFunction)
    assert list(short(task(), TRAINER).kept) == WORKING
    by_list = tiny.Search(keep={"a": 1, "b": 2}, steps=1).preview([f"a.{i}" for i in range(3)] + ["b.0", "b.1", "b.2"])
    assert [sum(i < 3 for i in by_list.kept), sum(i >= 3 for i in by_list.kept)] == [1, 2]
    with pytest.raises(tiny.UserError, match=r"^tau goes with pattern"):
        tiny.Search(keep=4, tau=(1.0, 1.0))


@pytest.mark.slow
def test_a_start_is_where_the_gates_begin_and_no_more(tmp_path) -> None:
    run = tiny.RunFolder(tmp_path)
    how = tiny.Search(keep=4, steps=200, update=tiny.Frozen(), start=tiny.LastN(keep=4), prior=(0.5, 0.5))
    decision = how(task(), TRAINER, run)
    assert run.metrics("search")[0]["marginals"][0] < 0.45 < 0.55 < run.metrics("search")[0]["marginals"][7]
    assert list(decision.kept) == WORKING


@pytest.mark.slow
def test_a_prior_that_has_faded_decides_nothing() -> None:
    """Strong enough to be the mode for as long as it lasts."""
    how = {"keep": 4, "steps": 1, "update": tiny.Frozen(), "start": tiny.LastN(keep=4)}
    assert list(tiny.Search(**how, prior=(3.0, 3.0))(task(), TRAINER).kept) == [4, 5, 6, 7]
    assert list(tiny.Search(**{**how, "steps": 200}, prior=(3.0, 0.0))(task(), TRAINER).kept) == WORKING


@pytest.mark.slow
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


@pytest.mark.slow
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
    how = search(SAMPLERS["score"], steps=5)
    check_removal(planted, how.preview(planted.blocks).kept)  # what a search tries before it begins
    rows.clear()
    how(planted, TRAINER)
    probe = sum(rows[:16])  # all 8 blocks with 2 and with 3 rows
    assert probe == 8 * (2 + 3)
    assert sum(rows) <= probe + 5 * (16 * 2 * 4 + 8)  # 4 of 8 blocks, 2 masks each; a block nobody keeps runs one row


@pytest.mark.parametrize("masks", [2, 4])
def test_every_mask_of_a_sample_sees_the_same_draws(masks: int) -> None:
    steps: list[Tensor] = []

    class Watched(Match):
        def predict(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
            if len(inputs["x"]) == 16 * masks:  # a step, no probe before the search
                steps.append(inputs["x"].unflatten(0, (16, masks)))
            return super().predict(model, inputs)

    watched = task()
    watched.loss = Watched(noise=1.0)
    search(partial(ScoreFunction, rules=Rules(keep=4), masks=masks), steps=3)(watched, TRAINER)
    assert len(steps) == 3
    for x in steps:
        assert torch.equal(x, x[:, :1].expand_as(x)), "the masks of a sample are compared on other draws"
        assert len(x[:, 0].unique(dim=0)) == 16, "samples draw apart from each other"
    assert not torch.equal(steps[0], steps[1]), "every step draws anew"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ScoreFunction(LISTS, Rules(keep=4), masks=1), r"^sampler\.masks is 1; expected 2 to 1,000"),
        (lambda: ScoreFunction(LISTS, Rules(keep=4), entropy=(-1.0, 0.0)), r"^sampler\.entropy"),
        (lambda: GumbelTopK(LISTS, keep=9), r"^sampler\.keep is 9"),
        (lambda: GumbelTopK(LISTS, keep=4, tau=(0.0, 1.0)), r"^sampler\.tau"),
        (lambda: tiny.Search(keep=4, dropped_values=0.0), r"^dropped_values is 0\.0"),
        (lambda: tiny.Search(keep=4, confident=1.5), r"^confident is 1\.5"),
        (lambda: tiny.Search(keep=4, prior=(1.0, -1.0)), r"^prior is \(1\.0, -1\.0\)"),
        (lambda: tiny.Search(keep=4, pattern=(2, 4)), "one of the four"),
    ],
)
def test_options_without_a_meaning(make, message: str) -> None:
    with pytest.raises(tiny.UserError, match=message):
        make()


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


@pytest.mark.slow
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
    with pytest.raises(tiny.UserError, match=r"^start: keeps 3 blocks, the search 4"):
        tiny.Search(keep=4, start=tiny.FirstN(keep=3)).preview(blocks)
    with pytest.raises(tiny.UserError, match="nowhere"):
        tiny.Search(keep=4, start=tiny.Keep(decision="nowhere.json")).preview(blocks)
    with pytest.raises(tiny.UserError, match=r"^keep is 20; expected 1 to 8 blocks"):
        tiny.Search(keep=20).preview(blocks)


def _opt() -> nn.Module:
    sizes = {"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32}
    config = OPTConfig(**sizes, word_embed_proj_dim=16, dropout=0.3, attention_dropout=0.3, layerdrop=0.0)
    return OPTForCausalLM(config).model.decoder


def _llama() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaModel(LlamaConfig(**sizes, vocab_size=32, attention_dropout=0.5))


@pytest.mark.parametrize("make", [_opt, _llama])
def test_equal_masks_of_a_sample_give_equal_losses(make: Callable[[], nn.Module]) -> None:
    """In networks whose dropout is a function, or inside of their attention."""
    seen: list[Tensor] = []

    def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        found = model(input_ids=batch["ids"], use_cache=False).last_hidden_state.square().mean((1, 2))
        if len(found) == 32:
            seen.append(found.detach().unflatten(0, (16, 2)))
        return found

    ids = torch.randint(0, 32, (64, 6), generator=torch.Generator().manual_seed(0))
    wrapped = tiny.wrap(make(), blocks="layers.*", loss_fn=loss, data={"ids": ids})
    sampler = partial(ScoreFunction, rules=Rules(keep=1, protect=[0]))  # one mask is possible
    tiny.Search(sampler=partial(sampler, masks=2), steps=2, update=tiny.Full())(wrapped, TRAINER)
    assert len(seen) == 2
    for losses in seen:
        torch.testing.assert_close(losses[:, 0], losses[:, 1], rtol=1e-5, atol=1e-6)
