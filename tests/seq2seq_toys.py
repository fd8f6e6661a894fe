"""Random encoder-decoders of three families, small enough to run in milliseconds, each as a folder users would have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tinyfusion_core as tiny
from tinyfusion_llm import EncoderDecoder, NextToken
from tinyfusion_llm.layers.building import randomised

VOCABULARY = 97
SOURCE_TOKENS, TOKENS = 12, 8
WIDTHS = {
    "d_model": 32, "encoder_layers": 4, "decoder_layers": 3, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": VOCABULARY, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip
NETWORKS: dict[str, dict[str, Any]] = {
    "t5": {
        "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 4, "num_decoder_layers": 3, "num_heads": 4,
        "vocab_size": VOCABULARY, "decoder_start_token_id": 0,
    },
    "bart": {**WIDTHS, "max_position_embeddings": 64},
    "whisper": {
        **WIDTHS, "max_source_positions": 10, "max_target_positions": 32, "num_mel_bins": 8, "suppress_tokens": None,
        "begin_suppress_tokens": None,
    },
}  # fmt: skip
LISTS = {
    **dict.fromkeys(NETWORKS, ("model.encoder.layers", "model.decoder.layers")),
    "t5": ("encoder.block", "decoder.block"),
}


def folder(path: Path, family: str, **more: Any) -> Path:
    """A folder with a random model, no weight of which is zero."""
    network = {"model_type": family, **NETWORKS[family], **more}
    model = randomised(network, EncoderDecoder.autos, torch.Generator().manual_seed(1))
    model.generation_config.eos_token_id = None
    model.save_pretrained(path)
    return path


def batch(num_rows: int, features: bool = False) -> dict[str, Tensor]:
    """Sources of unequal lengths, and targets, of which no loss counts the start and the end."""
    rng = torch.Generator().manual_seed(0)
    source = torch.randint(3, VOCABULARY, (num_rows, SOURCE_TOKENS), generator=rng)
    tokens = torch.randint(3, VOCABULARY, (num_rows, TOKENS), generator=rng)
    lengths = SOURCE_TOKENS - torch.arange(num_rows)[:, None] % 4
    mask = (torch.arange(SOURCE_TOKENS) < lengths).long()
    labels = tokens.clone()
    labels[:, 0] = labels[:, -1] = -100
    read = (
        {"features": torch.randn(num_rows, 8, 20, generator=rng)}
        if features
        else {"source": source * mask, "source_mask": mask}
    )
    return {**read, "tokens": tokens, "labels": labels}


def task_of(path: Path, features: bool = False, **more: Any) -> tiny.Task:
    rows = tiny.Tensors(batch(8, features))
    backbone = EncoderDecoder(model=str(path), source_context=SOURCE_TOKENS, context=TOKENS, **more)
    return tiny.Task(backbone=backbone, loss=NextToken(), train=rows, held_out=rows)


def decide(task: tiny.Task, kept: tuple[int, ...]) -> tiny.Decision:
    return tiny.Decision(blocks=tuple(task.blocks), kept=kept, method="Keep")


def states(task: tiny.Task, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found: Tensor = task.loss.predict(model, inputs).states
    return found
