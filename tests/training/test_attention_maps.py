"""Where the queries of blocks look: recorded, compared, and matched by a recovery."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import tinyfusion_core as tiny
from llm_toys import folder, task_of
from small_run import digits_task
from tinyfusion_core.protocols.blocks.attention import attention_map, attention_maps
from tinyfusion_core.training.distilling.distilled import Distilled
from tinyfusion_core.training.distilling.losses import map_loss

pytestmark = pytest.mark.numerics
KEPT = (0, 1, 3, 6)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


SEEN = drawn(2, 1, 5, 7, seed=9) > 0
SEEN[..., 0] = True
CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"scale": 0.7},
    "booleans": {"attn_mask": SEEN},
    "what is added": {"attn_mask": drawn(5, 7, seed=8)},
    "causal": {"is_causal": True},
    "shared keys": {"enable_gqa": True},
}


@pytest.mark.parametrize("name", CALLS)
def test_a_map_is_what_attention_weighs_its_values_by(name: str) -> None:
    how = CALLS[name]
    heads = 2 if "enable_gqa" in how else 4
    query, key, value = drawn(2, 4, 5, 8), drawn(2, heads, 7, 8, seed=1), drawn(2, heads, 7, 3, seed=2)
    found = attention_map(query, key, value, **how)
    repeated = value.repeat_interleave(4 // heads, dim=1)
    torch.testing.assert_close(found.exp() @ repeated, scaled_dot_product_attention(query, key, value, **how))


def test_maps_differ_by_their_divergence_and_masked_keys_count_nothing() -> None:
    student, teacher = drawn(2, 3, 4, 5).requires_grad_(), drawn(2, 3, 4, 5, seed=1)
    hidden = torch.tensor([False, False, True, False, True])
    maps = [x.masked_fill(hidden, -math.inf).log_softmax(-1) for x in (student, teacher)]
    found = map_loss(*maps)
    p, q = (m.exp()[..., ~hidden] for m in (maps[1], maps[0]))
    torch.testing.assert_close(found, (p * (p / q).log()).sum(-1).mean((1, 2)))
    assert map_loss(maps[1], maps[1]).abs().max() == 0
    found.sum().backward()
    assert student.grad is not None and student.grad.isfinite().all() and student.grad.abs().max() > 0
    blind = attention_map(drawn(1, 1, 2, 4), drawn(1, 1, 3, 4), drawn(1, 1, 3, 4), torch.zeros(2, 3, dtype=torch.bool))
    torch.testing.assert_close(blind.exp(), torch.full((1, 1, 2, 3), 1 / 3))


def test_blocks_are_watched_and_left_as_they_were() -> None:
    task = digits_task()
    inputs = task.loss.prepare(task.train.__getitems__([0, 1, 2]), tiny.Rng(0, "test"))
    with torch.no_grad():
        before = task.loss.predict(task.teacher, inputs)
        with attention_maps(task.teacher, ["blocks.1", "blocks.4"]) as maps:
            assert torch.equal(task.loss.predict(task.teacher, inputs), before)
    assert [[tuple(m.shape) for m in found] for found in maps] == [[(3, 4, 16, 16)]] * 2
    torch.testing.assert_close(maps[1][0].exp().sum(-1), torch.ones(3, 4, 16))
    assert "forward" not in vars(task.teacher.get_submodule("blocks.1"))
    with pytest.raises(RuntimeError, match="stop"), attention_maps(task.teacher, ["blocks.1"]):
        raise RuntimeError("stop")
    assert "forward" not in vars(task.teacher.get_submodule("blocks.1"))


def test_a_block_without_such_attention_is_named() -> None:
    net = nn.Sequential(nn.Linear(4, 4))
    told = pytest.raises(tiny.UserError, match=r"'0' does not call torch's scaled_dot_.* or distil with AttentionKD")
    with told, attention_maps(net, ["0"]):
        net(torch.zeros(2, 4))


def test_a_causal_language_model_looks_back_alone(tmp_path: Path) -> None:
    task = task_of(folder(tmp_path, "llama"))
    batch = task.loss.prepare(task.train.__getitems__([0, 1]), tiny.Rng(0, "test"))
    with torch.no_grad(), attention_maps(task.teacher, [task.blocks[1]]) as (found,):
        task.loss.predict(task.teacher, batch)
    assert len(found) == 1
    future = torch.ones(found[0].shape[-2:], dtype=torch.bool).triu(1)
    assert found[0][..., future].exp().max() == 0 and found[0][..., ~future].isfinite().all()


def terms(kd: tiny.OutputKD, **how: Any) -> tuple[float, dict[str, Tensor]]:
    """How far a recovered student's maps are from the teacher's, and its weights."""
    task = digits_task()
    trainer = tiny.Trainer(batch_size=8, precision="fp32", progress=False, **how)
    decision = tiny.Keep(KEPT)(task, trainer)
    student = tiny.Recover(steps=30, lr=1e-3, ema=0, kd=kd)(task, tiny.prune(task, decision), decision, trainer)
    judged = Distilled(student, task, decision, tiny.AttentionMapKD())
    rng = tiny.Rng(0, "judged")
    with torch.no_grad():
        judged(task.loss.prepare(task.held_out.__getitems__(list(range(32))), rng), rng)
    return float(judged.terms["feature"].mean()), student.state_dict()


def test_a_recovery_brings_the_maps_nearer() -> None:
    assert terms(tiny.AttentionMapKD(beta=(3.0, 3.0)))[0] < 0.8 * terms(tiny.OutputKD())[0]


@pytest.mark.slow
def test_a_checkpointed_recovery_is_the_same() -> None:
    nearer, weights = terms(tiny.AttentionMapKD(beta=(3.0, 3.0)))
    again, same = terms(tiny.AttentionMapKD(beta=(3.0, 3.0)), activation_checkpointing=True)
    assert again == pytest.approx(nearer, rel=1e-4)
    for name, value in weights.items():
        torch.testing.assert_close(same[name], value, rtol=1e-3, atol=1e-5)


class Windows(nn.Module):
    """Two windows of a sample attend each for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.mix(x).reshape(-1, 1, 3, 4)
        return x + scaled_dot_product_attention(rows, rows, rows).reshape(x.shape)


def test_windows_of_a_sample_count_together() -> None:
    maps = []
    for seed in range(2):
        torch.manual_seed(seed)
        net = nn.Sequential(Windows())
        with torch.no_grad(), attention_maps(net, ["0"]) as (found,):
            net(drawn(5, 6, 4))
        assert found[0].shape == (10, 1, 3, 3)
        maps.append([list(found)])
    task = digits_task()
    decision = tiny.Keep(KEPT)(task, tiny.Trainer(precision="fp32"))
    kd = tiny.AttentionMapKD(taps=[(0, 0)])
    objective = Distilled(tiny.prune(task, decision), task, decision, kd)
    rows = map_loss(maps[0][0][0], maps[1][0][0])
    torch.testing.assert_close(objective._features(kd, *maps, 5)["feature"], (rows[::2] + rows[1::2]) / 2)
    with pytest.raises(tiny.UserError, match=r"a tapped block compares 10 rows of 4 samples; name other taps"):
        objective._features(kd, *maps, 4)


def test_a_block_looks_where_it_did_in_the_teacher() -> None:
    decision = tiny.Decision(blocks=tuple(f"blocks.{i}" for i in range(8)), kept=KEPT, method="Keep")
    assert tiny.AttentionMapKD().taps_for(decision) == [(0, 0), (1, 1), (2, 3), (3, 6)]
    assert tiny.AttentionMapKD(taps=[(3, 7)]).taps_for(decision) == [(3, 7)]


def test_no_cache_keeps_maps() -> None:
    with pytest.raises(tiny.UserError, match=r"ecover\.kd\.cache: no cache keeps attention maps; leave it out"):
        tiny.AttentionMapKD(cache=tiny.TeacherCache(folder="kept"))
