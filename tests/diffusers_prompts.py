"""Pipelines of diffusers with tiny random text encoders, and tokenizers of single letters."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

import diffusers_sweep
from diffusers_families import FAMILIES
from tinyfusion_diffusers import DiffusersTransformer

WIDTH, POOLED = 12, 10
LETTERS = "abcdefghijklmnopqrstuvwxyz "


def t5(kind: str = "T5", length: int = 300) -> tuple[Any, Any]:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((letter, -2.0) for letter in LETTERS + "\u2581")]
    tokenizer = transformers.T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=length)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(pieces), d_model=WIDTH, d_kv=4, d_ff=16, num_layers=2, num_heads=3
    )
    return tokenizer, getattr(transformers, f"{kind}EncoderModel")(config)


def clip(width: int, projection: int | None = None) -> tuple[Any, Any]:
    letters = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = transformers.CLIPTokenizer(
        vocab={letter: i for i, letter in enumerate(letters)}, merges=[], model_max_length=77
    )
    config = transformers.CLIPTextConfig(
        vocab_size=len(letters), hidden_size=width, intermediate_size=16, num_hidden_layers=3, num_attention_heads=1,
        projection_dim=projection or width, eos_token_id=len(letters) - 1, bos_token_id=len(letters) - 2,
    )  # fmt: skip
    kind = transformers.CLIPTextModel if projection is None else transformers.CLIPTextModelWithProjection
    return tokenizer, kind(config)


def gemma() -> tuple[Any, Any]:
    words = ["<pad>", "<eos>", "<bos>", "<unk>", *LETTERS, "\u2581"]
    tokenizer = transformers.GemmaTokenizer(
        vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=8192
    )
    config = transformers.Gemma2Config(
        vocab_size=len(words), hidden_size=WIDTH, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4,
    )  # fmt: skip
    return tokenizer, transformers.Gemma2Model(config)


def qwen() -> tuple[Any, Any]:
    from tokenizers.pre_tokenizers import ByteLevel

    words = [*sorted(ByteLevel.alphabet()), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = transformers.Qwen2Tokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])
    sizes = {"hidden_size": WIDTH, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            **sizes, "vocab_size": len(words), "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 1], "rope_theta": 1e4},
        },
        vision_config={"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 1, "out_hidden_size": WIDTH},
    )  # fmt: skip
    return tokenizer, transformers.Qwen2_5_VLForConditionalGeneration(config)


def bytes_t5() -> tuple[Any, Any]:
    tokenizer = transformers.ByT5Tokenizer()
    config = transformers.T5Config(vocab_size=384, d_model=WIDTH, d_kv=4, d_ff=16, num_layers=2, num_heads=3)
    return tokenizer, transformers.T5EncoderModel(config)


ENCODERS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "PixArtAlphaPipeline": ("PixArtTransformer2DModel", (t5,)),
    "PixArtSigmaPipeline": ("PixArtTransformer2DModel", (t5,)),
    "StableDiffusion3Pipeline": ("SD3Transformer2DModel", (lambda: clip(4, 4), lambda: clip(6, 6), t5)),
    "FluxPipeline": ("FluxTransformer2DModel", (lambda: clip(POOLED), t5)),
    "AuraFlowPipeline": ("AuraFlowTransformer2DModel", (lambda: t5("UMT5"),)),
    "SanaPipeline": ("SanaTransformer2DModel", (gemma,)),
    "WanPipeline": ("WanTransformer3DModel", (lambda: t5("UMT5", 512),)),
    "QwenImagePipeline": ("QwenImageTransformer2DModel", (qwen,)),
    "LTXPipeline": ("LTXVideoTransformer3DModel", (lambda: t5(length=128),)),
    "CogVideoXPipeline": ("CogVideoXTransformer3DModel", (lambda: t5(length=226),)),
    "Lumina2Pipeline": ("Lumina2Transformer2DModel", (gemma,)),
    "HunyuanImagePipeline": ("HunyuanImageTransformer2DModel", (qwen, bytes_t5)),
}
"""Pipelines that take prompts: the class of their transformer, and what makes their tokenizers and text encoders."""


def backbone(name: str) -> DiffusersTransformer:
    """A random transformer of a class; of those that may have a second text, one that has."""
    if name in FAMILIES:
        return FAMILIES[name].backbone(name)
    config = {**diffusers_sweep.config(name), "text_embed_2_dim": WIDTH}
    return DiffusersTransformer.random(config, **diffusers_sweep.options(name))


def pipeline(name: str) -> Any:
    """A pipeline whose text encoders and transformer are random, none of whose weights is zero; without the rest."""
    transformer, made = ENCODERS[name]
    cls = getattr(diffusers, name)
    parts = {
        k: None if p.default is p.empty else p.default for k, p in inspect.signature(cls.__init__).parameters.items()
    }
    del parts["self"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for i, make in enumerate(made):
            end = f"_{i + 1}" if i else ""
            parts[f"tokenizer{end}"], encoder = make()
            for p in encoder.parameters():
                torch.nn.init.normal_(p, std=0.3)
            parts[f"text_encoder{end}"] = encoder.eval()
        parts["transformer"] = backbone(transformer).build()
    return cls(**parts)


def saved(name: str, folder: Path) -> Path:
    """The same in a folder of diffusers."""
    pipeline(name).save_pretrained(folder)
    return folder
