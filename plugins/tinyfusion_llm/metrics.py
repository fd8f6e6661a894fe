"""Metrics of language models: perplexity, speed of prefill and decoding, lm-eval tasks."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from tinyfusion_core.errors import UserError, need, require
from tinyfusion_core.evaluation.metrics import Measurement, Metric, Models
from tinyfusion_core.protocols.columns import unchecked
from tinyfusion_core.protocols.data import DataSource
from tinyfusion_core.protocols.task import Task
from tinyfusion_core.runtime.distributed import batches, map_sharded
from tinyfusion_core.runtime.seeding import Rng
from tinyfusion_core.training.trainer import Trainer
from tinyfusion_llm.backbone import CausalLM
from tinyfusion_llm.hidden import IGNORED, reader_of
from tinyfusion_llm.layers.inputs import source_of
from tinyfusion_llm.loss import NextToken
from tinyfusion_llm.pretrained.reading import as_json
from tinyfusion_llm.rows import Rows
from tinyfusion_llm.text import TextTokens


@dataclass(frozen=True)
class Perplexity(Metric):
    """Exponential of the mean cross-entropy over all tokens of the held-out text, read through a sliding window.

    Args:
        stride: tokens from one window to the next; each window counts the tokens that the previous one did not.
            Default: the whole window, so that tokens at its beginning have little context.
        window: tokens per window; default the data's context.
        batch_size: windows per batch.
    """

    stride: int | None = None
    window: int | None = None
    batch_size: int = 16
    together = True
    column = "perplexity"

    def __post_init__(self) -> None:
        for name in ("stride", "window", "batch_size"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"evaluate: Perplexity.{name}", value, "at least 1")

    @override
    def check(self, data: DataSource) -> None:
        if not isinstance(data, TextTokens) or not data.pack:
            raise UserError("evaluate: Perplexity needs running text: data TextTokens with pack; leave it out")

    @override
    def __call__(self, task: Task, models: Models, trainer: Trainer) -> list[Measurement]:
        rows, loss = unchecked(task.held_out), task.loss
        if not isinstance(rows, Rows) or not isinstance(loss, NextToken):
            raise UserError("evaluate: Perplexity goes with the loss NextToken and the data TextTokens")
        size = len(rows) * rows.context
        window = min(self.window or rows.context, size)
        stride = self.stride or window
        require(stride < window or self.stride is None, "evaluate: Perplexity.stride", stride, f"below {window}")
        firsts = [*range(0, size - window, stride), size - window]
        device = trainer.accelerator.device

        def read(model: nn.Module, numbers: range) -> tuple[float, int]:
            """Sum of the cross-entropy over the tokens of some windows, and how many they are."""
            # Of the first window everything counts, then what lies beyond the window before.
            some = [(firsts[i], firsts[i - 1] + window if i else 0) for i in numbers]
            read = [_from(rows, first, window, end) for first, end in some]
            batch = {name: torch.stack([each[name] for each in read]).to(device) for name in read[0]}
            inputs = loss.prepare(batch, Rng(0, "perplexity"))
            counted = (inputs["targets"] != IGNORED).sum(1)
            with torch.no_grad(), trainer.accelerator.autocast():
                means = loss.loss(loss.predict(model, inputs), inputs)
            return float((means.double() * counted).sum()), int(counted.sum())

        values: dict[str, float | None] = {}
        for name, model in models.items():
            found = map_sharded(batches(len(firsts), self.batch_size), partial(read, model))
            total, count = (sum(column) for column in zip(*found, strict=True))
            values[name] = math.exp(total / count) if math.isfinite(total) and total / count < 700 else None
        note = f"{count:,} held-out tokens, windows of {window}, stride {stride}"
        return [Measurement("perplexity", values, better="lower", note=note)]


def _from(rows: Rows, first: int, window: int, end: int) -> dict[str, Tensor]:
    read = rows.span(first, first + window)
    read["labels"][: max(0, end - first)] = IGNORED
    return read


@dataclass(frozen=True)
class Generation(Metric):
    """Tokens per second of prefill and of decoding with a key-value cache; and the memory.

    Of an encoder-decoder the encoder reads the prompt, and of some, such as Whisper, the config says how long it is.

    Args:
        prompt: tokens of the prompt.
        new_tokens: tokens to generate.
        batch_size: texts per batch.
        rounds: timed rounds of each model, after one warm-up; the medians are reported.
    """

    prompt: int = 128
    new_tokens: int = 32
    batch_size: int = 1
    rounds: int = 5
    column = None

    def __post_init__(self) -> None:
        for name in ("prompt", "new_tokens", "batch_size", "rounds"):
            require(getattr(self, name) >= 1, f"evaluate: Generation.{name}", getattr(self, name), "at least 1")

    @override
    def __call__(self, task: Task, models: Models, trainer: Trainer) -> list[Measurement]:
        device = trainer.accelerator.device
        found: dict[str, list[tuple[float, float, int]]] = {name: [] for name in models}
        for turn in range(self.rounds + 1):
            for name, model in models.items():
                with torch.no_grad(), trainer.accelerator.autocast():
                    measured = self._turn(model, device)
                if turn:
                    found[name].append(measured)
        threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
        note = f"median of {self.rounds}, batch {self.batch_size}, {device.type}{threads}"
        medians = {
            name: [statistics.median(column) for column in zip(*turns, strict=True)] for name, turns in found.items()
        }
        read, written = self.batch_size * self.prompt, self.batch_size * self.new_tokens
        return [
            Measurement(
                "prefill", {n: read / m[0] for n, m in medians.items()}, "tokens/s", "higher",
                f"prompt of {self.prompt}, {note}",
            ),
            Measurement(
                "decode", {n: written / m[1] for n, m in medians.items()}, "tokens/s", "higher",
                f"{self.new_tokens} tokens after a prompt of {self.prompt}, {note}",
            ),
            Measurement(
                "memory", {n: m[2] / 2**20 for n, m in medians.items()}, "MiB", "lower",
                f"weights and the cache of {self.prompt + self.new_tokens} tokens",
            ),
        ]  # fmt: skip

    def _turn(self, model: Any, device: torch.device) -> tuple[float, float, int]:
        """Seconds of prefill, seconds of decoding, bytes of the weights and the cache."""
        tokens = torch.arange(self.batch_size * self.prompt, device=device).view(self.batch_size, -1) % 50
        reader, given = reader_of(model), {"logits_to_keep": 1}
        if encoded := model.config.is_encoder_decoder:
            source = source_of(type(model), as_json(model.config), self.prompt)
            features = torch.zeros(self.batch_size, *source.shape, dtype=model.dtype, device=device)
            prompt, tokens = tokens if source.name == "input_ids" else features, tokens[:, :1]
        start = _now(device)
        if encoded:
            given = {"encoder_outputs": model.get_encoder()(**{source.name: prompt})}
        output = model(**{reader: tokens}, **given, use_cache=True)
        read = _now(device)
        for _ in range(self.new_tokens):
            tokens = output.logits[:, -1:].argmax(-1)
            output = model(**{reader: tokens}, **given, past_key_values=output.past_key_values, use_cache=True)
        done = _now(device)
        return read - start, done - read, _bytes(model) + _cache_bytes(output.past_key_values)


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def _bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())  # tied weights are listed once


def _cache_bytes(cache: Any) -> int:
    parts = [cache] if hasattr(cache, "layers") else [cache.self_attention_cache, cache.cross_attention_cache]
    tensors = [t for part in parts for layer in part.layers for t in vars(layer).values() if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


@dataclass(frozen=True)
class LmEval(Metric):
    """Tasks of EleutherAI's lm-evaluation-harness, from the package lm-eval; the tasks bring their own data.

    Args:
        tasks: names of tasks or of YAML files that define some.
        num_fewshot: examples in the prompt; default the task's own.
        limit: examples of each task; default all.
        batch_size: requests per batch.
    """

    tasks: list[str] = field(default_factory=lambda: ["lambada_openai"])
    num_fewshot: int | None = None
    limit: int | None = None
    batch_size: int = 8

    @override
    def check(self, data: DataSource) -> None:
        need("lm_eval", "tinyfusion[lm-eval]", "evaluate: LmEval")

    @override
    def __call__(self, task: Task, models: Models, trainer: Trainer) -> list[Measurement]:
        harness = need("lm_eval", "tinyfusion[lm-eval]", "evaluate: LmEval")
        adapter = need("lm_eval.models.huggingface", "tinyfusion[lm-eval]", "evaluate: LmEval").HFLM
        tokenizer = task.backbone.tokenizer() if isinstance(task.backbone, CausalLM) else None
        if tokenizer is None:
            raise UserError("evaluate: LmEval needs the backbone CausalLM of a model that comes with its tokenizer")
        found: dict[tuple[str, str], dict[str, float | None]] = {}
        better: dict[tuple[str, str], str] = {}
        for name, model in models.items():
            results = harness.simple_evaluate(
                model=adapter(pretrained=model, tokenizer=tokenizer, batch_size=self.batch_size),
                tasks=self.tasks,
                num_fewshot=self.num_fewshot,
                limit=self.limit,
            )
            for what, figures in results["results"].items():
                for key, value in figures.items():
                    figure = key.partition(",")[0]
                    if isinstance(value, float) and not figure.endswith("_stderr"):
                        found.setdefault((what, figure), dict.fromkeys(models))[name] = value
                        higher = results.get("higher_is_better", {}).get(what, {}).get(figure)
                        better[what, figure] = {True: "higher", False: "lower"}.get(higher, "")
        note = "lm-eval" + (f", first {self.limit} examples" if self.limit else "")
        return [
            Measurement(f"{what} {figure}", v, better=better[what, figure], note=note)
            for (what, figure), v in found.items()
        ]
