"""Random encoders of many families, small enough to run in milliseconds, each as a folder that users would have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

import tinyfusion_core as tiny
from llm_toys import COMMON, VOCABULARY
from tinyfusion_llm import EmbeddedText, MaskedLM, MaskedToken, PaddedText, SentenceEmbedding, TextEncoder
from tinyfusion_llm.hidden import IGNORED

MASK = 3
TOKENS = torch.randint(4, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(0))
ATTENTION = (torch.arange(12) < torch.tensor([[12], [9], [5]])).long()
BATCH = {
    "tokens": TOKENS * ATTENTION,
    "attention": ATTENTION,
    "labels": TOKENS.masked_fill(ATTENTION == 0, IGNORED),
    "mask_token": torch.full((3,), MASK),
    "last_token": torch.full((3,), VOCABULARY - 1),
    "embedding": torch.randn(3, 32, generator=torch.Generator().manual_seed(1)),
}
"""Texts of three lengths, the first without padding."""
PARTS: dict[bool, tuple[Any, Any, str, Any]] = {
    True: (MaskedLM, MaskedToken, "AutoModelForMaskedLM", PaddedText),
    False: (TextEncoder, SentenceEmbedding, "AutoModel", EmbeddedText),
}
"""Backbone, loss, class of transformers and data, with a head and without."""


def settings(family: str, **more: Any) -> dict[str, Any]:
    return {"model_type": family, **COMMON, **more}


def folder(path: Path, family: str, head: bool = True, **more: Any) -> Path:
    """A folder with a random model, no weight of which is zero."""
    import transformers

    config = transformers.AutoConfig.for_model(**settings(family, **more))
    model: Any = getattr(transformers, PARTS[head][2]).from_config(config)
    rng = torch.Generator().manual_seed(1)
    for p in model.parameters():
        nn.init.normal_(p, std=0.2, generator=rng)
    model.save_pretrained(path)
    return path


def tokenizer(path: Path, **more: Any) -> Path:
    """Words, one number each, between two special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<mask>": MASK, **{f"w{i}": i for i in range(4, VOCABULARY)}}
    fast = Tokenizer(models.WordLevel(words, unk_token="w4"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    names = {"cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>", "mask_token": "<mask>", **more}
    PreTrainedTokenizerFast(tokenizer_object=fast, **names).save_pretrained(path)
    return path


def texts(path: Path, num: int = 12, longest: int = 20) -> Path:
    """Documents of some words, in a JSONL file."""
    lengths = [3 + i * 7 % (longest - 2) for i in range(num)]
    rows = [{"text": " ".join(f"w{4 + (i * 13 + j * j) % 90}" for j in range(n))} for i, n in enumerate(lengths)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sentence_folder(path: Path) -> Path:
    """A folder as sentence-transformers writes it: BERT, its tokenizer, mean pooling and normalisation."""
    tokenizer(folder(path, "bert", head=False))
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [
        {"idx": i, "name": str(i), "path": name, "type": f"sentence_transformers.models.{kind}"}
        for i, (name, kind) in enumerate(kinds.items())
    ]
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 16, "do_lower_case": False}))
    (path / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 32, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
    (path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return path


def recipe_of(model: Path, work: Path, head: bool = True, **data: Any) -> str:
    """A recipe that prunes a model of a folder with the defaults, on words of a tokenizer of its own."""
    backbone, loss, _, source = PARTS[head]
    words = tokenizer(work / "words")  # beside a config of another family transformers takes it for that family's
    told = {"tokenizer": str(words), "files": [str(texts(work / "texts.jsonl"))], "context": 12}
    told |= {
        "cache": str(work / "cache"),
        **({} if head else {"teacher": str(sentence_folder(work / "teacher"))}),
        **data,
    }
    content = {
        "backbone": {"class_path": backbone.__name__, "init_args": {"model": str(model), "context": 12}},
        "loss": loss.__name__,
        "data": {"class_path": source.__name__, "init_args": told},
        "trainer": {"precision": "fp32", "batch_size": 2, "seed": 0},
        "search": {"class_path": "Search", "init_args": {"keep": 4, "steps": 2}},
        "recover": {"steps": 2},
        "evaluate": [],
    }
    (work / "recipe.yaml").write_text(yaml.safe_dump(content))
    return str(work / "recipe.yaml")


def task_of(path: Path, head: bool = True) -> tiny.Task:
    backbone, loss, _, _ = PARTS[head]
    rows = tiny.Tensors(BATCH)
    return tiny.Task(backbone=backbone(model=str(path), context=12), loss=loss(), train=rows, held_out=rows)


def output(model: Any) -> Tensor:
    """Logits, or the final hidden states."""
    with torch.no_grad():
        found: Tensor = model(input_ids=BATCH["tokens"], attention_mask=ATTENTION)[0]
    return found
