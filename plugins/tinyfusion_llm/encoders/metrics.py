"""Metrics of encoders: how many masked tokens are right, and whether texts are as similar as in their targets."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from tinyfusion_core.errors import UserError, require
from tinyfusion_core.evaluation.metrics import Measurement, Metric, Models, held_out_inputs
from tinyfusion_core.protocols.data import DataSource
from tinyfusion_core.protocols.task import Task
from tinyfusion_core.runtime.distributed import batches, map_sharded
from tinyfusion_core.training.trainer import Trainer
from tinyfusion_llm.encoders.losses import MaskedToken, SentenceEmbedding
from tinyfusion_llm.encoders.text import EmbeddedText, PaddedText
from tinyfusion_llm.hidden import IGNORED


@dataclass(frozen=True)
class MaskedAccuracy(Metric):
    """Share of the masked tokens of the held-out text that a network finds most probable; the loss `MaskedToken`.

    Args:
        batch_size: samples per batch.
    """

    batch_size: int = 64
    together = True
    column = "masked accuracy"

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, "evaluate: MaskedAccuracy.batch_size", self.batch_size, "at least 1")

    @override
    def check(self, data: DataSource) -> None:
        if not isinstance(data, PaddedText):
            raise UserError("evaluate: MaskedAccuracy needs the data PaddedText; leave it out")

    @override
    def __call__(self, task: Task, models: Models, trainer: Trainer) -> list[Measurement]:
        loss, num = task.loss, len(task.held_out)
        if not isinstance(loss, MaskedToken):
            raise UserError("evaluate: MaskedAccuracy goes with the loss MaskedToken; leave it out")

        def right(model: nn.Module, rows: range) -> tuple[int, int]:
            """How many tokens are right, and how many there are."""
            inputs = held_out_inputs(task, trainer, rows, num)
            with torch.no_grad(), trainer.accelerator.autocast():
                found = loss.predict(model, inputs)
                best = found.head(found.states).argmax(-1)
            targets = inputs["targets"]
            return int((best == targets).sum()), int((targets != IGNORED).sum())

        values: dict[str, float | None] = {}
        for name, model in models.items():
            found = map_sharded(batches(num, self.batch_size), partial(right, model))
            hits, total = (sum(column) for column in zip(*found, strict=True))
            values[name] = hits / max(total, 1)
        return [Measurement("masked accuracy", values, better="higher", note=f"{total:,} masked held-out tokens")]


@dataclass(frozen=True)
class SimilarityRank(Metric):
    """Spearman's rank correlation of the cosine similarities of pairs of held-out texts with those of their targets.

    Args:
        samples: texts, the first of those held out; all pairs of them are compared.
        batch_size: texts per batch.
    """

    samples: int = 512
    batch_size: int = 64
    together = True
    column = "similarity rank"

    def __post_init__(self) -> None:
        require(self.samples >= 3, "evaluate: SimilarityRank.samples", self.samples, "at least 3 texts")
        require(self.batch_size >= 1, "evaluate: SimilarityRank.batch_size", self.batch_size, "at least 1")

    @override
    def check(self, data: DataSource) -> None:
        if not isinstance(data, EmbeddedText):
            raise UserError("evaluate: SimilarityRank needs the data EmbeddedText; leave it out")
        if (num := len(data.held_out())) < 3:
            raise UserError(f"evaluate: SimilarityRank compares pairs of held-out texts, and there are {num}")

    @override
    def __call__(self, task: Task, models: Models, trainer: Trainer) -> list[Measurement]:
        from scipy.stats import spearmanr

        loss, device = task.loss, trainer.accelerator.device
        if not isinstance(loss, SentenceEmbedding):
            raise UserError("evaluate: SimilarityRank goes with the loss SentenceEmbedding; leave it out")
        num = min(self.samples, len(task.held_out))
        parts = batches(num, self.batch_size)

        def similarities(model: nn.Module | None) -> Tensor:
            """Of all pairs, (pairs,); those of the targets without a model."""

            def embeddings(rows: range) -> Tensor:
                batch = task.held_out.__getitems__(list(rows))
                if model is None:
                    return batch["embedding"]
                inputs = {name: t.to(device) for name, t in batch.items()}
                with torch.no_grad(), trainer.accelerator.autocast():
                    return loss.predict(model, inputs).float().cpu()

            found = F.normalize(torch.cat(map_sharded(parts, embeddings)).double(), dim=-1)
            return (found @ found.T)[*torch.triu_indices(num, num, offset=1)]

        wanted = similarities(None)
        values: dict[str, float | None] = {}
        for name, model in models.items():
            value = float(spearmanr(similarities(model), wanted).statistic)
            values[name] = value if value == value else None  # nothing ranks where all are alike
        note = f"{len(wanted):,} pairs of {num} held-out texts"
        return [Measurement("similarity rank", values, better="higher", note=note)]
