"""Random models of every causal family that transformers has, and what holds of each.

`python tests/llm_families.py` writes `docs/language-model-families.md`; a test says when that is out of date.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import tinyfusion_core as tiny
from llm_toys import COMMON, EXPERTS, LATENT, TOKENS, decide, folder, logits, recipe_of, task_of
from places import ROOT
from sweeps import write_page
from tinyfusion_core.pipeline.planning.plan import make_plan
from tinyfusion_core.pruning.gating import Gates
from tinyfusion_core.samplers.constraints import Rules, build

SIZES: dict[str, Any] = {
    **LATENT, **COMMON, **EXPERTS,
    # Width of heads and feed-forward networks
    "head_dim": 8, "ffn_dim": 48, "ffn_hidden_size": 48, "d_inner": 48, "dff": 48, "dim_ff": 48, "dim_head": 8,
    "n_inner": 48, "d_head": 8, "kv_channels": 8, "num_kv_heads": 2, "rotary_dim": 4, "d_model": 32, "n_embd": 32,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "word_embed_proj_dim": 32, "embedding_size": 32,
    "n_positions": 64, "n_ctx": 64, "max_seq_len": 64, "qk_head_dim": 16,
    # Experts
    "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_token": 2, "moe_topk": 2,
    "moe_k": 2, "n_group": 2, "topk_group": 1, "num_expert_group": 2, "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16, "first_k_dense_replace": 2, "expert_ffn_hidden_size": 16, "num_dense_layers": 2,
    "moe_shared_expert_intermediate_size": 16, "zero_expert_num": 2, "shared_experts_intermediate_size": 16,
    # Windows
    "sliding_window": 5, "sliding_window_size": 5, "attention_window_size": 5, "local_attention": 8, "window_size": 5,
    "attention_chunk_size": 8, "query_pre_attn_scalar": 8, "max_window_layers": 3,
    # State spaces and linear attention
    "mamba_d_state": 4, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_ssm": 64, "mamba_chunk_size": 4,
    "mamba_dt_rank": 4, "mamba_n_groups": 1, "state_size": 4, "time_step_rank": 4, "num_heads": 4, "n_groups": 1,
    "chunk_size": 4,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_head_dim": 8, "linear_num_heads": 4, "ssm_state_size": 4, "mamba_num_heads": 8, "mamba_head_dim": 8,
    "lru_width": 32, "attention_hidden_size": 32, "mamba_headdim": 8, "mamba_ngroups": 1, "n_mamba_heads": 2,
    "attention_head_dim": 8, "adapter_rank": 4,
    # Others
    "index_head_dim": 8, "index_n_heads": 2, "index_topk": 4, "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 97, "laurel_rank": 4, "o_lora_rank": 8, "o_groups": 2,
    "unpadded_vocab_size": 97, "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2, "swa_head_dim": 8, "input_embedding_size": 32, "output_embedding_size": 32,
}  # fmt: skip
KINDS = ("sliding", "full")
SHARED = {"num_kv_shared_layers": 2, "layer_types": [f"{kind}_attention" for kind in KINDS] * 3}
"""The last layer of each kind reads the keys and values of the one before."""
MORE: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [2, 5]},
    "big_bird": {"attention_type": "original_full"},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "rope_parameters": {f"{kind}_attention": {"rope_type": "default", "rope_theta": 1e4} for kind in KINDS},
    },
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8}},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 2, "topk_group": 1},
    "dots1": {**EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1},
    "dots3_note_text": {
        "num_key_value_heads": 4, "per_layer_config": {i: {"kv_lora_rank": 4} for i in "234"}, "head_dim": 16,
    },
    "gemma3n_text": SHARED,
    "gemma4_text": {**SHARED, "global_head_dim": 8},
    "gemma4_unified_text": {**SHARED, "global_head_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 3]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 3},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
    "kimi_linear": {"layer_types": ["linear_attention", "linear_attention", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 3},
    "mamba2": {"num_heads": 8},
    "nemotron_h": {"layers_block_type": ["mamba", "mlp", "attention"] * 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
        "indexer_compress_ratio": 2, "hc_lowrank": 8,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "zamba": {
        "layers_block_type": ["mamba", "hybrid"] * 2 + ["mamba"] * 2, "attention_hidden_size": 64,
        "attention_head_dim": 16, "num_key_value_heads": 4,
    },
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid"] * 2 + ["mamba"] * 2, "num_key_value_heads": 4, "mamba_headdim": 16,
        "n_mamba_heads": 4, "attention_head_dim": 16, "num_mem_blocks": 1, "mamba_d_state": 8,
        "attention_hidden_size": 64, "use_shared_attention_adapter": False,
    },
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def sized(known: dict[str, Any], renamed: dict[str, Any]) -> dict[str, Any]:
    """Those sizes that a config has, and in the configs inside of it."""
    sizes = {
        key: value
        for key, value in renamed.items()
        if known.get(key) is not None or (key == "head_dim" and key in known)
    }
    if "qk_rope_head_dim" in known:  # heads are of two parts
        sizes |= {"head_dim": LATENT["qk_rope_head_dim"], **LATENT}
    inner = {key: value for key, value in known.items() if isinstance(value, dict) and "model_type" in value}
    more = {key: MORE.get(value["model_type"], {}) for key, value in inner.items()}
    return sizes | {key: {**sized(value, renamed), **more[key]} for key, value in inner.items()}


def settings(family: str) -> dict[str, Any]:
    """Every size of a family's config that is in the table, at the table's value."""
    kind = CONFIG_MAPPING[family]
    known = kind().to_dict()
    renamed = {kind.attribute_map.get(key, key): value for key, value in SIZES.items()}
    common = {} if "text_config" in known else COMMON
    decoder = {"is_decoder": True} if "type_vocab_size" in known else {}
    return {"model_type": family, **common, **sized(known, renamed), **decoder, **MORE.get(family, {})}


FAMILIES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
PAGE = ROOT / "docs" / "language-model-families.md"
KEPT = (0, 2, 3, 5)
TRAINER = tiny.Trainer(precision="fp32", batch_size=2)


@dataclass
class Found:
    """What holds of a family.

    Attributes:
        limits: what its masks must obey, as `Backbone.limits` says it.
        refused: why it cannot be pruned; said before anything is spent.
        unbuilt: why transformers makes no small model of it.
        notes: what its students do not do, as the whole model does not.
    """

    limits: str = ""
    refused: str = ""
    unbuilt: str = ""
    notes: list[str] = field(default_factory=list)
    classes: ClassVar[Mapping[str, str]] = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    def row(self, family: str) -> str:
        """Its row of the page."""
        name = f"| {family} | {self.classes[family]} |"
        if self.unbuilt or self.refused:
            return f"{name} {self.unbuilt or self.refused} |"
        return f"{name} {self.limits or 'any'} | {'; '.join(self.notes)} |"


def examine(family: str, work: Path) -> Found:
    """Prune a family: a search by default, gates, three masks, files, generation.

    Raises:
        AssertionError: what is promised of every family does not hold.
    """
    try:
        path = folder(work / "full", family, **settings(family))
        AutoModelForCausalLM.from_pretrained(path).eval()(input_ids=TOKENS, use_cache=False)
    except Exception as e:  # of any family's code
        return Found(unbuilt=one_line(e))
    task = task_of(path)
    try:
        for problem in make_plan(tiny.load_recipe(recipe_of(path, work))).problems:
            raise tiny.UserError(problem)
        decision = tiny.Search(keep=4, steps=3)(task, TRAINER)
    except tiny.UserError as e:
        return Found(refused=one_line(e, work))
    limits = task.backbone.limits(task.teacher)
    masks = masks_within(limits)
    assert decision.kept in masks
    chosen = KEPT if KEPT in masks else decision.kept
    students = {kept: tiny.prune(task, decide(task, kept)) for kept in {masks[0], masks[-1], chosen}}
    check_gates(task, students, {"tokens": TOKENS, "labels": TOKENS}, lambda prediction: prediction.states)
    again = _check_files(task, students[chosen], chosen, work / "student")
    return Found(limits=in_words(limits), notes=list(_notes(task.teacher, again)))


def in_words(limits: Any) -> str:
    """What the page says of limits."""
    if len(masks_within(limits)) == 1:
        return "the first layers only"
    return ", ".join(f"{name} {' '.join(map(str, value))}" for name, value in limits.items())


def masks_within(limits: Any) -> list[tuple[int, ...]]:
    """The masks of four of six layers that obey limits."""
    return list(build(Rules(keep=4, **limits), {"layers": 6}).masks())


def check_gates(
    task: tiny.Task, students: dict[tuple[int, ...], nn.Module], batch: dict[str, Tensor], of: Callable[[Any], Tensor]
) -> None:
    """A network under one mask for each sample is the students of these masks; all gates have a gradient.

    Raises:
        AssertionError: it does not hold of the tensor `of` a prediction.
    """
    inputs = task.loss.prepare(batch, tiny.Rng(0, "test"))
    dims, rows = task.batch_dim(task.teacher), [list(students)[i % len(students)] for i in range(3)]
    with Gates(task.teacher, task.blocks, dims, task.streams, task.backbone.unneeded) as gates:
        with torch.no_grad():
            plain = of(task.loss.predict(task.teacher, inputs))
            gates.mask = torch.ones(3, 6)
            assert torch.equal(of(task.loss.predict(task.teacher, inputs)), plain), "all ones"
        mask = torch.tensor([[float(i in kept) for i in range(6)] for kept in rows], requires_grad=True)
        gates.mask = mask
        prediction = task.loss.predict(task.teacher, inputs)
        (gradient,) = torch.autograd.grad(task.loss.loss(prediction, inputs).sum(), mask)
    assert gradient.isfinite().all() and (gradient != 0).any(0).all(), "gradient"
    for i, kept in enumerate(rows):
        with torch.no_grad():
            alone = of(task.loss.predict(students[kept], inputs))[i]
        size = alone.abs().max()
        assert torch.allclose(alone, of(prediction)[i], rtol=0, atol=1e-4 * size), f"gated is not pruned: {kept}"


def _check_files(task: tiny.Task, student: nn.Module, kept: tuple[int, ...], path: Path) -> Any:
    """Saving compares bit by bit what is read; transformers reads it without anything left over."""
    tiny.save_pretrained(student, task, decide(task, kept), path)
    again, loading = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(loading.values()), loading
    again.load_state_dict(student.state_dict(), assign=True)  # products may depend on where numbers lie
    assert torch.equal(logits(again.eval()), logits(student)), "read back"
    return again


def _notes(teacher: nn.Module, student: nn.Module) -> Iterator[str]:
    """What of generation holds for neither the whole model nor the student; for the first alone is a fault."""
    checks: dict[str, Callable[[Any], bool]] = {"the same with a cache": _cached, "left padding": _padded}
    for name, check in checks.items():
        ours, theirs = (holds(check, model) for model in (student, teacher))
        assert ours or not theirs, f"generation: {name}"
        if not ours:
            yield f"not {name}, nor does the whole model"


def holds(check: Callable[[Any], bool], model: Any) -> bool:
    """Whether a check of a model neither fails nor says no."""
    try:
        return check(model)
    except Exception:  # of any family's code
        return False


OPTIONS = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def _cached(model: Any) -> bool:
    return torch.equal(*(model.generate(TOKENS, use_cache=cache, **OPTIONS) for cache in (True, False)))


def _padded(model: Any) -> bool:
    row: Tensor = TOKENS[:1]
    padded, mask = nn.functional.pad(row, (3, 0)), nn.functional.pad(torch.ones_like(row), (3, 0))
    plain = model.generate(row, attention_mask=torch.ones_like(row), **OPTIONS)
    return torch.equal(model.generate(padded, attention_mask=mask, **OPTIONS)[:, 3:], plain)


def one_line(error: Exception, work: Path | None = None) -> str:
    """What an error says, as a cell of a table."""
    text = re.sub(r"\s+", " ", str(error)).replace("|", "\\|").replace("<", "&lt;")
    if work is not None:
        text = text.replace(str(work / "full"), "the folder")
    return f"{type(error).__name__}: {text[:160]}" if work is None else text


HEAD = """# Families of language models

Every causal family of transformers {version}, as a random model of six layers, whose sizes one table of names decides
(`tests/llm_families.py`). Of each that works, the recipe is validated, a search of three steps is made with the
defaults, and three masks are pruned. Under gates, with one mask for each sample, the network computes what the pruned
ones compute, and every gate has a gradient. What is saved is what transformers reads, to the last bit, and it generates
as the whole model does: with a cache as without one, and with padding on the left.

`protect` and `period` are what [constraints](search.md) call them. The config demands them, so they hold in every
selection by themselves: layers that must stay, or kinds of layers whose order must stay.

This page is generated: `python tests/llm_families.py`.
"""


if __name__ == "__main__":
    write_page(PAGE, HEAD, "masks | but", FAMILIES, examine)
