"""Language models that lose attention or feed-forward of single layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tinyfusion_core as tiny
from llm_toys import TOKENS, decide, folder, logits, task_of, tokenizer
from marks import slow_but
from tinyfusion_core.protocols.blocks.branches import Removed, removed_branches
from tinyfusion_core.pruning.gating import Gates

pytestmark = [pytest.mark.numerics, pytest.mark.filterwarnings("ignore")]  # of transformers
UNITS = ("attention", "mlp")
IN_BRANCHES = ("llama", "qwen3", "gpt2", "gpt_neox", "phi3", "mixtral", "granite", "smollm3")
KEPT = (1, 3, 4, 5, 6, 7, 9, 11)
"""The first layer has no attention, the third and fifth no feed-forward, the fifth neither."""


@pytest.mark.parametrize("family", slow_but(IN_BRANCHES, "llama", "mixtral"))
def test_gated_pruned_saved_and_generating(family: str, tmp_path: Path) -> None:
    more = {"tie_word_embeddings": True} if family == "llama" else {}
    task = task_of(folder(tmp_path / "full", family, **more), units=UNITS)
    assert len(task.blocks) == 12
    inputs = task.loss.prepare({"tokens": TOKENS, "labels": TOKENS}, tiny.Rng(0, "test"))
    mask = torch.tensor([float(i in KEPT) for i in range(12)])
    dims = task.batch_dim(task.teacher)
    with Gates(task.teacher, task.blocks, dims, task.streams, task.backbone.unneeded) as gates, torch.no_grad():
        gates.mask = mask.expand(3, 12)
        gated = task.loss.predict(task.teacher, inputs).states
    student = tiny.prune(task, decide(task, KEPT))
    assert len(removed_branches(student)) == 2
    assert student.config.num_hidden_layers == 5
    with torch.no_grad():
        assert torch.allclose(task.loss.predict(student, inputs).states, gated, atol=1e-5)

    tiny.save_pretrained(student, task, decide(task, KEPT), tmp_path / "student")
    again = tiny.load_pretrained(tmp_path / "student")
    assert torch.equal(logits(again), logits(student))
    assert again.state_dict().keys() == student.state_dict().keys()
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    padded = torch.cat([torch.zeros(3, 2, dtype=torch.long), TOKENS], 1)
    seen = torch.cat([torch.zeros(3, 2, dtype=torch.long), torch.ones_like(TOKENS)], 1)
    for model in (student, again):
        for tokens, told in ((TOKENS, torch.ones_like(TOKENS)), (padded, seen)):
            cached, plain = (
                model.generate(tokens, attention_mask=told, use_cache=use, **options) for use in (True, False)
            )
            assert torch.equal(cached, plain)


def test_what_transformers_would_draw_at_random_is_no_transformers_folder(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    full = tokenizer(folder(tmp_path / "full", "llama"))
    task = task_of(full, units=UNITS)
    student = tiny.prune(task, decide(task, KEPT))
    tiny.save_pretrained(student, task, decide(task, KEPT), tmp_path / "student")
    assert (tmp_path / "student" / "tokenizer.json").is_file()
    with pytest.raises(ValueError, match="Unrecognized model"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    # Whole layers went: a plain folder, as without branches.
    kept = (0, 1, 3, 6, 7, 9)
    whole = tiny.prune(task, decide(task, kept))
    tiny.save_pretrained(whole, task, decide(task, kept), tmp_path / "whole")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "whole")), logits(whole))


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "opt"])
def test_branches_that_are_not_known(family: str, tmp_path: Path) -> None:
    with pytest.raises(tiny.UserError, match="units: no branches of its blocks are known; leave units out"):
        _ = task_of(folder(tmp_path / "full", family), units=UNITS).blocks


def test_layers_that_attend_differently_keep_their_attention(tmp_path: Path) -> None:
    full = folder(tmp_path / "full", "qwen2")
    task = task_of(full, units=UNITS)
    with pytest.raises(tiny.UserError, match=r"full_attention and sliding_attention; .*Search \[mlp\] or whole layers"):
        tiny.prune(task, decide(task, KEPT))
    only = task_of(full, units=("mlp",))
    student = tiny.prune(only, decide(only, (0, 2, 3, 5)))
    assert [isinstance(layer.mlp, Removed) for layer in student.model.layers] == [
        False,
        True,
        False,
        False,
        True,
        False,
    ]
    tokens, options = TOKENS, {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cached, plain = (student.generate(tokens, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, plain)


def test_a_layer_that_never_had_attention_stays(tmp_path: Path) -> None:
    task = task_of(folder(tmp_path / "full", "lfm2"), units=("mlp",))  # most of its layers are convolutions
    student = tiny.prune(task, decide(task, (0, 1, 3)))
    assert student.config.num_hidden_layers == 6
    assert [i for i, layer in enumerate(student.model.layers) if isinstance(layer.feed_forward, Removed)] == [2, 4, 5]


def test_a_search_and_a_recovery_in_branches(tmp_path: Path) -> None:
    task = task_of(folder(tmp_path / "full", "llama"), units=UNITS)
    trainer = tiny.Trainer(batch_size=3, precision="fp32", log_every=100)
    decision = tiny.Search(keep=8, steps=3)(task, trainer)
    student = tiny.prune(task, decision)
    tiny.Recover(steps=3, lr=1e-3, kd=tiny.MaskedKD())(task, student, decision, trainer)
    assert all(p.isfinite().all() for p in student.parameters())
