"""Random models of every causal family that transformers has, and what holds of each."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from llm_toys import COMMON, EXPERTS, LATENT

SIZES: dict[str, Any] = {
    **COMMON, **EXPERTS, **LATENT,
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
    "vocab_size_per_layer_input": 97, "laurel_rank": 4, "unpadded_vocab_size": 97, "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2, "swa_head_dim": 8, "input_embedding_size": 32, "output_embedding_size": 32,
}  # fmt: skip
MORE: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 4]},
    "big_bird": {"attention_type": "original_full"},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"] * 3},
    "dots1": {"n_routed_experts": 4},
    "dots3_note_text": {"num_key_value_heads": 4},
    "gemma3n_text": {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 3},
    "gemma4_text": {"num_kv_shared_layers": 0, "global_head_dim": 8},
    "gemma4_unified_text": {"num_kv_shared_layers": 0, "global_head_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 3]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 3},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 3},
    "mamba2": {"num_heads": 8},
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "mlp"] * 2},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "zamba": {"layers_block_type": ["mamba", "hybrid"] * 2 + ["mamba"] * 2},
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid"] * 2 + ["mamba"] * 2, "num_key_value_heads": 4, "mamba_headdim": 16,
        "n_mamba_heads": 4, "attention_head_dim": 16, "num_mem_blocks": 1, "mamba_d_state": 8,
        "attention_hidden_size": 64, "use_shared_attention_adapter": False,
    },
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def _sized(known: dict[str, Any], renamed: dict[str, Any]) -> dict[str, Any]:
    """Those sizes that a config has, and in the configs inside of it."""
    sizes = {key: value for key, value in renamed.items() if known.get(key) is not None or key == "head_dim"}
    if "qk_rope_head_dim" in known:  # heads are of two parts
        sizes |= {"head_dim": LATENT["qk_rope_head_dim"], **LATENT}
    inner = {key: value for key, value in known.items() if isinstance(value, dict) and "model_type" in value}
    return sizes | {key: _sized(value, renamed) for key, value in inner.items()}


def settings(family: str) -> dict[str, Any]:
    """Every size of a family's config that is in the table, at the table's value."""
    kind = CONFIG_MAPPING[family]
    known = kind().to_dict()
    renamed = {kind.attribute_map.get(key, key): value for key, value in SIZES.items()}
    common = {} if "text_config" in known else COMMON
    decoder = {"is_decoder": True} if "type_vocab_size" in known else {}
    return {"model_type": family, **common, **_sized(known, renamed), **decoder, **MORE.get(family, {})}


FAMILIES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
