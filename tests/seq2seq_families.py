"""Random models of every family of encoder-decoders that transformers has, and what holds of each.

`python tests/seq2seq_families.py` writes `docs/encoder-decoder-families.md`; a test says when that is out of date.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
)

import tinyfusion_core as tiny
from llm_families import SIZES, holds, one_line, sized
from places import ROOT
from sweeps import write_page
from tinyfusion_core.pruning.gating import Gates
from tinyfusion_core.samplers.constraints import Rules, build
from tinyfusion_llm import EncoderDecoder, NextToken
from tinyfusion_llm.layers.building import randomised
from tinyfusion_llm.seq2seq.columns import encoder_inputs

CLASSES = {**MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES, **MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES}
FAMILIES = tuple(name for name in CLASSES if CONFIG_MAPPING[name].is_encoder_decoder)
PAGE = ROOT / "docs" / "encoder-decoder-families.md"
TRAINER = tiny.Trainer(precision="fp32", batch_size=2)
HERE: dict[str, Any] = {
    **SIZES, "num_hidden_layers": 4, "num_layers": 4, "num_decoder_layers": 3, "num_encoder_layers": 4,
    "encoder_layers": 4, "decoder_layers": 3, "encoder_num_hidden_layers": 4, "decoder_num_hidden_layers": 3,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4, "d_kv": 8, "d_ff": 48, "num_heads": 4,
    "encoder_num_attention_heads": 4, "decoder_num_attention_heads": 4, "encoder_num_key_value_heads": 4,
    "decoder_num_key_value_heads": 4, "max_source_positions": 64, "max_target_positions": 64, "num_mel_bins": 8,
    "decoder_vocab_size": 97, "src_vocab_size": 97, "tgt_vocab_size": 97, "attention_window": 4, "block_size": 4,
    "forced_eos_token_id": None, "forced_bos_token_id": None, "suppress_tokens": None, "begin_suppress_tokens": None,
    "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64,
}  # fmt: skip
LENGTHS = {"moonshine": 2000, "moonshine_streaming": 2000, "speecht5": 2000}
"""Samples of waveforms; all others read 64 tokens or frames."""
MORE: dict[str, dict[str, Any]] = {
    "bigbird_pegasus": {"attention_type": "original_full"},  # which it takes for short texts by itself
}


def settings(family: str) -> dict[str, Any]:
    """Every size of a family's config that is in the table, at the table's value."""
    kind = CONFIG_MAPPING[family]
    renamed = {kind.attribute_map.get(key, key): value for key, value in HERE.items() if key not in kind.attribute_map}
    return {
        "model_type": family,
        "decoder_start_token_id": 2,
        **sized(kind().to_dict(), renamed),
        **MORE.get(family, {}),
    }


@dataclass
class Found:
    """What holds of a family.

    Attributes:
        lists: its lists of layers.
        limits: what its masks must obey, as `Backbone.limits` says it.
        refused: why it cannot be pruned; said before anything is spent.
        unbuilt: why transformers makes no small model of it.
        notes: what its students do not do, as the whole model does not.
    """

    lists: str = ""
    limits: str = ""
    refused: str = ""
    unbuilt: str = ""
    notes: list[str] = field(default_factory=list)

    def row(self, family: str) -> str:
        """Its row of the page."""
        name = f"| {family} | {CLASSES[family]} |"
        if self.unbuilt or self.refused:
            return f"{name} {self.unbuilt or self.refused} |"
        return f"{name} {self.lists} | {self.limits or 'any'} | {'; '.join(self.notes)} |"


def examine(family: str, work: Path) -> Found:
    """Prune a family: a search by default, gates, masks, files, generation.

    Raises:
        AssertionError: what is promised of every family does not hold.
    """
    try:
        network = settings(family)
        rng = torch.Generator().manual_seed(0)
        model = randomised(network, EncoderDecoder.autos, rng)
        model.generation_config.eos_token_id = None
        model.save_pretrained(work / "full")
    except Exception as e:  # of any family's code
        return Found(unbuilt=one_line(e))
    try:
        backbone = EncoderDecoder(model=str(work / "full"), source_context=LENGTHS.get(family, 64), context=8)
        rows = tiny.Tensors(backbone.example(4))
        task = tiny.Task(backbone=backbone, loss=NextToken(), train=rows, held_out=rows)
        limits, keep, first = backbone.limits(task.teacher), {}, 0
        for path, depth in task.lists.items():
            whole = set(range(first, first + depth)) <= set(limits.get("protect", ()))
            keep[path], first = depth if whole else depth - 1, first + depth
        decision = tiny.Search(keep=keep, steps=3)(task, TRAINER)
    except tiny.UserError as e:
        return Found(refused=one_line(e, work))
    masks = list(build(Rules(keep=keep, **limits), task.lists).masks())
    assert decision.kept in masks
    students = {kept: tiny.prune(task, decide(task, kept)) for kept in {masks[0], masks[-1], decision.kept}}
    _check_gates(task, students)
    again = _check_files(task, students[decision.kept], decision.kept, work / "student")
    said = ", ".join(f"{name} {' '.join(map(str, value))}" for name, value in limits.items())
    return Found(", ".join(task.lists), said, notes=list(_notes(task, again)))


def decide(task: tiny.Task, kept: tuple[int, ...]) -> tiny.Decision:
    return tiny.Decision(blocks=tuple(task.blocks), kept=kept, method="Keep")


def _inputs(task: tiny.Task) -> dict[str, Tensor]:
    return task.loss.prepare(task.backbone.example(3), tiny.Rng(0, "test"))


def _states(task: tiny.Task, model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = task.loss.predict(model, _inputs(task)).states
    return found


def _check_gates(task: tiny.Task, students: dict[tuple[int, ...], nn.Module]) -> None:
    """A network under one mask for each sample is the students of these masks; all gates have a gradient."""
    inputs, num = _inputs(task), len(task.blocks)
    with torch.no_grad():
        plain = task.loss.predict(task.teacher, inputs)
        whole = task.teacher(
            **encoder_inputs(task.teacher, inputs), decoder_input_ids=inputs["tokens"], use_cache=False
        ).logits
        assert torch.allclose(plain.head(plain.states), whole, rtol=0, atol=1e-4 * whole.abs().max()), "head"
    rows = [list(students)[i % len(students)] for i in range(3)]
    with Gates(task.teacher, task.blocks, task.batch_dim(task.teacher), task.streams, task.backbone.unneeded) as gates:
        gates.mask = torch.ones(3, num)
        assert torch.equal(_states(task, task.teacher), plain.states), "all ones"
        mask = torch.tensor([[float(i in kept) for i in range(num)] for kept in rows], requires_grad=True)
        gates.mask = mask
        prediction = task.loss.predict(task.teacher, inputs)
        (gradient,) = torch.autograd.grad(task.loss.loss(prediction, inputs).sum(), mask)
    assert gradient.isfinite().all() and (gradient != 0).any(0).all(), "gradient"
    for i, kept in enumerate(rows):
        alone = _states(task, students[kept])[i]
        close = torch.allclose(alone, prediction.states[i], rtol=0, atol=1e-4 * alone.abs().max())
        assert close, f"gated is not pruned: {kept}"


def _check_files(task: tiny.Task, student: nn.Module, kept: tuple[int, ...], path: Path) -> Any:
    """Saving compares bit by bit what is read; transformers reads it without anything left over."""
    tiny.save_pretrained(student, task, decide(task, kept), path)
    again, loading = type(student).from_pretrained(path, output_loading_info=True)  # type: ignore[attr-defined]
    assert not any(loading.values()), loading
    again.load_state_dict(student.state_dict(), assign=True)  # products may depend on where numbers lie
    assert torch.equal(_states(task, again.eval()), _states(task, student)), "read back"
    return again


def _notes(task: tiny.Task, student: Any) -> Iterator[str]:
    """What of generation holds for neither the whole model nor the student; for the first alone is a fault."""
    read = encoder_inputs(task.teacher, _inputs(task))
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def cached(model: Any) -> bool:
        generate = transformers.GenerationMixin.generate
        return torch.equal(*(generate(model, **read, use_cache=cache, **options) for cache in (True, False)))

    ours, theirs = (holds(cached, model) for model in (student, task.teacher))
    assert ours or not theirs, "generation: the same with a cache"
    if not ours:
        yield "does not generate with a cache, nor does the whole model"


HEAD = """# Families of encoder-decoders

Every encoder-decoder that `AutoModelForSeq2SeqLM` or `AutoModelForSpeechSeq2Seq` of transformers {version} loads, as a
random model of four layers in the encoder and three or four in the decoder (`tests/seq2seq_families.py`). Of each that
works, a search of three steps takes one layer of each list, and up to three masks are pruned. Under gates, with one
mask for each sample, the network computes what the pruned ones compute, and every gate has a gradient. What is saved is
what transformers reads, to the last bit. It generates with a cache what it generates without.

`protect` names the blocks that the config demands, numbered over both lists; they stay in every selection by
themselves. [Encoder-decoders](encoder-decoders.md) has how they are used.

This page is generated: `python tests/seq2seq_families.py`.
"""


if __name__ == "__main__":
    write_page(PAGE, HEAD, "lists | masks | but", FAMILIES, examine)
