"""Random decoders of many families, small enough to run in milliseconds, each as a folder that users would have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

import tinyfusion_core as tiny
from tinyfusion_llm import CausalLM, NextToken

VOCABULARY = 97
TOKENS = torch.randint(3, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(0))
COMMON = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "qk_nope_head_dim": 8,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 5},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 3},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 8},
    "phi3": {},
    "gpt2": {"attn_pdrop": 0.0},
    "gpt_neox": {},
    "gptj": {"rotary_dim": 4},
    "mpt": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16},
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 16, "mlp_only_layers": [1, 3]},
    "qwen3_moe": {**EXPERTS, "head_dim": 8},
    "deepseek_v3": {
        **LATENT, "first_k_dense_replace": 2, "n_routed_experts": 4, "moe_intermediate_size": 16,
        "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
    },
    "smollm3": {"no_rope_layer_interval": 3},
    "granite": {"logits_scaling": 3.0},
    "lfm2": {"full_attn_idxs": [1, 3]},
    "qwen3_next": {
        **EXPERTS, "head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
        "linear_value_head_dim": 8, "shared_expert_intermediate_size": 16,
        "layer_types": ["linear_attention", "linear_attention", "full_attention"] * 2,
    },
}  # fmt: skip


def settings(family: str, **more: Any) -> dict[str, Any]:
    return {"model_type": family, **COMMON, **FAMILIES.get(family, {}), **more}


def folder(path: Path, family: str, dtype: torch.dtype = torch.float32, **more: Any) -> Path:
    """A folder with a random model, no weight of which is zero."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings(family, **more)))
    rng = torch.Generator().manual_seed(1)
    for p in model.parameters():
        nn.init.normal_(p, std=0.2, generator=rng)
    model.generation_config.temperature, model.generation_config.do_sample = 0.5, True
    model.to(dtype).save_pretrained(path)
    return path


def tokenizer(path: Path) -> Path:
    """Words, one number each, for the words of this file."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCABULARY)}}
    fast = Tokenizer(models.WordLevel(words, unk_token="w3"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="</s>", bos_token="<s>", pad_token="<pad>")
    made.save_pretrained(path)
    return path


def words(seed: int, num: int) -> str:
    """So many words of the vocabulary."""
    rng = torch.Generator().manual_seed(seed)
    return " ".join(f"w{int(i)}" for i in torch.randint(4, VOCABULARY, (num,), generator=rng))


def recipe_of(model: Path, work: Path) -> str:
    """A recipe that prunes a model of a folder with the defaults, on words of a tokenizer of its own."""
    words = tokenizer(work / "words")  # beside a config of another family transformers takes it for that family's
    names = [work / f"{name}.txt" for name in "ab"]
    for name in names:
        name.write_text(" ".join(f"w{3 + i % 90}" for i in range(200)))
    data = {"tokenizer": str(words), "files": list(map(str, names)), "context": 12, "cache": str(work / "cache")}
    content = {
        "backbone": {"class_path": "CausalLM", "init_args": {"model": str(model), "context": 12}},
        "loss": "NextToken",
        "data": {"class_path": "TextTokens", "init_args": data},
        "trainer": {"precision": "fp32", "batch_size": 2, "seed": 0},
        "search": {"class_path": "Search", "init_args": {"keep": 4, "steps": 2}},
        "recover": {"steps": 2},
        "evaluate": [],
    }
    (work / "recipe.yaml").write_text(yaml.safe_dump(content))
    return str(work / "recipe.yaml")


def task_of(path: Path, **more: object) -> tiny.Task:
    rows = tiny.Tensors({"tokens": TOKENS, "labels": TOKENS})
    backbone = CausalLM(model=str(path), context=12, **more)  # type: ignore[arg-type]
    return tiny.Task(backbone=backbone, loss=NextToken(), train=rows, held_out=rows)


def decide(task: tiny.Task, kept: tuple[int, ...]) -> tiny.Decision:
    return tiny.Decision(blocks=tuple(task.blocks), kept=kept, method="Keep")


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits
