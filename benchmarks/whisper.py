"""Which decoder layers of Whisper should stay: a search, greedy and even spacing, recovered alike.

    python benchmarks/prepare_whisper.py --seconds 6; python benchmarks/prepare_speech.py
    python benchmarks/whisper.py [KEEP] [TRAIN] [HELD_OUT] [STEPS] [SEEDS]

As in recipes/whisper.yaml and Distil-Whisper (arXiv:2311.00430) the encoder stays whole and frozen. So what it makes of
a recording is computed once: the blocks are the decoder's layers alone, and a step costs a fraction. Distil-Whisper's
layers are spaced evenly, with the first and the last.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from prepare_speech import SPEECH
from prepare_whisper import MODEL
from torch import Tensor, nn
from transformers import GenerationMixin, WhisperForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

import tinyfusion_core as tiny
from tinyfusion_core.runtime.distributed import batches
from tinyfusion_llm import SpeechText
from tinyfusion_llm.speech.source import SpeechRows
from tinyfusion_llm.speech.words import normaliser, percent_wrong

FOLDER, CONTEXT = MODEL.with_name(f"{MODEL.name}-6s"), 48
LAYERS = "model.decoder.layers"


def losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Cross-entropies of the next token, (batch,), as `NextToken`'s."""
    heard, tokens = BaseModelOutput(batch["states"]), batch["tokens"]
    logits = model(encoder_outputs=heard, decoder_input_ids=tokens, use_cache=False).logits[:, :-1]
    targets = batch["labels"][:, 1:]
    each = nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    return each.sum(1) / (targets >= 0).sum(1)


def encoded(model: Any, rows: SpeechRows, num: int) -> dict[str, Tensor]:
    """Tokens, labels and what the encoder makes of the first recordings, cut behind the longest text."""
    found: dict[str, list[Tensor]] = {"states": [], "tokens": [], "labels": []}
    for numbers in batches(num, 10):
        batch = rows.__getitems__(list(numbers))
        with torch.no_grad():
            batch["states"] = model.model.encoder(batch["features"]).last_hidden_state
        for name, parts in found.items():
            parts.append(batch[name])
    return {name: torch.cat(parts) for name, parts in found.items()}


def renumber(model: Any, kept: Mapping[str, Sequence[int]]) -> None:
    """Give the layers that are left their places in a cache."""
    for place, layer in enumerate(model.model.decoder.layers):
        layer.self_attn.layer_idx = layer.encoder_attn.layer_idx = place
    model.config.decoder_layers = len(model.model.decoder.layers)


def written(model: Any, data: Mapping[str, Tensor], rows: SpeechRows) -> list[str]:
    """Greedy transcripts."""
    texts: list[str] = []
    for numbers in batches(len(data["states"]), 10):
        some = slice(numbers.start, numbers.stop)
        made = GenerationMixin.generate(
            model,
            encoder_outputs=BaseModelOutput(data["states"][some]),
            decoder_input_ids=data["tokens"][some, : rows.num_prompt],
            max_length=rows.context,
            do_sample=False,
        )
        texts += rows.processor.tokenizer.batch_decode(made, skip_special_tokens=True)
    return texts


def main(keep: int = 4, num_train: int = 240, num_held_out: int = 40, steps: int = 60, seeds: int = 1) -> None:
    torch.set_num_threads(1)
    files = {name: [str(SPEECH / f"{name}.jsonl")] for name in ("train", "held_out")}
    source = SpeechText(processor=str(FOLDER), files=files["train"], held_out_files=files["held_out"], context=CONTEXT)
    model: Any = WhisperForConditionalGeneration.from_pretrained(FOLDER).eval()
    held_out, rows = encoded(model, source.held_out(), num_held_out), source.held_out()
    data = encoded(model, source.train(), num_train)
    task = tiny.wrap(model, blocks=f"{LAYERS}.*", loss_fn=losses, data=data, held_out=held_out, after_prune=renumber)
    normalise = normaliser(rows.processor.tokenizer)
    said = [normalise(one.text) for one in rows.utterances[:num_held_out]]
    trainer = tiny.Trainer(precision="fp32", batch_size=4, log_every=1000)

    def judged(name: str, network: nn.Module, note: str) -> None:
        (loss,) = tiny.HeldOutLoss(draws=1, batch_size=10)(task, {"it": network}, trainer)
        wrong = percent_wrong(said, [normalise(text) for text in written(network, held_out, rows)])
        print(f"{name}: held-out loss {loss.values['it']:.3f}, {wrong:.1f} % of the words wrong; {note}", flush=True)

    judged("teacher", model, f"{num_held_out} recordings")
    evenly = np.linspace(0, len(task.blocks) - 1, keep, dtype=int).tolist()
    choices = {
        "search": tiny.Search(keep=keep, steps=60, batch_size=2, lr_gates=0.1, update=tiny.Frozen()),
        "greedy": tiny.Greedy(keep=keep, samples=16, batch_size=8),
        "Distil-Whisper's": tiny.Keep(blocks=evenly),
    }
    recover = tiny.Recover(
        steps=steps, lr=1e-4, lr_final=1e-5, ema=0.0, update=tiny.Matching(targets=r"model\.decoder.*")
    )
    done: dict[tuple[int, ...], str] = {}
    for name, selector in choices.items():
        start = time.perf_counter()
        decision = selector(task, trainer)
        note = f"layers {list(decision.kept)}, chosen in {time.perf_counter() - start:.0f} s"
        if (first := done.setdefault(tuple(decision.kept), name)) != name:
            print(f"{name}: as {first}; {note}", flush=True)
            continue
        judged(f"{name}, pruned", tiny.prune(task, decision), note)
        for seed in range(seeds):
            start, student = time.perf_counter(), tiny.prune(task, decision)
            student = recover(task, student, decision, replace(trainer, seed=seed))
            judged(f"{name}, seed {seed}", student, f"{steps} steps in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
