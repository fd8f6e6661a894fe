"""Distillation on policy against that on data: a small Llama that is trained here, pruned from 6 layers to 3.

    python benchmarks/on_policy.py [STEPS] [SEEDS]

The text is this repository's documentation, in 512 tokens of its own; the held-out tenth is cut out of it in pieces.
Each student begins with the same weights: the pruned ones after STEPS of distillation on data. `seconds` are those of
the processor. What is `as long` has as many steps on data as fit into the seconds of the steps on policy.
"""

from __future__ import annotations

import copy
import sys
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

import tinyfusion_core as tiny
from tinyfusion_llm import CausalLM, NextToken

ROOT, CONTEXT, VOCABULARY = Path(__file__).parent.parent, 32, 512


def texts() -> tuple[tiny.Tensors, tiny.Tensors]:
    """Samples to train on, and those that are held out: every tenth."""
    written = "\n".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    tokenizer.train_from_iterator([written], trainers.BpeTrainer(vocab_size=VOCABULARY, show_progress=False))
    ids = torch.tensor(tokenizer.encode(written).ids)
    rows = ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    apart = torch.arange(len(rows)) % 10 == 9
    some, others = ({"tokens": rows[which], "labels": rows[which]} for which in (~apart, apart))
    return tiny.Tensors(some), tiny.Tensors(others)


def trained(rows: torch.Tensor, steps: int = 600) -> LlamaForCausalLM:
    """The teacher."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 6, "num_attention_heads": 4}
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=CONTEXT, **sizes, **ends))
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(steps):
        batch = rows[torch.randint(len(rows), (32,))]
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model


def judged(task: tiny.Task, model: torch.nn.Module, trainer: tiny.Trainer) -> list[float]:
    """Held-out loss, KL(teacher || student) on held-out texts, and KL(student || teacher) on the student's own."""
    (loss,) = tiny.HeldOutLoss()(task, {"it": model}, trainer)
    batch, rng, found = task.held_out.__getitems__(list(range(min(128, len(task.held_out))))), tiny.Rng(9, "judged"), []
    forward, reverse = (NextToken(divergence=d, prompt_tokens=8) for d in ("forward", "reverse"))
    with torch.no_grad():
        for how, samples in ((forward, batch), (reverse, reverse.own_samples(model.eval(), batch, "", rng))):
            inputs = how.prepare(samples, rng)
            ours, theirs = (how.predict(network, inputs) for network in (model, task.teacher))
            found.append(float(how.distance(ours, theirs, inputs).mean()))
    return [float(loss.values["it"] or 0), *found]


def main(steps: int = 60, seeds: int = 2) -> None:
    train, held_out = texts()
    with TemporaryDirectory() as folder:
        trained(train.columns["tokens"]).save_pretrained(folder)
        task = tiny.Task(
            backbone=CausalLM(model=folder, context=CONTEXT), loss=NextToken(), train=train, held_out=held_out
        )
        decision = tiny.Keep([0, 2, 5])(task, tiny.Trainer(precision="fp32"))
        for seed in range(seeds):
            trainer = tiny.Trainer(precision="fp32", batch_size=32, seed=seed, progress=False)

            def recovered(model: Any, share: float, divergence: Any, num: int, trainer: tiny.Trainer = trainer) -> Any:
                kd = tiny.OutputKD(alpha_kd=1.0, alpha_gt=0.0, on_policy=share)
                how = tiny.Recover(steps=num, lr=1e-3, lr_final=1e-4, ema=0.0, kd=kd)
                begun, own = time.process_time(), replace(task, loss=NextToken(divergence=divergence, prompt_tokens=8))
                student = how(own, copy.deepcopy(model), decision, trainer)
                return student, time.process_time() - begun

            def tell(name: str, num: int, spent: float, model: Any, seed: int = seed, by: Any = trainer) -> None:
                figures = " | ".join(f"{value:.3f}" for value in judged(task, model, by))
                print(f"| {seed} | {name} | {num} | {spent:.0f} | {figures} |", flush=True)

            tell("teacher", 0, 0, task.teacher)
            begin, spent = recovered(tiny.prune(task, decision), 0.0, "forward", steps)
            tell("begins", steps, spent, begin)
            took = {}
            for share, divergence in ((0.0, "forward"), (0.0, "reverse"), (0.5, "reverse"), (1.0, "reverse")):
                name = f"{divergence}, {share:.0%} on policy"
                student, took[name] = recovered(begin, share, divergence, steps)
                tell(name, steps, took[name], student)
            for divergence in ("forward", "reverse"):
                num = round(steps * took["reverse, 100% on policy"] / took[f"{divergence}, 0% on policy"])
                student, spent = recovered(begin, 0.0, divergence, num)
                tell(f"{divergence}, 0% on policy, as long", num, spent, student)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
