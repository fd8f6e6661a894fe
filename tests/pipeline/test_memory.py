"""The memory plan: what it counts on pretended tensors is what real ones keep."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tinyfusion_core as tiny
from tinyfusion_core.cli import main
from tinyfusion_core.pipeline.planning.activations import saved_by
from tinyfusion_core.pipeline.planning.amounts import parse_bytes
from tinyfusion_core.pipeline.planning.memory import Setup, search_needs, training_needs
from tinyfusion_core.protocols.blocks.batch import named_batch_dims
from tinyfusion_core.protocols.blocks.paths import list_lengths
from tinyfusion_core.pruning.removal import remove_blocks
from tinyfusion_dit import DiT, GaussianDiffusion

BACKBONE = DiT(input_size=8, patch_size=2, hidden_size=64, depth=4, num_heads=4, num_classes=10)
LOSS = GaussianDiffusion(learn_sigma=True)
ROWS = 8


def planned() -> torch.nn.Module:
    with torch.device("meta"):
        return BACKBONE.construct(BACKBONE.config())


def real() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    model = BACKBONE.construct(BACKBONE.config()).train()
    return model, LOSS.prepare(BACKBONE.example(ROWS), tiny.Rng(0, "plan"))


def test_a_module_that_two_blocks_share_is_planned_once() -> None:
    model, setup = planned(), Setup(batch_size=ROWS, precision="fp32")
    whole = training_needs(BACKBONE, LOSS, model, tiny.Recover(), setup).parameters
    model.blocks[1].mlp = model.blocks[0].mlp
    shared = 4 * sum(p.numel() for p in model.blocks[0].mlp.parameters())
    assert training_needs(BACKBONE, LOSS, model, tiny.Recover(), setup).parameters == whole - shared


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_training_keeps_what_was_counted(precision: str) -> None:
    setup = Setup(batch_size=ROWS, precision=precision)
    needs = training_needs(BACKBONE, LOSS, planned(), tiny.Recover(), setup)
    model, inputs = real()
    found = saved_by(lambda: LOSS.losses(model, inputs).mean(), model, BACKBONE.block_paths(model), precision)
    assert needs.activations == found
    assert 0 < found.checkpointed < found.whole
    weights = sum(p.numel() for p in (*model.parameters(), *model.buffers())) * 4
    moving = sum(p.numel() for p in model.parameters() if p.requires_grad) * 4
    assert (needs.parameters, needs.gradients, needs.optimizer, needs.ema) == (weights, moving, 2 * moving, weights)
    assert needs.total(False) == 2 * weights + 3 * moving + found.whole
    assert needs.total(True) == 2 * weights + 3 * moving + found.checkpointed


@pytest.mark.parametrize("update", [tiny.LoRA(rank=2), tiny.Full(), tiny.Frozen()])
def test_a_search_keeps_what_was_counted_and_less_than_the_dense_formula(update: tiny.WeightUpdate) -> None:
    search = tiny.Search(pattern=(1, 2), update=update)
    needs = search_needs(BACKBONE, LOSS, planned(), search, Setup(batch_size=ROWS, precision="fp32"))
    model, inputs = real()
    blocks = BACKBONE.block_paths(model)
    mask = search.make_sampler(list_lengths(blocks)).sample(ROWS, tiny.Rng(0, "plan", 0)).mask

    def gated() -> torch.Tensor:
        with tiny.Gates(model, blocks, named_batch_dims({"x": 0, "c": 0})) as gates:
            gates.mask = mask
            return LOSS.losses(model, inputs)

    with update.applied(model, blocks) as weights:
        assert needs.activations == saved_by(gated, model, blocks)
        assert needs.gradients == sum(4 * p.numel() for p in weights)
    assert needs.activations.whole < 0.7 * needs.dense.whole


def test_distillation_counts_its_teacher_and_what_is_compared() -> None:
    teacher = planned()
    blocks = BACKBONE.block_paths(teacher)
    decision = tiny.Decision(blocks=tuple(blocks), kept=(0, 2), method="Keep")
    config = {**BACKBONE.config(), "depth": 2}
    with torch.device("meta"):
        student = BACKBONE.construct(config)
    setup = Setup(batch_size=ROWS, precision="fp32")
    plain = training_needs(BACKBONE, LOSS, student, tiny.Recover(ema=0), setup)
    kd = tiny.Recover(ema=0, kd=tiny.MaskedKD())
    distilled = training_needs(BACKBONE, LOSS, student, kd, setup, teacher, decision)
    assert plain.teacher == plain.ema == distilled.ema == 0
    assert distilled.teacher == sum(4 * t.numel() for t in (*teacher.parameters(), *teacher.buffers()))
    assert distilled.activations.whole > plain.activations.whole


@pytest.mark.parametrize(
    ("start", "said", "held"),
    [
        # Of 16 samples 65 x 65 matrices, twice, and three times those of 64 channels and one; doubles.
        (tiny.Refit(samples=16), "Refit to 16 samples", 8 * (2 * 16 * 65**2 + 3 * 65**3)),
        # Into the first block two: 64 -> 192, 64 -> 64, 64 -> 256 and back, 64 -> 384; singles.
        (
            tiny.Fuse(rank=2, steps=7),
            "Fuse by 7 steps a gap (7 if blocks 0, 3 stay)",
            2 * 4 * (8 * (256 + 128 + 320 + 320 + 448) + 3 * 64 * (192 + 64 + 256 + 256 + 384)),
        ),
    ],
)
def test_a_start_holds_both_networks_and_its_own(start: tiny.Start, said: str, held: int) -> None:
    model, recover = planned(), tiny.Recover(steps=1, start=start)
    decision = tiny.Decision(blocks=tuple(BACKBONE.block_paths(model)), kept=(0, 3), method="Keep")
    assert start.planned(tiny.Task.without_data(BACKBONE, LOSS, model), decision) == (said, held)
    student = planned()
    remove_blocks(BACKBONE, student, ["blocks.1", "blocks.2"])
    setup = Setup(batch_size=ROWS, precision="fp32")
    needs = training_needs(BACKBONE, LOSS, student, recover, setup, teacher=model, decision=decision)
    weights = sum(t.numel() * 4 for m in (student, model) for t in (*m.parameters(), *m.buffers()))
    assert needs.start == weights + held
    assert needs.total(False) == max(needs.start, needs.parameters * 2 + needs.gradients * 3 + needs.activations.whole)
    assert "before that its start, beside its passes up to" in needs.describe(setup)


def test_sharding_divides_all_but_what_is_gathered() -> None:
    one, ddp, fsdp = (
        training_needs(BACKBONE, LOSS, planned(), tiny.Recover(), Setup(batch_size=ROWS, devices=n, sharding=s))
        for n, s in ((1, "ddp"), (4, "ddp"), (4, "fsdp"))
    )
    assert (one.rows, ddp.rows, fsdp.rows) == (8, 2, 2)
    assert ddp.parameters == one.parameters
    for name in ("parameters", "gradients", "optimizer", "ema"):
        assert getattr(fsdp, name) == pytest.approx(getattr(one, name) / 4, abs=1)
    assert one.communication == 0 < fsdp.communication < one.parameters
    assert ddp.communication == ddp.gradients
    assert ddp.activations == fsdp.activations
    assert Setup(batch_size=64, devices=4, micro_batch_size=6).rows == 6


@pytest.mark.slow
def test_validate_prints_the_plan_and_says_when_it_does_not_fit(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["validate", str(recipe), "--memory", "1GB"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "search: memory" in out and "recover: memory" in out
    assert main(["validate", str(recipe), "--memory=3MB", "--devices", "2"]) == 2
    err = capsys.readouterr().err
    assert "recover: needs" in err and "on every device, which has 3 MB" in err
    assert main(["validate", str(recipe), "--memory", "plenty"]) == 2
    assert "'plenty' is no amount of memory; expected one as 24GB or 40GiB" in capsys.readouterr().err
    assert (parse_bytes("24GB"), parse_bytes("1.5 GiB"), parse_bytes("10MB")) == (24e9, 1.5 * 2**30, 1e7)
    with pytest.raises(tiny.UserError, match=r"--memory: '24' lacks a unit; 24GB\? \(known: MB, GB, TB, MiB"):
        parse_bytes("24")
